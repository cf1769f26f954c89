"""Prompt tracks: times, schedules, what each transition does to text and memory, and tracks from text."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import Block, Call, layout
from forcing_pack.forcing_core.policies import WindowOptions, build
from forcing_pack.forcing_core.rollout import Switch, block_rollout
from forcing_pack.forcing_core.rollout.transitions import check_switches, fresh_starts, replays
from forcing_pack.forcing_core.schedule import clean, levels
from forcing_pack.forcing_core.track import Segment, Track, frame_at, schedule, start_seconds
from forcing_pack.forcing_core.track_files import read_jsonl, read_script, read_track
from forcing_pack.forcing_core.wan.text import blended
from forcing_testkit.forcing_corekit import CHANNELS, FakeDenoiser, Recorder, cached, gap, latents, network, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

ONE, TWO = levels([1000], 5.0), levels([1000, 500], 5.0)
RELATIVE = WindowOptions(window=6, sink=1, positions="relative")
SIZE = (4, 6)
pytestmark = pytest.mark.usefixtures("one_thread")


def track(*entries):
    """Entries are (start, transition), soft ones with a number of blocks; prompts are their numbers."""
    return Track(tuple(Segment(start, number, *rest) for number, (start, *rest) in enumerate(entries)))


def noise(seed=3):
    return BlockNoise(seed, (1, CHANNELS), SIZE)


# -- times ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, frame", [(0, 0), (1 / 16, 1), (0.1, 2), (5 / 16, 2), (5, 21), (5.0625, 21), (10, 41),
                                            (0.3125 + 1e-9, 2), (60, 241)])
def test_first_frame_at_a_time(seconds, frame):
    """Latent frame f starts at pixel frame 1 + 4(f - 1): 21 frames are a little more than 5 s."""
    assert frame_at(seconds) == frame


@settings(deadline=None)
@given(st.floats(0.001, 4000))
def test_times_are_rounded_up_and_never_by_a_whole_frame(seconds):
    frame = frame_at(seconds)
    assert start_seconds(frame) >= seconds - 1e-6
    assert start_seconds(frame - 1) < seconds


@given(st.integers(0, 20000))
def test_every_frame_is_found_at_its_own_start(frame):
    assert frame_at(start_seconds(frame)) == frame


@pytest.mark.parametrize("make, words", [
    (lambda: Track(()), "at least one prompt"),
    (lambda: track((1,)), "first prompt starts at 1 s.*start at 0"),
    (lambda: track((0,), (5,), (5,)), "Prompts 2 and 3 both start at 5 s"),
    (lambda: track((0,), (5,), (4,)), "Prompt 3 starts at 4 s, before prompt 2"),
    (lambda: track((0,), (5, "fade")), "'fade' is not a transition. Use one of recache, keep, soft"),
    (lambda: track((0,), (5, "soft", 1)), "at least 2 blocks, or the transition keep"),
    (lambda: track((0,), (float("nan"),)), "cannot start at nan"),
    (lambda: Segment(2.5, 0, frames=True), "cannot start at 2.5.*whole latent frame"),
])
def test_impossible_tracks(make, words):
    with pytest.raises(ForcingError, match=words):
        make()


# -- schedules ------------------------------------------------------------------------------------------------

def laid(what, frames=42, size=3, start=0):
    """[(frame, segment, transition)] of one track over a video."""
    made = schedule([what], layout(frames - start, size, given=start), block=size)
    return [(s.at, s.segment, s.transition) for s in made.switches], made


def test_a_prompt_rules_from_the_next_block_on():
    """5 s is frame 21, a block's edge; 5.1 s is frame 22 and waits for 24."""
    assert laid(track((0,), (5,)))[0] == [(21, 1, "recache")]
    assert laid(track((0,), (5.1, "cut")))[0] == [(24, 1, "cut")]
    assert laid(track((0,), (5.1, "keep")), size=1)[0] == [(22, 1, "keep")]


