"""Captions as conditioning: fixed, exact, zero after the caption."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import world
from forcing_pack.forcing_core.micro.names import IDS, VOCABULARY
from forcing_pack.forcing_core.micro.text import TextCodec, word_rows

CAPTION = "a red circle moving left on a dark background"


@pytest.mark.parametrize("text_dim", [16, 64, 100, 4096])
def test_rows_after_the_caption_are_zero(text_dim):
    context = TextCodec(text_dim).encode([CAPTION, "blue square"])
    assert context.shape == (2, 512, text_dim)
    assert context[0, :9].abs().sum(1).min() > 0 and not context[0, 9:].any()
    assert context[1, :2].abs().sum(1).min() > 0 and not context[1, 2:].any()
    assert not TextCodec(text_dim).encode("").any()


@pytest.mark.parametrize("text_dim", [64, 4096])
def test_words_are_orthogonal(text_dim):
    rows = word_rows(text_dim)[1:]
    assert torch.equal(rows @ rows.T, text_dim * torch.eye(len(rows)))


@pytest.mark.parametrize("text_dim", [16, 64, 72, 4096])
def test_words_are_distinct(text_dim):
    assert len({tuple(row) for row in word_rows(text_dim).tolist()}) == len(VOCABULARY)


def test_rows_are_exact_in_half_precision():
    context = TextCodec(64).encode(CAPTION)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(context.to(dtype).float(), context)


def test_numbers_never_change():
    """A trained network knows its words by these numbers: a new torch or a new word must leave them alone."""
    row = TextCodec(64).encode("red")[0, 0]
    assert row[:12].tolist() == [1.5, 1.5, -1.5, 0.5, 0.5, -1.5, 0.5, 1.5, 0.5, 0.5, -0.5, -0.5]
    assert [IDS[w] for w in CAPTION.split()] == [1, 7, 16, 21, 25, 2, 1, 13, 3]


def test_words_may_be_added():
    assert len(VOCABULARY) < 64


def test_order_counts():
    codec = TextCodec(64)
    one, two = codec.encode(["red circle in front of blue square", "blue circle in front of red square"])
    assert not torch.equal(one.sum(0), two.sum(0)) or not torch.equal(one, two)


def test_ids_of_a_batch_and_text_agree():
    _, ids, attributes = world.batch(3, 6, frames=1, level="full")
    codec = TextCodec(64, rows=24)
    assert torch.equal(codec.embed(ids), codec.encode([world.caption(c) for c in world.specs(attributes)]))
    assert torch.equal(TextCodec(64).embed(ids)[:, :24], codec.embed(ids))


def test_unknown_words_are_dropped_and_named():
    codec = TextCodec(64)
    assert codec.unknown("a furry red circle, dancing") == ("furry", "dancing")
    assert torch.equal(codec.encode("a furry red circle"), codec.encode("a red circle"))
    assert "furry" in codec.explain("furry circle") and "triangle" in codec.explain("furry circle")
    assert codec.explain(CAPTION) == ""


def test_aliases():
    codec = TextCodec(64)
    assert torch.equal(codec.encode("A Purple ball!"), codec.encode("a magenta circle"))


def test_mistakes_are_named():
    with pytest.raises(ForcingError, match="positive"):
        TextCodec(0)
