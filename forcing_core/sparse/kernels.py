"""Attention over a selection, three times: under a dense mask, by gathering what was chosen, and by FlexAttention.

    mask    the definition: every logit is computed, and most are thrown away
    gather  the keys of every block of queries side by side, then a dense kernel; on any device
    flex    torch's compiled block-sparse kernel, for NVIDIA cards from compute capability 8.0 on

Axis legend: [B, n, H, D] queries, [B, m, H, D] keys and values; Q, K blocks of them.
"""
from __future__ import annotations

import functools
import importlib.util
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForcingError
from .selection import Selection

GATHERED = 1 << 25  # numbers that are gathered at once
STEPS = 8  # counts of chosen blocks that are told apart; the rest is filled up and masked
CAPABILITY = (8, 0)
TILE = 16  # smallest block of a tensor core
AUTO = "auto"


def masked(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """The definition, in float32. [B, n, H, D]."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~selection.mask(), -torch.inf).softmax(dim=-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v.float()).type_as(q)


def gathered(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """One dense attention for all blocks of queries that chose about as many blocks of keys. [B, n, H, D]."""
    batch, n, heads, _ = q.shape
    spots = selection.queries.table(q.device)
    rows = torch.arange(batch * heads * len(spots), device=q.device)
    sample, head, block = rows // (heads * len(spots)), rows // len(spots) % heads, rows % len(spots)
    place = spots[block]  # [rows, size], n where a block is shorter
    asked = place.clamp(max=n - 1)
    if selection.order is not None:
        found = selection.order[sample[:, None], head[:, None], asked]
        place, asked = torch.where(place < n, found, n), found
    out = q.new_empty(batch, n + 1, heads, v.shape[-1])  # the last row takes what fills short blocks
    for part, tokens, mask in _alike(selection, k.shape[1]):
        b, h = sample[part, None], head[part, None]
        rows_q, rows_k, rows_v = q[b, asked[part], h], k[b, tokens, h], v[b, tokens, h]
        found = F.scaled_dot_product_attention(rows_q[:, None], rows_k[:, None], rows_v[:, None], mask)[:, 0]
        out[b, place[part], h] = found
    return out[:, :n]


def _alike(selection: Selection, m: int):
    """(rows of [B * H * Q], their keys [rows, width], mask of those [rows, 1, 1, width] or None), of about equal width."""
    chosen, table = selection.chosen.flatten(0, 2), selection.keys.table(selection.chosen.device)
    counts = chosen.sum(dim=-1)
    kinds = counts * STEPS // chosen.shape[1]
    for kind in kinds.unique().tolist():
        same = (kinds == kind).nonzero()[:, 0]
        width = int(counts[same].max())
        at_once = max(1, GATHERED // (width * table.shape[1] * 128))
        for part in same.split(at_once):
            blocks = chosen[part].byte().sort(dim=-1, descending=True, stable=True).indices[:, :width]
            there = torch.arange(width, device=part.device) < counts[part, None]
            tokens = table[blocks].masked_fill(~there[..., None], m).flatten(1)
            real = tokens < m
            yield part, tokens.clamp(max=m - 1), None if bool(real.all()) else real[:, None, None]


def flexed(q: Tensor, k: Tensor, v: Tensor, selection: Selection, compiled: bool = True) -> Tensor:
    """FlexAttention over frames filled up to whole blocks. [B, n, H, D]."""
    from torch.nn.attention.flex_attention import flex_attention  # not part of every build of torch

    n, spots, table = q.shape[1], selection.queries.table(q.device).flatten(), selection.keys.table(q.device).flatten()
    if selection.order is None:
        asked = spots.clamp(max=n - 1).expand(q.shape[0], q.shape[2], -1)
    else:
        asked = selection.order[:, :, spots.clamp(max=n - 1)]
    rows = q.transpose(1, 2).gather(2, asked[..., None].expand(-1, -1, -1, q.shape[-1]))
    keys, values = (t.transpose(1, 2)[:, :, table.clamp(max=k.shape[1] - 1)] for t in (k, v))
    attention = _compiled() if compiled else flex_attention
    found = attention(rows, keys, values, block_mask=block_mask(selection))
    real = (spots < n).nonzero()[:, 0]
    back = asked[:, :, real, None].expand(-1, -1, -1, v.shape[-1])
    return torch.empty_like(found[:, :, :n]).scatter_(2, back, found[:, :, real]).transpose(1, 2)


def block_mask(selection: Selection):
    """The selection as FlexAttention takes it: lists of blocks, and a rule for single tokens that leaves the fill out."""
    from torch.nn.attention.flex_attention import BlockMask

    chosen, queries, keys = selection.chosen, selection.queries.size, selection.keys.size
    real = selection.keys.table(chosen.device).flatten() < selection.keys.tokens

    def rule(b, h, i, j):
        return chosen[b, h, i // queries, j // keys] & real[j]

    order = chosen.byte().sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
    return BlockMask.from_kv_blocks(chosen.sum(dim=-1).to(torch.int32), order, BLOCK_SIZE=(queries, keys), mask_mod=rule)


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def why_not_flex(device) -> str:
    """What keeps the flex kernel from running on a device; empty where it can."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the device is {device.type if torch.version.hip is None else 'an AMD card'}, not an NVIDIA card"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return (f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}, and "
                f"{'.'.join(map(str, CAPABILITY))} is needed")
    missing = [name for name in ("triton", "torch.nn.attention.flex_attention") if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else ""


def fits_flex(q: Tensor, selection: Selection) -> bool:
    """Whether this selection is one for the flex kernel: blocks that tensor cores can take, heads of a power of two."""
    sizes, width = (selection.queries.size, selection.keys.size), q.shape[-1]
    return all(size >= TILE and size & (size - 1) == 0 for size in sizes) and width & (width - 1) == 0


def _auto(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    able = q.is_cuda and fits_flex(q, selection) and not why_not_flex(q.device)
    return (flexed if able else gathered)(q, k, v, selection)


def _flex_or_refuse(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    if not fits_flex(q, selection):
        raise ForcingError(f"FlexAttention cannot take blocks of {selection.queries.size} queries and {selection.keys.size} "
                           f"keys with heads of {q.shape[-1]}. Use the method 'light' with blocks of 64 or 128, or the kernel "
                           "'auto'.")
    return flexed(q, k, v, selection)


# name -> kernel(q, k, v, selection)
KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Selection], Tensor]] = {
    AUTO: _auto, "gather": gathered, "flex": _flex_or_refuse, "mask": masked}


def check(kernel: str, device) -> None:
    """Raise ForcingError for a kernel that a device cannot run."""
    reason = why_not_flex(device) if kernel == "flex" else ""
    if reason:
        raise ForcingError(f"The sparse kernel 'flex' cannot run here: {reason}. Use the kernel 'auto' or 'gather', which work "
                           "on every device.")
