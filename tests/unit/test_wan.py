"""The module tree and the causal forward."""
import math

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import Switch, block_rollout
from forcing_pack.forcing_core.schedule import Level, levels
from forcing_pack.forcing_core.wan import WanModel
from forcing_pack.forcing_core.wan.forward import unpatchify
from forcing_pack.forcing_core.wan.text import pad_rows
from forcing_pack.forcing_core.wan.times import timestep_embedding
from forcing_testkit.forcing_corekit import CHANNELS, cached, gap, latents, network, prompts


def official_names(layers):
    """Names of the public Wan 2.1 T2V checkpoints, written out here once more."""
    for module in ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
                   "time_projection.1", "head.head"):
        yield from (f"{module}.weight", f"{module}.bias")
    yield "head.modulation"
    for block in (f"blocks.{i}" for i in range(layers)):
        yield f"{block}.modulation"
        for part in ("self_attn", "cross_attn"):
            yield from (f"{block}.{part}.{p}.{kind}" for p in "qkvo" for kind in ("weight", "bias"))
            yield from (f"{block}.{part}.norm_{p}.weight" for p in "qk")
        yield from (f"{block}.{module}.{kind}" for module in ("norm3", "ffn.0", "ffn.2") for kind in ("weight", "bias"))


def test_official_key_names():
    """A renamed or extra parameter would make every published checkpoint fail to load."""
    with torch.device("meta"):
        state = WanModel().state_dict()
    assert len(state) == 825
    assert set(state) == set(official_names(30))
    assert state["patch_embedding.weight"].shape == (1536, 16, 1, 2, 2)
    assert state["blocks.29.ffn.0.weight"].shape == (8960, 1536)
    assert state["blocks.0.modulation"].shape == (1, 6, 1536) and state["head.modulation"].shape == (1, 2, 1536)
    assert state["head.head.weight"].shape == (64, 1536) and state["text_embedding.0.weight"].shape == (1536, 4096)


@pytest.mark.parametrize("size", [(5, 6), (4, 7), (5, 7)])
def test_odd_latents_are_refused(size):
    """A convolution would silently drop the last row and return another size than it was given."""
    denoiser = cached(network(), WindowOptions(), 3, (4, 6))
    with pytest.raises(ForcingError, match="divisible by 16"):
        denoiser(latents(3, size), [Level(500.0, 0.5)] * 3, 0, "noisy")


def text_calls(texts, switches=(), guidance=1.0):
    """How often the text embedding and the last layer's cross-attention keys ran in a whole rollout."""
    net, counts = network(), {"embedding": 0, "keys": 0}
    hooks = {"embedding": net.text_embedding, "keys": net.blocks[-1].cross_attn.k}
    for name, module in hooks.items():
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    denoiser = cached(net, WindowOptions(6, 0, 3), 9, texts=texts, guidance=guidance)
    noise = BlockNoise(1, (1, CHANNELS), (4, 6))
    for _ in block_rollout(denoiser, layout(9, 3), levels([1000, 500], 5.0), noise, window=6, switches=switches):
        pass
    return counts


def test_a_prompt_is_embedded_once():
    """Embedding 512 rows and projecting them again at every pass costs more than the attention itself."""
    assert text_calls([prompts()]) == {"embedding": 1, "keys": 1}


def test_every_prompt_of_a_track_is_embedded_once():
    """Once each, and not before its turn; a stale cache would keep the old prompt's keys (count 1)."""
    counts = text_calls([prompts(), prompts(seed=1)], [Switch(6, 1)])
    assert counts == {"embedding": 2, "keys": 2}


def test_each_side_of_guidance_is_embedded_once():
    counts = text_calls([[prompts()], [prompts(seed=1)]], guidance=3.0)
    assert counts == {"embedding": 2, "keys": 2}


def test_padding_rows():
    """The network attends to all 512 rows: shorter text gets zero rows, longer text is cut, neither is masked."""
    text = torch.ones(2, 5, 8)
    padded = pad_rows(text)
    assert padded.shape == (2, 512, 8) and float(padded.sum()) == 80 and torch.equal(padded[:, :5], text)
    assert pad_rows(torch.ones(1, 600, 8)).shape == (1, 512, 8)


def test_padding_is_attended_to():
    """A mask over the padding would make the number of zero rows invisible."""
    net, x = network(), latents(3)
    out = [cached(net, WindowOptions(), 3, texts=[pad_rows(prompts(), rows)])(x, [Level(500.0, 0.5)] * 3, 0, "noisy")
           for rows in (6, 40)]
    assert gap(*out) > 1e-3


def test_timestep_embedding_is_cosines_then_sines():
    ours = timestep_embedding(torch.tensor([833.3333]), 8, torch.float64)
    t = float(torch.tensor(833.3333))
    angles = [t * 10000 ** (-k / 4) for k in range(4)]
    assert ours[0].tolist() == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-9)


def test_unpatchify_has_channels_fastest():
    """Two frames of 2x3 patches, 2x2 pixels each, 5 channels: every number must land on its own pixel."""
    video = torch.arange(2 * 4 * 6 * 5).view(1, 2, 4, 6, 5).float()  # b f h w c
    tokens = video.view(1, 2, 2, 2, 3, 2, 5).permute(0, 1, 2, 4, 3, 5, 6).reshape(1, 12, 20)
    assert torch.equal(unpatchify(tokens, (2, 2, 3), (1, 2, 2), 5), video.permute(0, 4, 1, 2, 3))


def test_timesteps_are_per_frame():
    """One timestep for the whole call (frame 0's) would make mixed calls wrong: a joint pass has several levels."""
    net, x = network(), latents(2)
    same, mixed = ([Level(700.0, 0.7), Level(t, 0.7)] for t in (700.0, 100.0))
    a, b = (cached(net, WindowOptions(block=2), 2)(x, chosen, 0, "noisy") for chosen in (same, mixed))
    assert gap(a[:, :, 1], b[:, :, 1]) > 1e-2


def test_compute_dtype_keeps_the_patch_embedding():
    """As in ComfyUI: the first convolution stays float32 whatever the rest is."""
    net = network(dtype=torch.bfloat16)
    assert {p.dtype for p in net.patch_embedding.parameters()} == {torch.float32}
    assert {p.dtype for name, p in net.named_parameters() if not name.startswith("patch")} == {torch.bfloat16}