def test_official_switch_frames_are_rounded_as_longlive_does():
    """40 -> 42 with blocks of 3."""
    made = Track((Segment(0, "a", frames=True), Segment(40, "b", frames=True)))
    assert laid(made, 60)[0] == [(42, 1, "recache")]


def test_a_soft_transition_is_a_row_of_mixtures():
    switches = schedule([track((0,), (5, "soft", 4))], layout(42, 3)).switches
    assert [(s.at, s.transition, s.weight) for s in switches] == [
        (21, "soft", 0.25), (24, "soft", 0.5), (27, "soft", 0.75), (30, "keep", 1.0)]
    assert {(s.previous, s.segment) for s in switches[:-1]} == {(0, 1)}


def test_changes_inside_given_frames_are_over():
    """The run starts with the prompt that ruled there; a change at the joint is carried out."""
    switches, made = laid(track((0,), (2, "cut"), (5,), (8,)), start=21)
    assert switches == [(21, 1, "recache"), (33, 2, "recache")]
    assert made.rows == ((1,), (2,), (3,))
    assert laid(track((0,), (0.2, "cut")), 7, 1, start=1)[0] == [(2, 1, "cut")]  # behind a start image


def test_two_tracks_share_their_segments():
    positive, negative = track((0,), (5,), (8, "cut")), track((0,), (3, "keep"), (8, "keep"))
    made = schedule([positive, negative], layout(42, 3))
    assert made.rows == ((0, 0), (0, 1), (1, 1), (2, 2))
    assert [(s.at, s.segment, s.transition) for s in made.switches] == [(15, 1, "keep"), (21, 2, "recache"), (33, 3, "cut")]
    assert made.prompts(0, positive) == (0, 0, 1, 2) and made.prompts(1, negative) == (0, 1, 1, 2)


def test_no_track_is_no_switch():
    assert schedule([], layout(6, 3)).switches == () and laid(track((0,)))[0] == []


@pytest.mark.parametrize("what, words", [
    (track((0,), (10.2,)), r"Prompt 2 starts at 10.2 s, after the last block.*9.56 s, latent frame 39 of 42.*longer"),
    (track((0,), (5,), (5.1,), (5.2,)), r"Prompts 3 and 4 start in the same block \(latent frame 24\).*6.56 s"),
    (track((0,), (9.4,), (9.5,)), "Prompts 2 and 3 start in the same block.*Remove one of them"),
    (track((0,), (5, "soft", 5), (8,)), "takes 5 blocks, but only 4 come.*at most 4 blocks"),
    (track((0,), (9.5, "soft", 2)), "only 1 come.*the transition keep"),
])
def test_schedules_that_do_not_fit(what, words):
    with pytest.raises(ForcingError, match=words):
        laid(what)


@pytest.mark.parametrize("frames", [42, 402, 4002])
def test_the_time_in_the_message_works(frames):
    """Rounded up, it would be refused again."""
    with pytest.raises(ForcingError, match="after the last block") as error:
        laid(track((0,), (5000,)), frames)
    named = float(str(error.value).split("(")[1].split(" s")[0])
    assert laid(track((0,), (named,)), frames)[0] == [(frames - 3, 1, "recache")]


def test_tracks_that_disagree():
    """They share one memory; 'keep' demands nothing of it."""
    with pytest.raises(ForcingError, match=r"change at 5 s in different ways \(cut and recache\)"):
        schedule([track((0,), (5,)), track((0,), (5, "cut"))], layout(42, 3))


def test_a_soft_transition_of_one_track_is_not_interrupted_by_the_other():
    with pytest.raises(ForcingError, match="only 2 come"):
        schedule([track((0,), (5, "soft", 4)), track((0,), (6.5, "keep"))], layout(42, 3))


def test_rolling_rollouts_only_replace_the_text():
    policy = build(RELATIVE, 42)
    check_switches([Switch(21, 1, transition="keep")], policy, "rolling")
    with pytest.raises(ForcingError, match="rolling rollout cannot change prompts by cut, recache.*as many blocks as there "
                                           "are steps.*keep"):
        check_switches([Switch(9, 1), Switch(21, 1, transition="cut")], policy, "rolling")


