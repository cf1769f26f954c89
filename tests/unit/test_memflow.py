"""MemFlow's bank against choices and a softmax made one sample and one layer at a time."""
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.options import cache_of
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import MemFlowOptions, WindowOptions
from forcing_pack.forcing_core.policies.memflow import best
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rollout import Switch, block_rollout
from forcing_pack.forcing_core.wan import TextState
from forcing_pack.forcing_core.wan.text import pad_rows
from forcing_testkit import forcing_corekit as core
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.policykit import LEVELS, SampleNoise, attended, empty, network, softmax_attention, video

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, BATCH, LAYERS, GRID, TOKENS, FRAMES = 2, 2, 2, (1, 2), 2, 40
SMALL = MemFlowOptions(window=9)  # bank 3, window 3, block 3


class Driven:
    """Random keys and values through a memory; the frames that clean passes wrote are noted, for every layer."""

    def __init__(self, options=SMALL, until=0):
        self.memory = make_memory(options, FRAMES, layers=LAYERS, grid=GRID, head_dim=128, device="cpu")
        self.draw, self.past = torch.Generator().manual_seed(4), {}
        for first in range(0, until, 3):
            self.forward(first, 3, "noisy")
            self.forward(first, 3, "clean")

    def forward(self, first, frames, phase, texts=None):
        """(outputs, raw q, own (k, v)) of all layers, each a list; and the pass. texts: of a new prompt, by layer."""
        now = self.memory.begin(first, frames, phase)
        outs, qs, own = [], [], []
        for layer in range(LAYERS):
            q, k, v = torch.randn(3, BATCH, frames * TOKENS, HEADS, 128, generator=self.draw)
            k = k + torch.randn(BATCH, frames, 1, HEADS, 128, generator=self.draw).repeat_interleave(TOKENS, 2).flatten(1, 2)
            q = q + torch.randn(BATCH, 1, HEADS, 128, generator=self.draw)
            assert now.asks == (texts is not None)
            if texts is not None:
                now.ask(layer, texts[layer])
            outs.append(attended(now, layer, q, k, v))
            qs.append(q)
            own.append((k, v))
        if phase != "noisy":
            for i in range(frames):
                here = slice(i * TOKENS, (i + 1) * TOKENS)
                self.past[first + i] = [(k[:, here], v[:, here]) for k, v in own]
        return outs, qs, own, now

    def mean(self, layer, sample, frame):
        return self.past[frame][layer][0][sample].mean(dim=0)

    def chosen(self, layer, sample, text, among, newest):
        """By the rule: the two frames that the prompt fits best, and the first one of the last block."""
        score = {f: float((self.mean(layer, sample, f) * text[sample]).sum()) for f in among if f != newest}
        return sorted([*sorted(score, key=score.get)[-2:], newest])

    def attention(self, layer, sample, frames, q, own):
        """Of one sample to these past frames and its own ones, all in a row."""
        k, v = (torch.cat([*(self.past[f][layer][i][sample:sample + 1] for f in frames), own[i][sample:sample + 1]], dim=1)
                for i in range(2))
        return softmax_attention(rotated(q[sample:sample + 1], range(len(frames), len(frames) + 3), GRID),
                                 rotated(k, range(len(frames) + 3), GRID), v)


def prompt(seed):
    """Mean keys of a prompt by layer, [B, H, D]."""
    return list(torch.randn(LAYERS, BATCH, HEADS, 128, generator=torch.Generator().manual_seed(seed)))


def each():
    return ((layer, sample) for layer in range(LAYERS) for sample in range(BATCH))


