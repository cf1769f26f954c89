"""Checks and timings for a CUDA card, in a real ComfyUI: python tests/tools/gpu_check.py --comfy DIR --json FILE

Runs ComfyUI's own autoregressive sampler and ours on one random network of the 1.3B shape (bf16, 832x480):
bit-identity, speed, a windowed long run, memory announced against memory taken, quantised and offloaded stores, fp8
weights, torch.compile, fused kernels and CUDA graphs, and the same run while other data leaves little room. Every check
prints a line; the JSON holds all numbers. Without a card it goes through the same steps on a tiny network, to show that the
script works, and compiles the fused kernels for a card, where Triton is installed.
"""
from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SEED = 0
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
HEIGHT, WIDTH = (60, 104) if CUDA else (8, 12)
RESULTS: dict = {"checks": []}


def prepare(comfy: Path, dynamic: bool) -> None:
    """Import ComfyUI as main.py would, with its paged weights where asked for."""
    os.environ.pop("TRITON_INTERPRET", None)  # Triton decides at its import, which ComfyUI's libraries cause
    sys.path.insert(0, str(comfy))
    pack = types.ModuleType("forcing_pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["forcing_pack"] = pack
    nodes = types.ModuleType("forcing_pack.nodes")  # its files without the node list, which needs the whole host
    nodes.__path__ = [str(ROOT / "nodes")]
    sys.modules["forcing_pack.nodes"] = nodes
    if not CUDA:
        import comfy.cli_args
        comfy.cli_args.args.cpu = comfy.cli_args.args.use_pytorch_cross_attention = True
    if dynamic:
        import comfy_aimdo.control
        comfy_aimdo.control.init()
    import comfy.model_management as mm
    import comfy.model_patcher
    if dynamic and comfy_aimdo.control.init_devices(d.index for d in mm.get_all_torch_devices()):
        import comfy.memory_management
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def report(name: str, **values) -> None:
    RESULTS["checks"].append({"name": name, **values})
    print(name, json.dumps(values), flush=True)


def weights() -> dict:
    from forcing_pack.forcing_core.wan import WanConfig
    from forcing_pack.forcing_core.wan.random import random_network
    config = WanConfig() if CUDA else WanConfig(dim=256, ffn_dim=512, heads=2, layers=2)
    return {name: value.to(DTYPE).cpu() for name, value in random_network(config, SEED, DEVICE, DTYPE).state_dict().items()}


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0


class Rig:
    """One loaded model with a prompt; `run` samples and times."""

    def __init__(self, state: dict, causal: bool = False, ours: bool = True, options: dict | None = None):
        import comfy.samplers
        import comfy.sd
        meta = {"config": '{"transformer": {"causal_ar": true}}'} if causal else None
        self.model = comfy.sd.load_diffusion_model_state_dict(dict(state), model_options=options or {}, metadata=meta)
        guider = importlib.import_module("forcing_pack.nodes.guiding").CausalGuider if ours else comfy.samplers.CFGGuider
        self.make = lambda model: guider(model)
        self.prompt = torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def run(self, sampler, frames: int, model=None, sigmas=(1, .9375, .8333333134651184, .625, 0)):
        guider = self.make(model or self.model)
        guider.inner_set_conds({"positive": [[self.prompt, {}]]})
        latent = torch.zeros(1, 16, frames, HEIGHT, WIDTH)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED))
        marks: list[float] = []

        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        started = now()
        out = guider.sample(noise, latent, sampler, torch.tensor(sigmas), disable_pbar=True, seed=SEED,
                            callback=lambda *_: marks.append(now()))
        return out, now() - started, marks


def causal_sampler(**options):
    from forcing_pack.forcing_core.options import RolloutOptions
    from forcing_pack.nodes.sampler import CausalSampler
    return CausalSampler(RolloutOptions(**options))


def window(frames: int | None, **more):
    from forcing_pack.forcing_core.policies import WindowOptions
    return WindowOptions(window=frames, **more)


