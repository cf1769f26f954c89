"""Image-to-video, Fun and camera models under causal rollouts: channels, CLIP images and rays cut by forward; knots in them."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.nodes.knot import CAUSAL, PINS, ForcingKnot
from forcing_testkit import densekit, hostkit, tiny
from forcing_testkit.hostkit import SIZE, TWO_STEPS, guider, plain, sample, sampler, text

FRAMES, CHANNELS = 9, 16
EXACT = {"block": 3, "noise": "comfy"}  # with which the time embedding is computed as ComfyUI computes it


def image_parts(draw):
    """What an I2V network has more: the projection of CLIP features, keys and values of the image in every layer."""
    square = (tiny.DIM, tiny.DIM)
    shapes = {"img_emb.proj.0.weight": (1280,), "img_emb.proj.0.bias": (1280,), "img_emb.proj.1.weight": (1280, 1280),
              "img_emb.proj.1.bias": (1280,), "img_emb.proj.3.weight": (tiny.DIM, 1280), "img_emb.proj.3.bias": (tiny.DIM,),
              "img_emb.proj.4.weight": (tiny.DIM,), "img_emb.proj.4.bias": (tiny.DIM,)}
    for layer in range(tiny.LAYERS):
        for name in ("k_img", "v_img"):
            shapes |= {f"blocks.{layer}.cross_attn.{name}.weight": square, f"blocks.{layer}.cross_attn.{name}.bias": square[:1]}
        shapes[f"blocks.{layer}.cross_attn.norm_k_img.weight"] = square[:1]
    return {name: tiny._values(name, shape, draw) for name, shape in shapes.items()}


def state(channels, image):
    draw = torch.Generator().manual_seed(8)
    made = {**hostkit.weights(), **(image_parts(draw) if image else {})}
    return made | {"patch_embedding.weight": tiny._values("x.weight", (tiny.DIM, channels, 1, 2, 2), draw)}


def camera_state():
    draw, widths = torch.Generator().manual_seed(9), (tiny.DIM, tiny.DIM, 3, 3)
    shapes = {"conv.weight": (tiny.DIM, 24 * 64, 2, 2), "conv.bias": (tiny.DIM,)}
    for name in ("conv1", "conv2"):
        shapes |= {f"residual_blocks.0.{name}.weight": widths, f"residual_blocks.0.{name}.bias": (tiny.DIM,)}
    return state(32, True) | {f"control_adapter.{name}": tiny._values(name, shape, draw) for name, shape in shapes.items()}


# kind -> (weights, what a conditioning node sets besides the prompt, names of those that ComfyUI's forward gets)
MODELS = {
    "i2v": (lambda: state(36, True), lambda: {**start(), "clip_vision_output": Clip()}, ("clip_fea",)),
    "i2v without CLIP": (lambda: state(36, True), lambda: start(), ()),
    "control channels": (lambda: state(36, False), lambda: start(), ()),
    "camera": (camera_state, lambda: {**start(), "clip_vision_output": Clip(), "camera_conditions": rays()},
               ("clip_fea", "camera_conditions")),
}


class Clip:
    penultimate_hidden_states = torch.randn(1, 5, 1280, generator=torch.Generator().manual_seed(70))


def start(frames=FRAMES, given=4):
    """Keys that WanImageToVideo sets, with values in every frame so that a slice of another place shows."""
    image = torch.randn(1, CHANNELS, FRAMES, *SIZE, generator=torch.Generator().manual_seed(71))
    mask = torch.ones(1, 1, FRAMES, *SIZE)
    mask[:, :, :given] = 0
    return {"concat_latent_image": image[:, :, :frames], "concat_mask": mask[:, :, :frames]}


def rays(frames=FRAMES):
    draw = torch.Generator().manual_seed(72)
    return torch.randn(1, 24, FRAMES, SIZE[0] * 8, SIZE[1] * 8, generator=draw)[:, :, :frames]


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    """(model, conditioning values, names of ComfyUI's forward)"""
    make, values, names = MODELS[request.param]
    return hostkit.load(make()), values(), names


def whole(model, values, names):
    """What ComfyUI hands to its forward for the whole video."""
    noise = torch.zeros(1, CHANNELS, FRAMES, *SIZE)
    made = model.model.extra_conds(noise=noise, device="cpu", **{**values, "concat_latent_image":
                                                                 values["concat_latent_image"].clone()})
    return {"context": text()[0][0], **{name: made[name].cond for name in ("c_concat", *names)}}


def first_frames(given, frames):
    return {name: value[:, :, :frames] if name in ("c_concat", "camera_conditions") else value
            for name, value in given.items()}


def conditions(values):
    """ComfyUI scales the latents in place, so every run gets copies."""
    return [[text()[0][0], {name: value.clone() if torch.is_tensor(value) else value for name, value in values.items()}]]


def test_a_rollout_equals_the_stock_model_under_a_dense_mask(kind, monkeypatch):
    model, values, names = kind
    seen = densekit.watch_forwards(monkeypatch)
    sample(guider(model, conditions(values)), sampler(**EXACT), FRAMES, sigmas=TWO_STEPS)
    given = whole(model, values, names)
    assert densekit.largest_gap(model, seen, given, first_frames) <= 1e-5
    for name in ("c_concat", *names):  # each of them matters
        other = {**given, name: -given[name]}
        assert densekit.largest_gap(model, seen, other, first_frames) > 1e-4, name


def test_the_first_block_needs_only_its_own_conditioning(kind):
    model, values, _ = kind
    short = {name: value[:, :, :3] if torch.is_tensor(value) else value for name, value in values.items()}
    long = sample(guider(model, conditions(values)), sampler(), FRAMES, sigmas=TWO_STEPS)
    assert torch.equal(long[:, :, :3], sample(guider(model, conditions(short)), sampler(), 3, sigmas=TWO_STEPS))


def test_a_negative_prompt_with_conditioning_of_its_own(kind):
    """Guards against slices and CLIP images that are handed to the other side of guidance."""
    model, values, _ = kind
    other = {name: -value if torch.is_tensor(value) and name != "concat_mask" else value for name, value in values.items()}
    made = {cfg: sample(guider(model, conditions(values), conditions(other), cfg=cfg), sampler(), 3, sigmas=(1.0, 0.0))
            for cfg in (1.0, 2.0)}
    alone = sample(guider(model, conditions(other)), sampler(), 3, sigmas=(1.0, 0.0))
    assert hostkit.relative(made[2.0], 2 * made[1.0] - alone) < 1e-4


# -- knots -----------------------------------------------------------------------------------------------------

def seen_by(model):
    """Inputs of the network, from now on."""
    made = []
    hook = model.model.diffusion_model.patch_embedding.register_forward_pre_hook(lambda module, args: made.append(args[0]))
    return made, hook


def knotted(knot=1, reference=None, cache=None, **options):
    how = sampler(**({} if cache is None else {"cache": cache}))
    return ForcingKnot.execute(how, knot, reference=reference, **options).result[0]


def test_a_knot_is_told_in_the_channels_of_given_frames():
    """Mask 1 and the knot's latents in its frames, in denoising steps and in the clean pass; elsewhere the image's own."""
    model = hostkit.load(state(36, True))
    inputs, hook = seen_by(model)
    sample(guider(model, conditions(start(given=1))), knotted(2), 6, sigmas=TWO_STEPS)
    hook.remove()
    assert [x.shape[2] for x in inputs] == [5, 5, 3, 5, 5]
    knot = inputs[3][:, :16, :2]
    for x in inputs[3:]:
        assert torch.equal(x[:, :16, :2], knot) and torch.equal(x[:, 20:, :2], knot) and (x[:, 16:20, :2] == 1).all()
        assert (x[:, 16:20, 2:] == 0).all()
    given = whole(model, start(given=1), ())["c_concat"]
    assert torch.equal(inputs[0][:, 16:], given[:, :, :5]) and torch.equal(inputs[3][:, 16:, 2:], given[:, :, 5:8])


@pytest.mark.parametrize("pin", PINS)
def test_the_knot_is_pinned_over_comfyui(pin):
    """And the emitted frames are as many as were asked for, whatever the window."""
    inputs, hook = seen_by(plain())
    cache = WindowOptions(window=6, sink=0, positions="relative")
    made = sample(plain(), knotted(1, cache=cache, pin=pin), 12, sigmas=TWO_STEPS)
    hook.remove()
    assert made.shape[2] == 12 and torch.isfinite(made).all()
    noisy = [x for x in inputs if x.shape[2] == 4]
    assert len(noisy) == 8 and len(inputs) == 11
    for first, second in zip(noisy[2::2], noisy[3::2]):
        assert torch.equal(first[:, :, 0], second[:, :, 0]) and not torch.equal(first[:, :, 1:], second[:, :, 1:])


def test_a_knot_of_zero_and_no_reference_change_nothing():
    assert torch.equal(sample(plain(), knotted(0), 6, sigmas=TWO_STEPS), sample(plain(), sampler(), 6, sigmas=TWO_STEPS))


def test_a_reference_over_comfyui(monkeypatch):
    """A picture's latent, given in the graph's scale: written first, seen by all blocks, in a batch too; bytes announced."""
    picture = {"samples": torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(3))}
    cache = WindowOptions(window=6, sink=0, positions="relative")
    seen = densekit.watch_forwards(monkeypatch)
    run = hostkit.run(plain(), how := knotted(1, picture, cache), 9, sigmas=TWO_STEPS, batch=2)
    assert run.ticks[-1][0] + 1 == run.ticks[-1][1] == len(seen) == 9
    scaled = plain().model.process_latent_in(picture["samples"].unsqueeze(2))
    assert seen[0][0] == "clean" and torch.equal(seen[0][3], scaled.expand(2, -1, -1, -1, -1))
    assert how.rollout.cache.references == 1 and how.rollout.cache.window == 6
    without = sample(plain(), knotted(1, cache=cache), 9, sigmas=TWO_STEPS, batch=2)
    assert all(hostkit.relative(run.latents[:, :, f], without[:, :, f]) > 1e-3 for f in range(9))


@pytest.mark.parametrize(("make", "match"), [
    (lambda: ForcingKnot.execute(object(), 1), "Connect the SAMPLER of Forcing Preset"),
    (lambda: knotted(4), "longer than a block of 3"),
    (lambda: knotted(1, {"samples": torch.zeros(1, 16, 1)}), "no latent of a picture"),
    (lambda: sample(plain(), knotted(1, {"samples": torch.zeros(1, 16, 8, 8)}), 6), "Encode the reference picture at that"),
    (lambda: sample(plain(), knotted(1), 6, sigmas=(0.5, 0.25, 0.0)), "a knot needs whole SIGMAS"),
    (lambda: ForcingKnot.execute(sampler(noise="comfy"), 1, pin=CAUSAL), "Set noise to 'per block'"),
])
def test_what_cannot_be_knotted_is_refused(make, match):
    with pytest.raises(ForcingError, match=match):
        make()
