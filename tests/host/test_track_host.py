"""Prompt tracks inside ComfyUI: as conditioning through any guider, equal to the rollout without ComfyUI."""
import comfy.samplers
import pytest
import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import RolloutOptions, levels_from
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import ROLLOUTS, Switch, block_rollout
from forcing_pack.forcing_core.wan import WanConfig, WanModel
from forcing_pack.nodes import host_memory
from forcing_pack.nodes.guiding import ForcingGuider
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.track import ForcingPromptSegment, ForcingPromptTrack
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import TWO_STEPS, basic_guider, guider, plain, relative, run, sample, text
from nodes import ConditioningCombine, ConditioningSetTimestepRange, ConditioningZeroOut

CACHE = WindowOptions(window=6, sink=1, positions="relative")
OPTIONS = RolloutOptions(cache=CACHE)
HOW = CausalSampler(OPTIONS)
SECOND = 1.3  # latent frame 6 of 12


def then(previous, number, start=SECOND, transition="recache", blocks=2):
    return ForcingPromptSegment.execute(previous, text(number), start, transition, blocks).result[0]


def tracked(transition="recache", **settings):
    return then(text(), 1, transition=transition, **settings)


def alone(sides, switches, frames=12, options=OPTIONS, guidance=1.0, seed=3, sigmas=TWO_STEPS):
    """The rollout without ComfyUI. sides: embeddings of every condition, one for every segment."""
    net = WanModel(WanConfig(dim=tiny.DIM, ffn_dim=tiny.FFN_DIM, heads=hostkit.HEADS, layers=tiny.LAYERS))
    net.load_state_dict(hostkit.weights())
    grid = hostkit.SIZE[0] // 2, hostkit.SIZE[1] // 2
    conditions = [Condition([cond[0][0] for cond in side], make_memory(
        options.cache, frames, layers=tiny.LAYERS, grid=grid, head_dim=128, device="cpu")) for side in sides]
    denoiser = NetworkDenoiser(net.eval(), conditions, guidance)
    with torch.no_grad(), hostkit.one_thread():
        parts = [x for _, x in block_rollout(
            denoiser, layout(frames, 3), levels_from(sigmas, "exact"), BlockNoise(seed, (1, tiny.CHANNELS), hostkit.SIZE),
            window=6, switches=switches)]
    return hostkit.comfy.latent_formats.Wan21().process_out(torch.cat(parts, dim=2))


def made(source, how=HOW, frames=12, **settings):
    return sample(source, how, frames, sigmas=TWO_STEPS, **settings)


@pytest.fixture(scope="module")
def without_switch():
    return made(guider(plain(), text()))


@pytest.mark.parametrize("transition, switches", [
    ("recache", [Switch(6, 1)]),
    ("keep", [Switch(6, 1, transition="keep")]),
    ("soft", [Switch(6, 1, transition="soft", previous=0, weight=0.5), Switch(9, 1, transition="keep")]),
    ("flush", [Switch(6, 1, transition="flush")]),
    ("jump", [Switch(6, 1, transition="jump")]),
    ("cut", [Switch(6, 1, transition="cut")]),
])
def test_switching_in_comfyui_equals_the_standalone_rollout(transition, switches, without_switch):
    """Guards the text of a condition staying what ComfyUI encoded it to, which is the first prompt."""
    result = made(guider(plain(), tracked(transition)))
    assert relative(result, alone([[text(), text(1)]], switches)) <= 1e-5
    assert torch.equal(result[:, :, :6], without_switch[:, :, :6])
    assert relative(result[:, :, 6:], without_switch[:, :, 6:]) > 1e-2


def forcing_guider(model, positive):
    return ForcingGuider.execute(model, positive, 1.0).result[0]


@pytest.mark.parametrize("make", [basic_guider, forcing_guider, lambda model, positive: guider(
    model, positive, text(5), kind=comfy.samplers.CFGGuider)], ids=["core's basic", "ours", "core's cfg"])
def test_any_guider_hands_the_track_over(make):
    expected = made(guider(plain(), tracked("cut")))
    assert torch.equal(made(make(plain(), tracked("cut"))), expected)


def test_a_guider_can_be_used_again():
    """Guards state of the last run, which ended with the second prompt."""
    guide = guider(plain(), tracked())
    assert torch.equal(made(guide), made(guide))


