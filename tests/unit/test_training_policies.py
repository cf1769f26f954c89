"""Which cache policies a self-rollout can be trained with: those that it follows; the others are refused by name."""
import pytest
import torch
from forcing_pack.forcing_core.denoiser import Condition
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import KINDS, DeepSinkOptions, ReferenceOptions, WindowOptions
from forcing_pack.forcing_core.rollout import ROLLOUTS
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.standalone import make_denoiser
from forcing_pack.forcing_core.training.self_rollout import LiveDenoiser, self_rollout
from forcing_pack.forcing_core.wan import TextState, WanConfig
from forcing_pack.forcing_core.wan.random import random_network, random_prompt
from forcing_testkit.forcing_corekit import gap

CONFIG = WanConfig(dim=256, ffn_dim=64, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=32, text_len=8)
SIZE, FRAMES = (4, 4), 10
LEVELS, NOISE = levels([1000, 500], 5.0), BlockNoise(3, (1, 4), SIZE)
FOLLOWED = {
    "window": WindowOptions(6, 2, 2, "relative"),
    "window, jitter": WindowOptions(6, 2, 2, "relative", jitter=0.8),
    "deep_sink": DeepSinkOptions(8, 4, 2),
    "reference": ReferenceOptions(6, 2, 2, "rebased", 7),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def rolled(options):
    """Latents of a self-rollout with gradients, from an empty store."""
    net = random_network(CONFIG, 0).requires_grad_(True)
    return self_rollout(net, layout(FRAMES, options.block), LEVELS, NOISE, TextState(random_prompt(CONFIG, 1)),
                        len(LEVELS) - 1, cache=options)


def inferred(options):
    """Latents of the same video as inference makes it."""
    target = make_denoiser(random_network(CONFIG, 0), options, FRAMES, SIZE, [random_prompt(CONFIG, 1)])
    parts = ROLLOUTS[options.rollout](target, layout(FRAMES, options.block), LEVELS, NOISE, block=options.block)
    return torch.cat([latents for _, latents in parts], dim=2)


@pytest.mark.parametrize("options", FOLLOWED.values(), ids=list(FOLLOWED))
def test_what_is_trained_is_what_will_run(options):
    latents = rolled(options)
    assert latents.requires_grad and gap(latents.detach(), inferred(options)) <= 1e-4


@pytest.mark.parametrize("kind", sorted({*KINDS} - {name.split(",")[0] for name in FOLLOWED}))
def test_every_other_policy_is_refused_by_name(kind):
    """Their passes have attention or storage of their own, or their forwards another order: without this they would be
    trained as a window, silently."""
    options, policy = KINDS[kind]
    message = f"{policy.__name__} cannot be trained by self-rollout.*with the cache policy window"
    with pytest.raises(ForcingError, match=message):
        rolled(options())


def test_a_denoiser_that_is_kept_refuses_too():
    options, policy = KINDS["recency"]
    memory = make_memory(options(), FRAMES, layers=2, grid=(2, 2), head_dim=128, device="cpu")
    with pytest.raises(ForcingError, match=policy.__name__):
        LiveDenoiser(random_network(CONFIG, 0), [Condition([random_prompt(CONFIG, 1)], memory)])