def check_noise() -> None:
    from forcing_pack.forcing_core.noise import BlockNoise
    from forcing_pack.forcing_core.plan import Block
    block = Block(4, 12, 3)
    pair = [BlockNoise(7, (1, 16), (60, 104), device).renoise(block, 2).cpu() for device in ("cpu", DEVICE)]
    report("noise equal on CPU and GPU", equal=torch.equal(*pair))


def check_core(state: dict, runs: int) -> None:
    """Bit-identity with core's sampler, then speed at 21 frames."""
    import comfy.samplers
    core, ours = Rig(state, causal=True, ours=False), Rig(state)
    theirs = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 3})
    a, _, _ = core.run(theirs, 9)
    b, _, _ = ours.run(causal_sampler(noise="comfy"), 9)
    report(f"same latents as core, 9 frames, {DTYPE}", max_abs=float((a - b).abs().max()), scale=float(a.abs().mean()),
           equal=torch.equal(a, b))
    times: dict[str, list[float]] = {"core": [], "ours": []}
    peak = {}
    for _ in range(runs):
        for name, rig, sampler in (("core", core, theirs), ("ours", ours, causal_sampler())):
            times[name].append(rig.run(sampler, 21)[1])
            peak[name] = peak_gb()
    median = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    report("seconds for 21 frames (81 of video), all in sight", **median, ratio=median["core"] / median["ours"],
           video_fps={name: 81 / t for name, t in median.items()}, peak_gb=peak)