class Merged:
    """A policy whose store holds more than frames."""

    keys = None


@pytest.mark.parametrize("kind", ["flush", "jump"])
def test_memories_that_cannot_be_flushed_say_so(kind):
    with pytest.raises(ForcingError, match="memory of Merged cannot be flushed"):
        check_switches([Switch(9, 1, transition=kind)], Merged(), "block")
    check_switches([Switch(9, 1, transition="cut")], Merged(), "block")


def test_a_jump_needs_movable_keys():
    with pytest.raises(ForcingError, match="Set positions to 'relative'"):
        check_switches([Switch(9, 1, transition="jump")], build(WindowOptions(window=6), 42), "block")


# -- transitions ----------------------------------------------------------------------------------------------

def events(switches, frames=12, **settings_):
    denoiser = Recorder(FakeDenoiser())
    list(block_rollout(denoiser, layout(frames, 3), ONE, noise(), window=6, switches=switches, **settings_))
    return denoiser.events


@pytest.mark.parametrize("kind, expected", [
    ("recache", [("text", 1), ("recache", 0, 6)]),
    ("keep", [("text", 1)]),
    ("soft", [("blend", 0, 1, 0.5)]),
    ("flush", [("flush", 2), ("text", 1)]),
    ("jump", [("flush", 2), ("text", 1), ("jump", 6, 42)]),
    ("cut", [("forget",), ("text", 1)]),
])
def test_what_a_transition_asks_for(kind, expected):
    """Between the old block's clean pass, under the old prompt, and the first step of the new one."""
    seen = events([Switch(6, 1, transition=kind, weight=0.5)])
    assert seen == [("noisy", 0, 3), ("clean", 0, 3), ("noisy", 3, 3), ("clean", 3, 3), *expected,
                    ("noisy", 6, 3), ("clean", 6, 3), ("noisy", 9, 3)]


@pytest.mark.parametrize("kind, replayed", [("cut", ("recache", 6, 3)), ("flush", ("recache", 4, 5)),
                                            ("keep", ("recache", 3, 6))])
def test_a_recache_does_not_bring_back_what_was_forgotten(kind, replayed):
    assert replayed in events([Switch(6, 1, transition=kind), Switch(9, 2)])


def test_counted_forwards():
    """What a progress bar adds for switches."""
    switches = [Switch(0, 1), Switch(3, 1), Switch(6, 2, transition="cut"), Switch(9, 3)]
    assert replays(switches) == sum(1 for e in events(switches) if e[0] == "recache") == 2
    blocks, denoiser = layout(12, 3), Recorder(FakeDenoiser())
    list(block_rollout(denoiser, blocks, ONE, noise(), first_levels=TWO, switches=switches, window=6))
    noisy = [e for e in denoiser.events if e[0] == "noisy"]
    assert [e[1] for e in noisy] == [0, 0, 3, 6, 6, 9]  # the list for blocks without memory, after a cut too
    assert fresh_starts(switches, blocks) == 1


@pytest.fixture(scope="module")
def net():
    return network()


def video(net, options, kind=None, frames=15, at=9, texts=None, look=None, **switch):
    """Latents of a rollout with one change of prompt. look(denoiser, block) is called behind every block."""
    denoiser = cached(net, options, frames, texts=texts or [prompts(), prompts(seed=1)])
    switches = [Switch(at, 1, transition=kind, **switch)] if kind else []
    parts = []
    for block, x in block_rollout(denoiser, layout(frames, 3), ONE, noise(), window=options.window, switches=switches):
        parts.append(x)
        if look:
            look(denoiser, block)
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("kind, weight", [("keep", 1.0), ("soft", 0.25)])
def test_only_the_text_changes(net, kind, weight):
    """Against forwards made by hand, the second text put in their place."""
    denoiser, texts = cached(net, RELATIVE, 9), (prompts(), prompts(seed=1))
    wanted = []
    for block in layout(9, 3):
        if block.first == 6:
            denoiser.conditions[0].prompts = [torch.lerp(*texts, weight)]
            denoiser.replace_text(0)
        wanted.append(denoiser(noise().initial(block), ONE * 3, block.first, "noisy"))
        denoiser(wanted[-1], (clean(0.0),) * 3, block.first, "clean")
    made = video(net, RELATIVE, kind, 9, 6, list(texts), weight=weight)
    assert gap(made, torch.cat(wanted, dim=2)) <= 1e-6
    assert gap(made, video(net, RELATIVE, None, 9)) > 1e-2


