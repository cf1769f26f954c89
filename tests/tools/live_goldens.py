"""Record the golden cases of LIVE from the public implementation: python tests/tools/live_goldens.py REFERENCE OUT

REFERENCE is a checkout of Junchao-cs/LIVE at 20c82a9; nothing of it is in this file. It runs in float32 on CPU and in training
mode, because its inference mode casts queries, keys and values to float16 (dropout is 0, so nothing else differs). Weights are
`forcing_core.live.random.random_state` of a seed; their checksum is kept, so that another random generator is noticed.
"""
from __future__ import annotations

import argparse
import json
import sys
import types
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from forcing_core.live import CameraPath  # noqa: E402
from forcing_core.live.camera_path import Keyframe, keyed_path  # noqa: E402
from forcing_core.live.random import random_state  # noqa: E402

NETWORK = {"dim": 64, "layers": 3, "heads": 2, "latent": [8, 8], "window": 5, "rope": [4, 14, 14]}
VAE = {"channels": 32, "multiples": [1, 1, 2, 2, 4], "blocks": 2}
SEED, VAE_SEED, SCALE, STEPS = 11, 12, 0.2325, 18
SOURCE = {"system": "LIVE", "arxiv": "2602.03747", "repo": "Junchao-cs/LIVE",
          "commit": "20c82a9fba43988fb74bfbfbb3c35cbccd042378"}
LIMITS = {"max_abs": 1e-4, "rel_l2": 2e-5}


def path_of(frames: int) -> CameraPath:
    """A walk that turns, looks up and rolls."""
    keys = [Keyframe(0, 0.1, -0.2, 0.3, 5, 3, -2), Keyframe(frames // 2, 0.6, -0.1, 0.9, 40, -10, 8),
            Keyframe(frames - 1, 0.2, 0.1, 1.6, 15, 12, -6)]
    return keyed_path(keys, frames)


def shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in net.state_dict().items()}


def checksum(state: dict[str, Tensor]) -> float:
    return float(sum(t.double().abs().sum() for t in state.values()))


def network(reference, condition: str):
    """The public network in small, and its weights."""
    height, width = NETWORK["latent"]
    net = reference.Transformer(dim=NETWORK["dim"], n_layer=NETWORK["layers"], n_head=NETWORK["heads"],
                                n_local_heads=NETWORK["heads"], input_h=height, input_w=width, input_t=NETWORK["window"],
                                rope_dim=NETWORK["rope"], sdpa_backends=["math"], enable_liger=False,
                                use_plucker=condition == "camera")
    state = random_state(shapes(net), SEED)
    net.load_state_dict(state)
    return net.requires_grad_(False).train(), state


def definition(reference, out: Path) -> None:
    """Names and shapes of all weights: of the published sizes, and of a narrow network of the same depth."""
    vae = import_module("tvae.models.mar_vae")
    found = {}
    for size, dim, heads, channels in (("published", 1536, 24, 128), ("narrow", 64, 1, 32)):
        with torch.device("meta"):
            net = reference.Transformer(dim=dim, n_layer=18, n_head=heads, n_local_heads=heads, input_h=16, input_w=16,
                                        rope_dim=[8, 28, 28], enable_liger=False)
            parts = {"encoder": vae.Encoder(ch=channels), "decoder": vae.Decoder(ch=channels),
                     "quant_conv": torch.nn.Conv2d(32, 32, 1), "post_quant_conv": torch.nn.Conv2d(16, 16, 1)}
        found[size] = {"network": shapes(net),
                       "autoencoder": {f"{part}.{name}": s for part, m in parts.items() for name, s in shapes(m).items()}}
    (out / "names.json").write_text(json.dumps({**SOURCE, **found}, separators=(",", ":")), encoding="utf-8")


def save(out: Path, name: str, tensors: dict[str, Tensor], settings: dict, **more) -> None:
    metadata = {"settings": json.dumps({**SOURCE, "case": name, "tolerance": LIMITS, **settings}), "license": "Apache-2.0",
                **{key: json.dumps(value) for key, value in more.items()}}
    save_file({key: t.contiguous() for key, t in tensors.items()}, out / f"{name}.safetensors", metadata)
    print(name, {key: list(t.shape) for key, t in tensors.items()})


def forward(reference, out: Path, condition: str, poses: Tensor) -> None:
    """A whole window at mixed levels, and what the condition is."""
    net, state = network(reference, condition)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, NETWORK["window"], 16, *NETWORK["latent"], generator=generator)
    t = torch.tensor([[149.9, 149.9, 149.9, 149.9, 999.7], [980.4, 704.2, 0.0, 35.0, 501.9]])
    model = import_module("tvideo.mc.models.df_flow").DiffusionForcing
    window = torch.stack([poses[:5], poses[3:8]]).float()
    condition_of = model.compute_plucker_in_window if condition == "camera" else model.compute_rt_in_window
    arguments = (None, window, *NETWORK["latent"]) if condition == "camera" else (None, window)
    act = condition_of(*arguments)
    save(out, f"forward_{condition}", {"x": x, "timesteps": t, "poses": window, "condition": act, "velocity": net(x, t, act)},
         {"network": {**NETWORK, "condition": condition}, "seed": SEED, "checksum": checksum(state), "names": shapes(net)})