@pytest.mark.parametrize("compact", [False, True])
def test_at_a_change_of_prompt_the_bank_is_what_fits_it(compact):
    """Candidates are all frames held, those that this pass evicts too; keys are those of clean passes and stand where the
    bank does. All steps of the block, and the blocks after it, see the same bank, until the next change."""
    driven = Driven(replace(SMALL, compact=compact), until=15)
    assert driven.memory.store.frames == (0, 1, 2, *range(9, 15))
    banks, text = [{key: [0, 1, 2] for key in each()}], prompt(7)
    for first, texts in ((15, text), (18, None), (21, prompt(8))):
        driven.memory.turned() if texts else None
        now_held = [f for f in range(max(3, first - 6), first)]
        banks.append({(layer, s): driven.chosen(layer, s, texts[layer], {*banks[-1][layer, s], *now_held}, first - 3)
                      if texts else banks[-1][layer, s] for layer, s in each()})
        for phase in ("noisy", "noisy", "clean"):
            outs, qs, own, now = driven.forward(first, 3, phase, texts)
            texts = None
            assert now.plan.read == (0, 1, 2, *range(first - 3, first + 3))
            for layer, s in each():
                bank = banks[-1][layer, s]
                assert driven.memory.store.sources[layer, s] == tuple(bank)
                seen = driven.attention(layer, s, [*bank, *range(first - 3, first)], qs[layer], own[layer])
                assert gap(outs[layer][s:s + 1], seen) <= 1e-5
    assert len({tuple(bank) for bank in banks[1].values()}) > 1 and banks[3] != banks[1] == banks[2] != banks[0]


def test_without_a_change_the_bank_is_a_sink():
    for options in (MemFlowOptions(window=9), MemFlowOptions(window=9, active=3)):
        assert gap(video(options, 24), video(WindowOptions(9, 3, positions="relative"), 24)) <= 1e-5


@pytest.mark.parametrize("active", [1, 2])
def test_sparse_activation(active):
    """A layer attends to the frames of the bank that its mean query fits, whatever a noisy step before chose."""
    driven = Driven(replace(SMALL, active=active), until=15)
    seen = set()
    for phase in ("noisy", "noisy", "clean"):
        outs, qs, own, _ = driven.forward(15, 3, phase)
        for layer, s in each():
            mean = qs[layer][s].mean(dim=0)
            score = {f: float((driven.mean(layer, s, f) * mean).sum()) for f in (0, 1, 2)}
            bank = sorted(sorted(score, key=score.get)[-active:])
            seen.add((layer, s, *bank))
            places = [*bank, 3, 4, 5, 6, 7, 8]
            k, v = (torch.cat([*(driven.past[f][layer][i][s:s + 1] for f in (*bank, 12, 13, 14)), own[layer][i][s:s + 1]],
                              dim=1) for i in range(2))
            wanted = softmax_attention(rotated(qs[layer][s:s + 1], (6, 7, 8), GRID), rotated(k, places, GRID), v)
            assert gap(outs[layer][s:s + 1], wanted) <= 1e-5
    assert len(seen) > LAYERS * BATCH  # queries of other steps fit other frames


def test_a_recache_leaves_the_chosen_bank_and_rewrites_the_window():
    """Also where it goes over all of the video, from its first frame on."""
    driven = Driven(MemFlowOptions(window=12), until=9)
    text = prompt(3)
    driven.memory.turned()
    clean = {f: driven.past[f] for f in range(9)}
    *_, now = driven.forward(0, 9, "recache", text)
    store, rewritten = now.store, driven.past
    assert now.plan.write == (3, 4, 5, 6, 7, 8)
    for layer, s in each():
        driven.past = clean
        bank = driven.chosen(layer, s, text[layer], range(9), 6)
        for place, frame in enumerate((*bank, 3, 4, 5, 6, 7, 8)):
            kept = clean if place < 3 else rewritten
            slot = store.slots[(0, 1, 2, 3, 4, 5, 6, 7, 8)[place]]
            assert torch.equal(store._data[layer].raw[s, slot], kept[frame][layer][0][s])
            assert gap(store.means[layer][s, slot], kept[frame][layer][0][s].mean(dim=0)) <= 1e-6


def test_there_is_nothing_to_choose_before_the_bank_is_full():
    driven = Driven(until=3)
    driven.memory.turned()
    assert not driven.memory.begin(3, 3, "noisy").asks and not driven.memory.begin(3, 3, "noisy").asks
    driven.memory.turned()
    driven.memory.forget()
    assert not driven.memory.begin(3, 3, "noisy").asks


def test_a_flush_keeps_the_bank_and_its_frames():
    driven = Driven(until=15)
    driven.memory.turned()
    driven.forward(15, 3, "noisy", prompt(1))
    sources = dict(driven.memory.store.sources)
    driven.forward(15, 3, "clean")
    driven.memory.flush(2)
    assert driven.memory.store.frames == (0, 1, 2, 16, 17) and driven.memory.store.sources == sources
    driven.memory.turned()  # of the last block, the first frame that is left
    *_, now = driven.forward(18, 3, "noisy", prompt(2))
    assert all(16 in bank for bank in now.store.sources.values())