@pytest.mark.parametrize("options", [RELATIVE, WindowOptions(window=6, sink=1),
                                     WindowOptions(window=9, sink=5, positions="rebased", limit=11)])
def test_after_a_cut_a_scene_is_a_video_of_its_own(net, options):
    """Same noise, same prompt, an empty memory at frame 0: only distances in time count, so the result is the same."""
    class Later:
        def initial(self, block):
            return noise().initial(Block(block.index + 3, block.first + 9, block.frames))

        def renoise(self, block, step):
            raise AssertionError("one step draws nothing more")

    alone = cached(net, options, 24, texts=[prompts(seed=1)])
    wanted = torch.cat([x for _, x in block_rollout(alone, layout(15, 3), ONE, Later())], dim=2)
    made = video(net, options, "cut", 24)
    assert gap(made[:, :, 9:], wanted) <= 1e-4
    assert gap(made[:, :, 9:], video(net, options, "recache", 24)[:, :, 9:]) > 1e-2


def test_a_flush_leaves_sink_and_newest_frames_and_nothing_reads_the_rest(net):
    """Dropped slots are poisoned: a number out of them would make NaNs of everything."""
    held = {}

    def look(denoiser, block):
        store = denoiser.conditions[0].memory.store
        held[block.first] = store.frames
        if block.first == 9:
            for data in store._data:
                for slot in set(range(store.capacity)) - set(store.slots.values()):
                    for buffer in (data.v, data.raw, data.roped):
                        buffer[:, slot] = torch.nan

    made = video(net, RELATIVE, "flush", look=look)
    # the block stands in the store while it is denoised
    assert held[6] == (0, 4, 5, 6, 7, 8) and held[9] == (0, 7, 8, 9, 10, 11)
    wide = WindowOptions(window=12, sink=1, positions="relative")
    video(net, wide, "flush", look=look)
    assert held[6] == tuple(range(9)) and held[9] == (0, 7, 8, 9, 10, 11)
    assert torch.isfinite(made).all()
    assert torch.isfinite(video(net, wide, "flush", look=look)).all()
    assert gap(video(net, wide, "flush"), video(net, wide, "keep")) > 1e-3


def plans(net, options, kind, frames=15, at=9):
    """{(phase, first): (read, positions, query)} of a rollout with one change of prompt."""
    seen = {}
    denoiser = cached(net, options, frames)
    memory = denoiser.conditions[0].memory
    begin = memory.begin

    def noted(first, count, phase, sigma):
        made = begin(first, count, phase, sigma)
        seen[phase, first] = made.plan.read, made.plan.positions, made.plan.query
        return made

    memory.begin = noted
    list(block_rollout(denoiser, layout(frames, 3), ONE, noise(), window=options.window,
                       switches=[Switch(at, 0, transition=kind)]))
    return seen