def check_window(rig: Rig, total: int, **cache) -> None:
    """Time a block early and late, and bytes, under a window."""
    from forcing_pack.nodes import host, host_memory
    sampler = causal_sampler(cache=window(**cache))
    taken = []
    plain = host.HostDenoiser.free
    host.HostDenoiser.free = lambda self: (taken.append(self.nbytes), plain(self))
    out, seconds, marks = rig.run(sampler, total)
    host.HostDenoiser.free = plain
    blocks = [b - a for a, b in zip(marks[4::5], marks[9::5])]
    half = len(blocks) // 2
    shape = host_memory.shape_of(rig.model.model, out.shape)
    announced = host_memory.announced_bytes(sampler.rollout, shape, host_memory.element_size(rig.model))
    report(f"{total} frames under {cache}", seconds=seconds, early_block=sorted(blocks[4:half])[(half - 4) // 2],
           late_block=sorted(blocks[half:])[len(blocks[half:]) // 2], store_gb=max(taken) / 1e9,
           announced_gb=announced / 1e9, exact=max(taken) == announced, peak_gb=peak_gb(),
           video_fps=12 / sorted(blocks)[len(blocks) // 2], finite=bool(torch.isfinite(out).all()))


def check_variants(rig: Rig, total: int) -> None:
    """Quantised and offloaded stores: how far the latents move, time, and bytes. Offloaded ones have to give the same
    bits every time: a copy that comes late, or a buffer that is reused too soon, shows as a difference."""
    from forcing_pack.nodes import host, host_memory
    taken, resident = [], {}
    plain = host.HostDenoiser.free

    def free(self):
        taken.extend((m.store.nbytes, m.store.host_nbytes) for m in self.memories.values())
        plain(self)

    host.HostDenoiser.free = free
    for store in ("model", "int8", "fp8"):
        for offloaded in (False, True):
            sampler = causal_sampler(cache=window(9, sink=3, positions="relative", store=store, offload=offloaded))
            runs = [rig.run(sampler, total) for _ in range(3 if offloaded else 1)]
            out, base = runs[-1][0], resident.setdefault("model", runs[-1][0])
            announced = host_memory.announced_bytes(sampler.rollout, host_memory.shape_of(rig.model.model, out.shape),
                                             host_memory.element_size(rig.model))
            report(f"{total} frames, store {store}{', offloaded' * offloaded}", seconds=runs[-1][1], peak_gb=peak_gb(),
                   store_gb=max(taken)[0] / 1e9, host_gb=max(taken)[1] / 1e9, exact=max(taken)[0] == announced,
                   relative=float((out - base).norm() / base.norm()),
                   same=all(torch.equal(run[0], resident.setdefault(store, out)) for run in runs))
            taken.clear()
    host.HostDenoiser.free = plain


def check_fp8(state: dict, base: torch.Tensor) -> None:
    rig = Rig(state, options={"dtype": torch.float8_e4m3fn})
    out, seconds, _ = rig.run(causal_sampler(), 9)
    report("fp8_e4m3fn weights", seconds=seconds, relative=float((out - base).norm() / base.norm()),
           finite=bool(torch.isfinite(out).all()))


def check_compile(rig: Rig, base: torch.Tensor) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    model = rig.model.clone()
    set_torch_compile_wrapper(model=model, backend="inductor" if CUDA else "eager")
    first = rig.run(causal_sampler(), 9, model)
    again = rig.run(causal_sampler(), 9, model)
    plain = rig.run(causal_sampler(), 9)
    report("torch.compile", first_seconds=first[1], seconds=again[1], eager_seconds=plain[1],
           relative=float((again[0] - base).norm() / base.norm()))


POINTERS = {"table": "*fp32", "slots": "*i64"} | dict.fromkeys(("x", "y", "shift", "factor", "gate", "out", "weight", "raw",
                                                                "roped"), "*bf16")
CONSTANTS = {"BLOCK": 2048, "RAW": True, "ROPED": True}


def compile_kernel(name: str) -> None:
    """For an A100, which need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    kernel = importlib.import_module(f"forcing_pack.forcing_core.kernels.{name}")._kernel
    constants = {(i,): CONSTANTS[arg] for i, arg in enumerate(kernel.arg_names) if arg in CONSTANTS}
    types = {arg: "constexpr" if arg in CONSTANTS else POINTERS.get(arg, "fp32" if arg == "eps" else "i32")
             for arg in kernel.arg_names}
    made = triton.compile(triton.compiler.ASTSource(kernel, types, constants), target=GPUTarget("cuda", 80, 32))
    report(f"kernel {name}, compiled", ptx=len(made.asm["ptx"]), cubin=len(made.asm["cubin"]))


def timed(work) -> float:
    """Milliseconds of one of twenty calls, after three."""
    for _ in range(3):
        work()
    started = now()
    for _ in range(20):
        work()
    return (now() - started) * 50


def check_kernel(name: str, fused, plain, exact) -> None:
    distance = {kind: float((made().double() - exact).norm() / exact.norm())
                for kind, made in (("fused", fused), ("plain", plain))}
    report(f"kernel {name}, {DTYPE}", fused_ms=timed(fused), plain_ms=timed(plain), relative=distance,
           good=distance["fused"] <= 1.01 * distance["plain"] + 1e-6)


def check_kernels() -> None:
    """Each fused kernel against plain torch, both against float64, on one block of 832x480."""
    from forcing_pack.forcing_core.kernels import has_triton, plain
    from forcing_pack.forcing_core.rope import Rope, rotate
    if not has_triton():
        report("kernels", missing="Triton is not installed")
        return
    modulate, gate, turn = (importlib.import_module(f"forcing_pack.forcing_core.kernels.{name}")
                            for name in ("modulate", "gate", "rotate"))
    if not CUDA:
        for name in ("modulate", "gate", "rotate"):
            compile_kernel(name)
        return
    frames, cells, heads, width = 3, 30 * 52, 12, 1536
    x, y = (torch.randn(1, frames * cells, width, device=DEVICE).to(DTYPE) for _ in range(2))
    m = torch.randn(1, frames, 6, width, device=DEVICE).to(DTYPE)
    shift, factor, by = (part.unsqueeze(2) for part in m.unbind(2)[:3])
    wide = [t.double() for t in (x, y, shift, factor, by)]
    norm = torch.nn.LayerNorm(width, 1e-6, elementwise_affine=False)
    rms = torch.nn.RMSNorm(width, 1e-6, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    table = Rope((30, 52), width // heads, DEVICE).table([40, 41, 42])
    slots = torch.tensor([4, 0, 2], device=DEVICE)
    out = torch.zeros(1, 6, cells, heads, width // heads, device=DEVICE, dtype=DTYPE)

    def keys():
        turn.norm_rotate(x, rms.weight, rms.eps, table, slots, None, out)
        return out[:, [4, 0, 2]].flatten(1, 2)

    def pairs(t):
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * table).flatten(-2)

    check_kernel("modulate", lambda: modulate.modulate(x, shift, factor, 1e-6), lambda: plain.modulate(norm, x, shift, factor),
                 plain.modulate(norm, wide[0], wide[2], wide[3]))
    check_kernel("gate", lambda: gate.gate(x, y, by), lambda: plain.gate(x, y, by), plain.gate(wide[0], wide[1], wide[4]))
    check_kernel("rotate", keys, lambda: rotate(rms(x).unflatten(2, (heads, -1)), table),
                 pairs(torch.nn.functional.rms_norm(wide[0], (width,), None, 1e-6).unflatten(2, (heads, -1))))


def check_accelerated(rig: Rig, total: int) -> None:
    """The same long video every way. CUDA graphs give the same bits; fused kernels and paging may not be used everywhere."""
    from forcing_pack.forcing_core.accelerate import WAYS
    from forcing_pack.nodes import host
    used, base = [], None
    plain = host.HostDenoiser.free
    host.HostDenoiser.free = lambda self: (used.append(self._forwards.graphs), plain(self))
    for name in WAYS:
        sampler = causal_sampler(cache=window(12, sink=3, positions="relative"), accelerate=name)
        used.clear()
        out, seconds, marks = rig.run(sampler, total)
        blocks = [b - a for a, b in zip(marks[4::5], marks[9::5])]
        base, graphs = out if base is None else base, used[0]
        late = sorted(blocks[len(blocks) // 2:])
        report(f"{total} frames, accelerate {name}", seconds=seconds, late_block=late[len(late) // 2], peak_gb=peak_gb(),
               equal=torch.equal(out, base), relative=float((out - base).norm() / base.norm()),
               recorded=graphs and graphs.recorded, replayed=graphs and graphs.replayed, off=graphs and graphs.off)
    host.HostDenoiser.free = plain


def check_tight(state: dict, leave_gb: float, dynamic: bool) -> None:
    """The same run with only `leave_gb` free: weights must make room for the store, not the other way round."""
    import comfy.model_management as mm
    mm.unload_all_models()
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(int(free - leave_gb * 1e9), dtype=torch.uint8, device="cuda")
    for ours in (True, False):
        rig = Rig(state, ours=ours)
        try:
            out, seconds, _ = rig.run(causal_sampler(cache=window(12, sink=3)), 15)
            report(f"{leave_gb} GB free, {'our' if ours else 'core'} guider", seconds=seconds, dynamic=dynamic,
                   loaded_gb=rig.model.loaded_size() / 1e9, finite=bool(torch.isfinite(out).all()))
        except Exception as error:  # noqa: BLE001  (a failed check is a result)
            report(f"{leave_gb} GB free, {'our' if ours else 'core'} guider", error=f"{type(error).__name__}: {error}"[:300])
        del rig
        mm.unload_all_models()
    del ballast


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfy", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dynamic", action="store_true", help="with ComfyUI's paged weights")
    parser.add_argument("--quick", action="store_true", help="only the memory checks")
    parser.add_argument("--runs", type=int, default=3, help="runs of the speed comparison")
    args = parser.parse_args(argv)
    prepare(args.comfy, args.dynamic)
    RESULTS["machine"] = {"gpu": torch.cuda.get_device_name() if CUDA else None, "torch": torch.__version__,
                          "dynamic": args.dynamic}
    state = weights()
    if not args.quick:
        check_noise()
        check_core(state, args.runs)
        rig = Rig(state)
        base = rig.run(causal_sampler(), 9)[0]
        check_window(rig, 120, frames=12, sink=3)
        check_window(rig, 120, frames=12, sink=3, positions="relative")
        check_window(rig, 60, frames=12, sink=3, positions="relative", compact=True)
        check_window(rig, 60, frames=21, positions="rebased", limit=21)
        check_variants(rig, 30)
        check_fp8(state, base)
        check_compile(rig, base)
        check_kernels()
        check_accelerated(rig, 60 if CUDA else 24)
        del rig
    if CUDA:
        check_tight(state, 7.0, args.dynamic)
    args.json.write_text(json.dumps(RESULTS, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