@pytest.mark.parametrize("scores, sources, last, want", [
    ([9, 1, 1, 1, 8, 1], [0, 1, 2, 3, 4, 5], 3, [0, 3, 4]),  # the last block's first frame whatever its score
    ([1, 1, 1, 9, 8, 7], [0, 1, 2, 3, 4, 5], 3, [3, 4, 5]),  # it does not count among the best
    ([5, 9, 1, 8, 9, 7], [0, 4, 9, 3, 4, 5], 5, [3, 1, 5]),  # a frame that lies in two places is taken once
    ([1, 2, 8, 9, 1, 1], [0, 1, 2, 3, 4, 5], 5, [2, 3, 5]),  # in the order of time
])
def test_the_best(scores, sources, last, want):
    assert best(scores, sources, last, 2) == want


def test_the_prompt_is_told_by_its_keys_without_padding():
    """What the network asks with: the mean of the layer's cross-attention keys over the rows of the prompt."""
    net, short = network(), core.prompts(BATCH)
    block, longer = net.blocks[1], pad_rows(short, 20)
    text = TextState(longer).mean_key(1, block.cross_attn, net.text_embedding, HEADS)
    keys = block.cross_attn.norm_k(block.cross_attn.k(net.text_embedding(short)))
    assert gap(text, keys.mean(dim=1).unflatten(1, (HEADS, -1))) <= 1e-5
    zero = TextState(torch.zeros_like(longer)).mean_key(1, block.cross_attn, net.text_embedding, HEADS)
    assert torch.isfinite(zero).all() and gap(zero, text) > 1e-3


def switched(transition, options=SMALL, at=15):
    """(latents, bank sources, what layers were asked with) of a rollout of the tiny network with one change of prompt."""
    asked, net = [], network()
    memory = empty(options, 21)
    make = memory.policy.make_pass

    def make_pass(*args):
        now = make(*args)
        ask = now.ask
        now.ask = lambda layer, text: asked.append((now.call.first, now.call.phase, layer, text)) or ask(layer, text)
        return now

    memory.policy.make_pass = make_pass
    texts = [core.prompts(seed=0), core.prompts(seed=1)]
    denoiser = core.NetworkDenoiser(net, [core.Condition(texts, memory)])
    switches = [Switch(at, 1, transition=transition, weight=0.5)]
    parts = [x for _, x in block_rollout(denoiser, layout(21, 3), LEVELS, SampleNoise((0,), 21), window=9, switches=switches)]
    return torch.cat(parts, dim=2), memory.store.sources, asked


@pytest.mark.parametrize("transition, first, phase", [("keep", 15, "noisy"), ("flush", 15, "noisy"), ("recache", 6, "recache")])
def test_a_transition_tells_the_memory(transition, first, phase):
    """Every layer once, in the first forward under the new prompt, with what the network makes of that."""
    _, sources, asked = switched(transition)
    net = network()
    assert [row[:3] for row in asked] == [(first, phase, layer) for layer in range(3)]
    for _, _, layer, text in asked:
        cross = net.blocks[layer].cross_attn
        keys = cross.norm_k(cross.k(net.text_embedding(core.prompts(seed=1))))
        assert gap(text.flatten(1), keys.mean(dim=1)) <= 1e-5
    assert len(sources) == 3 and all(12 in bank or 13 in bank for bank in sources.values())


@pytest.mark.parametrize("transition", ["soft", "cut"])
def test_a_mixture_and_an_empty_memory_choose_nothing(transition):
    assert switched(transition)[1:] == ({}, [])


def test_the_preset():
    options = cache_of(get("memflow"))
    assert (options.window, options.sink, options.top_k, options.active) == (12, 3, 2, 0) and get("memflow").available


@pytest.mark.parametrize("options, message", [
    ({"top_k": 0}, "at least 1"), ({"active": -1}, "make no sense"), ({"window": None}, "some frames"),
    ({"window": 5}, "at least 6 frames")])
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ForcingError, match=message):
        MemFlowOptions(**options)