@pytest.mark.parametrize("window", [6, 9, 12])
def test_positions_of_infinity_rope(net, window):
    """Behind a flush: memory, then the block, without a gap whatever the window. Behind a jump: the block, and it
    alone, 42 positions on (45-47 behind a memory at 0-2)."""
    options = WindowOptions(window=window, sink=1, positions="relative")
    flushed, jumped, kept = (plans(net, options, kind) for kind in ("flush", "jump", "keep"))
    for phase in ("noisy", "clean"):
        read, positions, query = flushed[phase, 9]
        start = positions[0]
        assert read == (0, 7, 8, 9, 10, 11)
        assert [p - start for p in positions] == list(range(6)) and [p - start for p in query] == [3, 4, 5]
        read, positions, query = jumped[phase, 9]
        assert [p - start for p in positions] == [0, 1, 2, 45, 46, 47] and [p - start for p in query] == [45, 46, 47]
    assert jumped["noisy", 12] == flushed["noisy", 12]
    if window == 6:
        assert flushed["noisy", 9][1] == (0, 1, 2, 3, 4, 5)
        assert flushed["noisy", 9] == (kept["noisy", 9][0], *kept["noisy", 9][1:])  # 6 frames hold no more anyway


def test_a_jump_is_undone_for_the_blocks_after_it(net):
    """Rotated keys kept along (and turned back) and keys rotated at every read must agree."""
    made = [video(net, WindowOptions(window=9, sink=1, positions="relative", compact=compact), "jump", 18, 9)
            for compact in (False, True)]
    assert gap(*made) <= 1e-4
    assert gap(made[0], video(net, WindowOptions(window=9, sink=1, positions="relative"), "flush", 18, 9)) > 1e-3


def test_the_new_scene_has_a_sink_of_its_own():
    """A recache that starts with the scene rewrites its sink; one that starts later keeps it, as at frame 0."""
    policy = build(WindowOptions(window=9, sink=3), 60)
    whole = policy.plan(Call(30, 6, "recache", tuple(range(30, 36))))
    assert whole.write == tuple(range(30, 36))
    later = policy.plan(Call(33, 9, "recache", (30, 31, 32, *range(36, 42))))
    assert later.write == tuple(range(36, 42))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_different_length_mix(dtype):
    """The shorter one ends in zero rows, as every padded prompt does."""
    a, b = torch.ones(1, 2, 3, dtype=dtype), 3 * torch.ones(1, 4, 3, dtype=dtype)
    mixed = blended(a, b, 0.25)
    assert mixed.dtype == dtype and mixed[0, :, 0].tolist() == [1.5, 1.5, 0.75, 0.75]
    assert torch.equal(blended(b, a, 0.75), mixed)
    assert torch.equal(blended(a, b, 1.0), b)


def test_guided_rollouts_change_both_memories(net):
    """Every condition has a memory of its own; one that kept its old frames would pull the picture back."""
    texts = [[prompts(), prompts(seed=1)], [prompts(seed=2)]]
    for kind, left in (("flush", (0, 7, 8, 9, 10, 11)), ("cut", (9, 10, 11))):
        denoiser = cached(net, WindowOptions(window=12, sink=1), 12, texts=texts, guidance=3.0)
        list(block_rollout(denoiser, layout(12, 3), ONE, noise(), switches=[Switch(9, 1, transition=kind)]))
        assert [c.memory.store.frames for c in denoiser.conditions] == [left, left]


def test_context_is_forgotten_too(net):
    denoiser = cached(net, WindowOptions(), 9)
    list(block_rollout(denoiser, layout(3, 3, given=6), ONE, noise(), context=latents(6),
                       switches=[Switch(6, 0, transition="cut")]))
    assert denoiser.conditions[0].memory.store.frames == (6, 7, 8)


# -- tracks from text -----------------------------------------------------------------------------------------

def test_plain_script():
    made = read_script("# a story\n0:00 a cat sits on a wall\r\n\n10 | it jumps down\n20.5s | CUT | a dog: 3 bones\n"
                       "1:00 | soft 6 | the dog runs\n1:02:03 | soft | x\n", "keep", 5)
    assert [(s.seconds, s.prompt, s.transition, s.blocks) for s in made.segments] == [
        (0, "a cat sits on a wall", "keep", 5), (10, "it jumps down", "keep", 5), (20.5, "a dog: 3 bones", "cut", 5),
        (60, "the dog runs", "soft", 6), (3723, "x", "soft", 5)]