def test_guidance_with_a_track_on_both_sides():
    """The negative changes at another time, and its own embedding is used."""
    negative = then(text(5), 6, start=0.5, transition="keep")
    result = made(guider(plain(), tracked(), negative, cfg=3.0))
    sides = [text(), text(), text(1)], [text(5), text(6), text(6)]
    wanted = alone(sides, [Switch(3, 1, transition="keep"), Switch(6, 2)], guidance=3.0)
    assert relative(result, wanted) <= 1e-5


def test_a_negative_without_a_track_keeps_its_prompt():
    result = made(guider(plain(), tracked(), text(5), cfg=3.0))
    assert relative(result, alone([[text(), text(1)], [text(5)]], [Switch(6, 1)], guidance=3.0)) <= 1e-5


def test_batches_share_the_prompts():
    """A prompt of one row serves every sample, as ComfyUI repeats the first one."""
    two, plainly = (made(guider(plain(), positive), batch=2) for positive in (tracked(), text()))
    assert two.shape[0] == 2 and torch.isfinite(two).all()
    assert torch.equal(two[:, :, :6], plainly[:, :, :6])
    assert all(relative(a, b) > 1e-2 for a, b in zip(two[:, :, 6:], plainly[:, :, 6:]))


def test_prompts_of_different_length():
    """Rows are padded where texts are mixed, and taken as they are elsewhere."""
    long = [[torch.randn(1, 600, tiny.TEXT_DIM, generator=torch.Generator().manual_seed(9)), {}]]
    for transition in ("recache", "soft"):
        track = ForcingPromptSegment.execute(text(), long, SECOND, transition, 2).result[0]
        assert torch.isfinite(made(guider(plain(), track))).all()


def test_given_frames_belong_to_the_prompt_that_ruled_there():
    """An extension goes on with the same track: its first change is over, its second still comes."""
    clip = made(guider(plain(), text()), frames=6)
    start = torch.cat([clip, torch.zeros(1, 16, 6, *hostkit.SIZE)], dim=2)
    mask = torch.ones(1, 1, 12, 1, 1)
    mask[:, :, :6] = 0
    three = then(then(text(), 1, 0.3), 2, 2.0, "cut")
    result = made(guider(plain(), three), frames=None, start=start, mask=mask)
    direct = made(guider(plain(), then(text(1), 2, 2.0, "cut")), frames=None, start=start, mask=mask)
    assert torch.equal(result, direct) and result.shape[2] == 12


def test_progress_counts_the_recache():
    clip = run(guider(plain(), tracked()), HOW, 12, sigmas=TWO_STEPS)
    assert clip.ticks[-1][:2] == (4 * 3 - 1 + 1 - 1, 4 * 3 - 1 + 1)
    assert len(run(guider(plain(), tracked("cut")), HOW, 12, sigmas=TWO_STEPS).ticks) == 4 * 3 - 1


@pytest.mark.parametrize("transition, frames", [("recache", 6), ("keep", 3), ("cut", 3)])
def test_the_replay_is_reserved(monkeypatch, transition, frames):
    """ComfyUI is asked for activations of the window where one forward replays it, else of a block."""
    asked = []
    reserving = host_memory._reserving
    monkeypatch.setattr(host_memory, "_reserving", lambda extra, count: asked.append(count) or reserving(extra, count))
    made(guider(plain(), tracked(transition)))
    assert asked == [frames]


# -- refusals: before the network runs ------------------------------------------------------------------------

def refused(match, positive, negative=None, how=HOW, frames=12, cfg=1.0):
    with hostkit.forwards(plain()) as calls, pytest.raises(ForcingError, match=match):
        made(guider(plain(), positive, negative, cfg), how, frames)
    assert calls == []


def test_times_that_do_not_fit_the_video():
    refused("Prompt 2 starts at 9 s, after the last block.*make the video longer", tracked(start=9.0))
    refused("takes 3 blocks, but only 2 come", tracked("soft", blocks=3))


def test_tracks_that_disagree():
    refused("in different ways", tracked("cut"), then(text(5), 6), cfg=3.0)


def test_memories_that_cannot_do_it():
    refused("Set positions to 'relative'", tracked("jump"), how=CausalSampler(RolloutOptions()))


