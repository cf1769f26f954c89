"""ComfyUI's own forward of a Wan model as oracle: all frames at once, attention under a dense block-causal mask.

Clean frames of the past have timestep 0 and the frames in work theirs, in one sequence, so it knows nothing of stores,
slices or rollouts. Axis legend: latents [1, C, F, H, W].
"""
import contextlib

import torch
from forcing_pack.nodes import host
from forcing_testkit import hostkit
from forcing_testkit.forcing_corekit import gap
from torch.nn.functional import scaled_dot_product_attention

TOKENS = hostkit.SIZE[0] * hostkit.SIZE[1] // 4


def watch_forwards(monkeypatch):
    """List of (phase, first, levels, x, x0) of every forward of every rollout until the test ends."""
    seen, forward = [], host.HostDenoiser.__call__

    def call(self, x, levels, first, phase):
        x0 = forward(self, x, levels, first, phase)
        seen.append((phase, first, levels, x.clone(), x0))
        return x0

    monkeypatch.setattr(host.HostDenoiser, "__call__", call)
    return seen


def attention(ends):
    """Stands for ComfyUI's attention: of a sequence of frames whose blocks end there, a frame sees up to its block's end."""
    frames = torch.arange(ends[-1])
    until = torch.tensor([next(end for end in ends if f < end) for f in range(ends[-1])])
    mask = (frames[None] < until[:, None]).repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)

    def attend(func, q, k, v, heads, *args, **kwargs):
        parts = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        own = mask if q.shape[1] == k.shape[1] == len(mask) else None
        return scaled_dot_product_attention(*parts, attn_mask=own).transpose(1, 2).flatten(2)
    return attend


@contextlib.contextmanager
def times_by_frame(net):
    """Networks that know one timestep a sample get one a frame: e of [F, ...] becomes [1, F, ...] where it is used."""
    def in_block(module, args, kwargs):
        return args, {**kwargs, "e": kwargs["e"].unsqueeze(0)}

    hooks = [block.register_forward_pre_hook(in_block, with_kwargs=True)
             for block in (*net.blocks, *getattr(net, "vace_blocks", ()))]
    hooks.append(net.head.register_forward_pre_hook(lambda module, args: (args[0], args[1].unsqueeze(0))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def largest_gap(model, seen, given, cut=lambda given, frames: given):
    """Largest difference, over all denoising steps, between a rollout's x0 and the oracle's, relative to the latter.

    seen: of `watch_forwards`; given: keyword arguments of ComfyUI's forward for the whole video, and c_concat; cut: gives
    those of the first so many frames.
    """
    net, clean, worst, ends = model.model.diffusion_model, [], 0.0, []
    by_frame = not type(net).__name__ == "WanModel"
    for phase, first, levels, x, x0 in seen:
        if phase == "clean":
            clean.append(x)
            ends.append(first + x.shape[2])
            continue
        inside = torch.cat([*clean, x], dim=2)
        now = dict(cut(given, inside.shape[2]))
        concat, more = now.pop("c_concat", None), now.pop("transformer_options", {})
        inside_x = inside if concat is None else torch.cat([inside, concat], dim=1)
        times = torch.tensor([0.0] * first + [level.timestep for level in levels])
        options = {**more, "optimized_attention_override": attention([*ends, inside.shape[2]])}
        with torch.no_grad(), times_by_frame(net) if by_frame else contextlib.nullcontext():
            velocity = net(inside_x, times if by_frame else times[None], transformer_options=options, **now)
        expected = x - levels[-1].sigma * velocity[:, :, first:]
        worst = max(worst, gap(x0, expected) / float(expected.abs().max()))
    return worst