def test_latent_frames_in_a_script():
    made = read_script("0f | a\n40f | b")
    assert [(s.frame, s.time) for s in made.segments] == [(0, "latent frame 0"), (40, "latent frame 40")]
    assert laid(made, 60)[0] == [(42, 1, "recache")]


@pytest.mark.parametrize("text, words", [
    ("", "script is empty"),
    ("0 | a\n\n\nb without a time", "Line 4: 'b without a time' does not begin with a time. Write for example 5 |"),
    ("0 | a\n5 | fade | b", "Line 2: 'fade' is not a transition. Use one of recache"),
    ("0 | a\n5 | cut 3 | b", "Line 2: 'cut 3' is not a transition"),
    ("0 | a\n5 | soft six | b", "Line 2: 'soft six' is not a transition"),
    ("0 | a\n5 | soft 1 | b", "Line 2: A soft transition over 1 blocks"),
    ("0 | a\n5 |", "Line 2: There is no prompt behind the time"),
    ("0 | a\n5 | cut | b | c", "Line 2: More than a time, a transition and a prompt"),
    ("0 | a\n0:75 b", "Line 2: '0:75' is not a time"),
    ("3 | a", "Line 1: The first prompt starts at 3 s"),
    ("0 | a\n# b\n5 | b\n5 | c", "Line 4: Prompts 2 and 3 both start at 5 s"),
    ("0 | a\n5 | b\n4 | c", "Line 3: Prompt 3 starts at 4 s, before prompt 2"),
    ('{"prompts": ["a"]}\n{"prompts": ["b"]}', "holds 2 JSON lines"),
])
def test_broken_scripts_name_the_line(text, words):
    with pytest.raises(ForcingError, match=words):
        read_track(text)


def test_official_jsonl():
    """The frames stand in the configuration, the same for all lines."""
    text = '{"prompts": ["a", "b", "c"]}\n\n{"prompts": ["d", "e", "f"], "seed": 1}\n'
    for frames in ("40, 80", [40, 80]):
        one, other = read_jsonl(text, frames)
        assert one.prompts == ("a", "b", "c") and other.prompts == ("d", "e", "f")
        assert laid(one, 120)[0] == [(42, 1, "recache"), (81, 2, "recache")]
    single, = read_jsonl('{"prompts": ["a", "b"]}', 40)
    assert [s.frame for s in single.segments] == [0, 40]


def test_a_line_that_brings_its_own_frames():
    made = read_track('{"prompts": ["a", "b"], "switch_frame_indices": "40"}', "cut")
    assert laid(made, 60)[0] == [(42, 1, "cut")]


@pytest.mark.parametrize("text, frames, words", [
    ("\n", "40", "file of prompts is empty"),
    ('{"prompts": ["a", "b"]}\n{"prompts": ["a", ]}', "40", r"Line 2: This is not JSON \(.* at column \d+\)"),
    ('{"prompts": ["a", "b"]}\n["a", "b"]', "40", "Line 2: There is no list of prompts"),
    ('{"prompt": "a"}', None, "Line 1: There is no list of prompts"),
    ('{"prompts": ["a", ""]}', "40", "Line 1: There is no list of prompts"),
    ('{"prompts": ["a", 3]}', "40", "Line 1: There is no list of prompts"),
    ('{"prompts": ["a", "b", "c"]}', "40", "Line 1: 3 prompts need 2 switch frames, not 1"),
    ('{"prompts": ["a", "b"]}', None, "Line 1: 2 prompts need 1 switch frames, not 0"),
    ('{"prompts": ["a", "b"]}', "soon", "Line 1: The switch frames 'soon' are not whole numbers"),
    ('{"prompts": ["a", "b", "c"]}', "80, 40", "Line 1: Prompt 3 starts at latent frame 40, before prompt 2"),
    ('{"prompts": ["a", "b"]}\n{"prompts": ["a"], "switch_frame_indices": []}', "40", "Line 2: 1 prompts, but the first"),
])
def test_broken_jsonl_names_the_line(text, frames, words):
    with pytest.raises(ForcingError, match=words):
        read_jsonl(text, frames)