def test_nodes_behind_the_track():
    """ConditioningZeroOut zeroes the first prompt only; the others would come up to full strength."""
    refused("Put that node before Forcing Prompt Segment", ConditioningZeroOut().zero_out(tracked())[0])
    refused("range of steps", ConditioningSetTimestepRange().set_range(tracked(), 0.0, 0.5)[0])


def test_rolling_rollouts_only_replace_the_text():
    if "rolling" not in ROLLOUTS:
        pytest.skip("no rolling rollout in this version")
    from forcing_pack.forcing_core.policies.rolling import RollingOptions

    how = CausalSampler(RolloutOptions(cache=RollingOptions()))
    refused("rolling rollout cannot change prompts by recache", tracked(), how=how)
    kept = made(guider(plain(), tracked("keep")), how)
    assert torch.isfinite(kept).all() and relative(kept, made(guider(plain(), text()), how)) > 1e-3


# -- the nodes ------------------------------------------------------------------------------------------------

class Words:
    """A CLIP whose embedding is the number of the prompt's words."""

    def tokenize(self, prompt):
        return len(prompt.split())

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.full((1, 4, 8), float(tokens)), {"pooled_output": None}]]


def test_script_becomes_conditioning():
    cond, = ForcingPromptTrack.execute(Words(), "0 | one\n0:05 | cut | two words\n10 three words here", "soft", 5).result[0]
    track = cond[1][host_memory.TRACK]
    assert cond[0] is track.segments[0].prompt and cond[0][0, 0, 0] == 1
    assert [(s.start, s.transition, s.blocks, float(s.prompt[0, 0, 0])) for s in track.segments] == [
        (0, "soft", 5, 1), (5, "cut", 5, 2), (10, "soft", 5, 3)]


def test_the_default_script_is_a_good_one():
    script = next(i for i in ForcingPromptTrack.define_schema().inputs if i.id == "script").default
    assert len(ForcingPromptTrack.execute(Words(), script, "recache").result[0][0][1][host_memory.TRACK].segments) == 3


def test_a_chain_equals_a_script():
    chain = then(then(text(), 1, 5.0, "cut"), 2, 10.0, "soft", 6)
    segments = chain[0][1][host_memory.TRACK].segments
    assert [(s.start, s.transition, s.blocks) for s in segments] == [(0, "recache", 4), (5.0, "cut", 2), (10.0, "soft", 6)]
    assert all(torch.equal(s.prompt, text(n)[0][0]) for n, s in enumerate(segments))
    assert host_memory.TRACK not in text()[0][1]  # the prompt that went in is as it was


def test_a_script_can_be_continued_by_segments():
    script = ForcingPromptTrack.execute(Words(), "0 | one\n5 | two words", "recache").result[0]
    longer = ForcingPromptSegment.execute(script, [[torch.zeros(1, 4, 8), {}]], 8.0, "cut").result[0]
    assert [s.start for s in longer[0][1][host_memory.TRACK].segments] == [0, 5, 8.0]
    assert len(script[0][1][host_memory.TRACK].segments) == 2


@pytest.mark.parametrize("make, words", [
    (lambda: then(tracked(), 2, 1.0), "Prompt 3 starts at 1 s, before prompt 2"),
    (lambda: then(text(), 1, 0.0), "Prompts 1 and 2 both start at 0 s"),
    (lambda: ForcingPromptSegment.execute(text(), tracked(), 5.0, "cut"), "conditioning is a prompt track already"),
    (lambda: ForcingPromptSegment.execute(text(), ConditioningCombine().combine(text(), text(1))[0], 5.0, "cut"),
     "conditioning consists of 2 combined prompts"),
    (lambda: ForcingPromptSegment.execute(text(), [[text(1)[0][0], {"area": (1, 2)}]], 5.0, "cut"), "carries area"),
    (lambda: ForcingPromptTrack.execute(None, "0 | a", "cut"), "There is no text encoder"),
    (lambda: ForcingPromptTrack.execute(Words(), "0 | a\n2 | fade | b", "cut"), "Line 2: 'fade' is not a transition"),
])
def test_nodes_refuse(make, words):
    with pytest.raises(ForcingError, match=words):
        make()