def autoencoder(out: Path) -> None:
    """Pictures to latents with given noise of the posterior, and latents to pictures."""
    reference = import_module("tvae.models.mar_vae")
    net = torch.nn.Module()
    net.encoder = reference.Encoder(ch=VAE["channels"], ch_mult=VAE["multiples"], z_channels=16)
    net.decoder = reference.Decoder(ch=VAE["channels"], ch_mult=VAE["multiples"], z_channels=16)
    net.quant_conv, net.post_quant_conv = torch.nn.Conv2d(32, 32, 1), torch.nn.Conv2d(16, 16, 1)
    state = random_state(shapes(net), VAE_SEED)
    net.load_state_dict(state)
    net.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(2)
    pictures, noise = 2 * torch.rand(2, 3, 48, 48, generator=generator) - 1, torch.randn(2, 16, 3, 3, generator=generator)
    posterior = reference.DiagonalGaussianDistribution(net.quant_conv(net.encoder(pictures)))
    latents = SCALE * (posterior.mean + posterior.std * noise)
    decoded = net.decoder(net.post_quant_conv(1.0 / SCALE * latents))
    save(out, "autoencoder", {"pictures": pictures, "noise": noise, "mean": SCALE * posterior.mode(), "latents": latents,
                              "decoded": decoded},
         {"autoencoder": VAE, "scale": SCALE, "seed": VAE_SEED, "checksum": checksum(state), "names": shapes(net)})


class _Recorder:
    """The network as the public loop calls it, in float32 inside of a float64 loop: the loop's own formula for x0 loses four
    digits at the noisiest step otherwise. Counts calls and keeps the order of frames and timesteps."""

    def __init__(self, net: torch.nn.Module):
        self.net, self.calls = net, []

    def clear_cache(self) -> None:
        self.net.clear_cache()

    def __call__(self, x: Tensor, t: Tensor, act: Tensor) -> Tensor:
        self.calls.append([x.shape[1], sorted({float(int(value)) for value in t.flatten()})])
        return self.net(x.float(), t, act.float()).double()


def rollout(reference, out: Path, poses: Tensor, given: int, frames: int) -> None:
    """The public loop: a sliding context, frame by frame. Draws are recorded in the order in which the loop asks for them."""
    net, state = network(reference, "camera")
    recorder, host = _Recorder(net), types.SimpleNamespace(use_plucker=True)
    model = import_module("tvideo.mc.models.df_flow").DiffusionForcing
    for name in ("compute_plucker_in_window", "dpm_solver_first_update", "multistep_dpm_solver_second_update",
                 "get_model_input_time"):
        setattr(host, name, types.MethodType(getattr(model, name), host))
    start = torch.randn(1, given, 16, *NETWORK["latent"], generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    with _draws() as drawn:
        made = model.generate_v_flow_shift_dpm(
            host, recorder, start.double(), poses[None].float(), n_prompt_frames=given, total_frames=given + frames,
            denoise_steps=STEPS, max_frames=NETWORK["window"], add_noise_to_ctx=True, desc=None)
    noise, contexts = drawn[::2], drawn[1::2]
    tensors = {"initial_latent": start, "noise": torch.cat(noise, dim=1).float(), "poses": poses.float(),
               "latents": made[:, given:].float()}
    tensors |= {f"renoise.{k}": t.float() for k, t in enumerate(contexts)}
    save(out, "rollout", tensors,
         {"network": {**NETWORK, "condition": "camera"}, "seed": SEED, "checksum": checksum(state), "rollout": "live",
          "frames_generated": frames, "initial_frames": given, "noise_covers_initial": False, "steps": STEPS,
          "window": NETWORK["window"], "forwards_count": len(recorder.calls)},
         renoise=[{"block": given + k, "step": 0, "k": k} for k in range(frames)], forwards=recorder.calls)


class _draws:
    """Keeps every draw of torch.randn and torch.randn_like."""

    def __enter__(self) -> list[Tensor]:
        self.before, kept = (torch.randn, torch.randn_like), []

        def keep(draw):
            def wrapped(*args, **kwargs):
                kept.append(draw(*args, **kwargs))
                return kept[-1].clone()
            return wrapped
        torch.randn, torch.randn_like = map(keep, self.before)
        return kept

    def __exit__(self, *_) -> None:
        torch.randn, torch.randn_like = self.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(args.reference))
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    reference = import_module("tvideo.mc.modules.df.transformer_cache")
    reference.create_block_mask = lambda *_, **__: None  # only for kernels that a CPU does not have
    definition(reference, args.out)
    given, frames = 2, 6
    poses = path_of(given + frames).vectors()
    for condition in ("camera", "pose"):
        forward(reference, args.out, condition, poses)
    autoencoder(args.out)
    rollout(reference, args.out, poses, given, frames)


if __name__ == "__main__":
    main()
