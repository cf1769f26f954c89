"""The SAMPLER object: a causal rollout for SamplerCustomAdvanced and every other node that takes a SAMPLER."""
from __future__ import annotations

import functools
import logging
from typing import Iterator, Sequence

import comfy.model_management as mm
import torch
from comfy.samplers import Sampler
from torch import Tensor
from tqdm.auto import tqdm

from ..forcing_core.errors import ForcingError
from ..forcing_core.noise import BlockNoise, CoreNoise, Noise, ReferenceNoise
from ..forcing_core.options import RolloutOptions, blocks_of, check_sigmas, levels_from
from ..forcing_core.plan import Block, Call
from ..forcing_core.policies import build, replayed_frames
from ..forcing_core.rollout import ROLLOUTS, calls
from ..forcing_core.rollout.joining import Joining
from ..forcing_core.rollout.restyle import Restyling, Shifted
from ..forcing_core.rollout.transitions import check_switches, fresh_starts, replays
from ..forcing_core.schedule import Level
from ..forcing_core.solvers import SOLVERS
from ..forcing_core.streaming import ENDLESS, EndlessBlocks
from ..forcing_core.track import schedule
from .host import HostDenoiser
from .host_conditioning import network
from .host_memory import make_room, run_bytes, shape_of, tracks_of, whole_shape
from .host_refusals import exclusive, out_of_memory, refuse_partial_conditions

log = logging.getLogger(__name__)
CYCLE = 64  # blocks after which all cost the same forwards, whatever the window
PURE_NOISE = 0.999  # first sigma from which nothing of the latent is left; the many-step schedules begin at 0.9998


def given_frames(latent: Tensor, mask: Tensor | None) -> int:
    """How many leading frames the noise mask marks as given (0 = keep, 1 = generate), in latent frames.

    Raises ForcingError for masks that are not whole leading frames.
    """
    if mask is None:
        return 0
    low, high = mask.amin(dim=(0, 1, 3, 4)), mask.amax(dim=(0, 1, 3, 4))
    keep = (high < 0.5).tolist()
    given = keep.index(False) if False in keep else len(keep)
    whole = bool(((low > 0.999) | (high < 0.001)).all())
    if any(keep[given:]) or not whole:
        raise ForcingError("The latent's noise mask covers parts of frames or frames in the middle; a causal rollout can "
                           "only keep whole frames at the start. Use Forcing Start Image or Forcing Extend.")
    return given


def _noise(options: RolloutOptions, seed: int, clip: Tensor, frames: int) -> Noise:
    sizes = {"channels": tuple(clip.shape[:2]), "size": tuple(clip.shape[3:]), "device": clip.device}
    makers = {
        "block": lambda: BlockNoise(seed, **sizes),
        "comfy": lambda: CoreNoise(seed, clip),
        "reference": lambda: ReferenceNoise(seed, **sizes, frames=frames),
    }
    return makers[options.noise]()


class _Progress:
    """True progress: one tick a forward, with the newest latents for the preview. endless: `total` forwards are one
    block, and the callback gets the progress of that."""

    def __init__(self, callback, total: int, disable: bool, endless: bool = False):
        self.callback, self.total, self.done, self.endless = callback, total, 0, endless
        self.bar = tqdm(total=None if endless else total, disable=disable, desc="Forcing", unit="forward")
        self.newest: Tensor | None = None

    def tick(self, x: Tensor, x0: Tensor | None, levels: Sequence[Level]) -> None:
        if x0 is not None:  # of frames denoised jointly, the first ones are the cleanest
            noisy = next(level for level in levels if level.sigma)  # frames of a knot have none
            self.newest = x0[:, :, levels.index(noisy):][:, :, :levels.count(noisy)]
        self.bar.update(1)
        self.done += 1
        # the last forward's tick is sent by `finish` with everything, so that denoised_output is complete
        if self.callback is not None and self.newest is not None and (self.endless or self.done < self.total):
            self.callback((self.done - 1) % self.total, self.newest[:, :, -1:], x, self.total)

    def finish(self, latents: Tensor) -> None:
        if self.callback is not None:
            self.callback(self.total - 1, latents, latents, self.total)
        self.bar.close()


class _Ticking:
    """A denoiser whose every forward is a tick of the progress."""

    def __init__(self, denoiser: HostDenoiser, progress: _Progress):
        self.denoiser, self.progress = denoiser, progress

    def __call__(self, x, levels, first, phase) -> Tensor | None:
        x0 = self.denoiser(x, levels, first, phase)
        self.progress.tick(x, x0, levels)
        return x0

    def __getattr__(self, name):
        return getattr(self.denoiser, name)


class CausalSampler(Sampler):
    """Runs a rollout over whatever guider it is given. `rollout` holds its options (read by `host.reserve`); snapshots: a
    `snapshot.Snapshots`, or None. restyle: the video that blocks start from, a `restyle.Source`, or None.

    For a subclass that streams: `frames`, latent frames of the whole video where the latents it gets are shorter
    (ENDLESS: until interrupted), and `beside`, bytes of the device that it needs while the rollout runs.
    """

    frames: int | None = None
    beside = 0
    reference: Tensor | None = None  # latents [1 or B, C, r, H, W] in the graph's scale, for a memory with a reference

    def __init__(self, rollout: RolloutOptions, snapshots=None, restyle=None):
        self.rollout, self.snapshots, self.restyle = rollout, snapshots, restyle

    @torch.no_grad()
    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False) -> Tensor:
        """Latents [B, C, F, H, W], given frames included; fewer frames if it had to stop after a finished block."""
        with exclusive(network(model_wrap.inner_model)):
            run = _Run(self, model_wrap, sigmas, extra_args, noise, latent_image, denoise_mask)
            return self._finish(run, _Progress(callback, run.forwards, disable_pbar, run.endless))

    def collect(self, run: "_Run", progress: _Progress) -> Tensor:
        """What `sample` returns, of the blocks as they become final."""
        parts = [] if run.given is None else [run.given]
        parts += [latents for _, latents in run.finished(progress)]
        return torch.cat(parts, dim=2)

    def steer(self, run: "_Run"):
        """What the rollout is given as `steer`, or None. Called before the first forward; may change noise and switches."""
        return None

    def _finish(self, run: "_Run", progress: _Progress) -> Tensor:
        try:
            latents = self.collect(run, progress)
        finally:
            run.denoiser.free()
            progress.bar.close()
        progress.finish(latents)
        return latents


class _Run:
    """One call of the sampler: checked inputs, then finished blocks one by one. given: latents in the network's scale."""

    def __init__(self, sampler: CausalSampler, guider, sigmas, extra_args, noise, latent_image, denoise_mask):
        options, snapshots, whole = sampler.rollout, sampler.snapshots, whole_shape(sampler, noise.shape)
        values = [float(s) for s in sigmas]
        check_sigmas(values, options)
        base = guider.inner_model
        self.options, self.guider = options, guider
        self.levels = levels_from(values, options.timesteps)
        self.first_levels = options.first_sigmas and levels_from(options.first_sigmas, options.timesteps)
        self.shape = shape_of(base, whole, guider)
        self.endless = self.shape.frames >= ENDLESS
        refuse_partial_conditions(guider, self.shape, values[0])
        self.given = self._given(latent_image, denoise_mask, extra_args, base)
        count = 0 if self.given is None else self.given.shape[2]
        self.blocks = EndlessBlocks(options.block, count, options.independent_first) if self.endless else \
            blocks_of(self.shape.frames, count, options)
        self.noise = self._make_noise(values[0], extra_args.get("seed") or 0, noise, latent_image, count)
        self.restyling = self._restyling(sampler.restyle, values[0]) if sampler.restyle else None
        self.reference = self._reference(sampler.reference)
        self._warn_about_guidance()
        make_room(guider, run_bytes(guider, options, whole) + sampler.beside)
        self.denoiser = HostDenoiser(guider, extra_args, options, self.shape, prompts=self._lay_tracks())
        self.kept = snapshots.begin(self, extra_args.get("seed") or 0) if snapshots else None
        self.helm = sampler.steer(self)

    def _given(self, latent_image, denoise_mask, extra_args, base) -> Tensor | None:
        """Given latents: leading frames the noise mask keeps, or the start image of core's ARVideoI2V node."""
        count = given_frames(latent_image, denoise_mask)
        if count:
            return latent_image[:, :, :count]
        settings = extra_args["model_options"].get("transformer_options", {}).get("ar_config", {})
        initial = settings.get("initial_latent")
        if initial is None:
            return None
        if initial.shape[1] != latent_image.shape[1] or initial.shape[3:] != latent_image.shape[3:]:
            raise ForcingError(f"The start image's latent {list(initial.shape)} and the video's {list(latent_image.shape)} "
                               "differ in size. Connect the LATENT of the same AR Video I2V node.")
        initial = base.process_latent_in(initial).to(latent_image)
        return initial.expand(self.shape.batch, *initial.shape[1:]) if initial.shape[0] == 1 else initial

    def _reference(self, latents: Tensor | None) -> Tensor | None:
        """Latents of a reference, one for each video of the batch, in the network's scale."""
        if latents is None:
            return None
        shape = self.shape
        if latents.shape[0] not in (1, shape.batch) or latents.shape[3:] != (shape.height, shape.width):
            raise ForcingError(f"The reference's latent {list(latents.shape)} does not fit a video of {shape.width * 8}x"
                               f"{shape.height * 8} pixels and a batch of {shape.batch}. Encode the reference picture at that "
                               "size.")
        scaled = self.guider.inner_model.process_latent_in(latents.float())
        return scaled.to(self.guider.model_patcher.load_device).expand(shape.batch, -1, -1, -1, -1)

    def _lay_tracks(self) -> dict:
        """Lay the conditions' prompt tracks over the blocks: sets `switches` and `policy`, returns the embeddings of every
        condition, one for every segment."""
        options, tracks = self.options, tracks_of(self.guider)
        laid = schedule(list(tracks.values()), self._beginning(tracks.values()), block=options.block,
                        independent_first=options.independent_first)
        self.switches, self.policy = laid.switches, build(options.cache, self.shape.frames)
        check_switches(self.switches, self.policy, options.cache.rollout)
        return {key: laid.prompts(index, track) for index, (key, track) in enumerate(tracks.items())}

    def _beginning(self, tracks) -> Sequence[Block]:
        """The blocks over which tracks are laid: of an endless video those until all their changes are over."""
        if not self.endless:
            return self.blocks
        last = max((s.frame + s.blocks * self.options.block for track in tracks for s in track.segments), default=0)
        return self.blocks[:last // self.options.block + 2]

    def _make_noise(self, sigma: float, seed: int, clip: Tensor, latent_image, given: int) -> Noise:
        if sigma < PURE_NOISE and self.options.knot.frames:
            raise ForcingError("The frames of a knot lie behind the end of the latent, so a knot needs whole SIGMAS. Connect "
                               "those of Forcing Preset or Forcing Sigmas directly, or set the knot to 0.")
        noise = _noise(self.options, seed, clip, self.shape.frames - given)
        return noise if sigma >= PURE_NOISE else Shifted(noise, latent_image, sigma)

    def _restyling(self, how, sigma: float) -> Restyling:
        """The blocks' own starts, for a `restyle.Source` of this size."""
        if sigma < PURE_NOISE:
            raise ForcingError("The strength of Forcing Restyle says how noisy a block starts, so the SIGMAS have to be whole. "
                               "Connect those of Forcing Preset or Forcing Sigmas directly.")
        options = self.options
        how.options.check("knot" if options.knot.frames else options.cache.rollout)
        source = how.fitting(self.shape, self.guider.inner_model)
        blocks = self.blocks[:source.shape[2] // options.block + 1]
        return Restyling(how.options, source, blocks, lambda value: levels_from((value,), options.timesteps)[0])

    def _warn_about_guidance(self) -> None:
        cfg = getattr(self.guider, "cfg", 1.0)
        if self.options.expected is not None and not self.options.guided and abs(cfg - 1.0) > 1e-6:
            log.warning("%s is distilled to work without guidance; cfg %.3g doubles the time and memory and usually "
                        "burns the colours. Set cfg to 1.", self.options.system, cfg)

    @property
    def forwards(self) -> int:
        """Rollout steps of the whole run - given chunks, denoising steps and clean passes - or of a block, if endless."""
        if self.endless:
            return len(self._calls(self.blocks[:CYCLE])) - len(self._calls(self.blocks[:CYCLE - 1]))
        made, switches = self._calls(self.blocks), self.switches
        if self.kept:
            made, switches = self.kept.left(made, switches)
        fresh = fresh_starts(switches, self.blocks) * (len(self.first_levels or self.levels) - len(self.levels))
        return len(made) + fresh + replays(switches, self.options.cache.rollout)

    def _calls(self, blocks: Sequence[Block]) -> list[Call]:
        options = self.options
        made = [*calls(options.rollout, blocks, len(self.levels), first_steps=len(self.first_levels or ()),
                       given=0 if self.given is None else self.given.shape[2], block=options.block,
                       independent_first=options.independent_first, window=self.policy.capacity,
                       references=0 if self.reference is None else self.reference.shape[2], **options.order)]
        return self.restyling.calls(made, self.levels, self.first_levels) if self.restyling else made

    def finished(self, progress: _Progress) -> Iterator[tuple[Block, Tensor]]:
        """Yield (block, latents) as they become final. Ends early, with a line in the log, where something goes wrong
        after a finished block and the finished ones may be kept."""
        finished = 0
        try:
            for block, latents in self._rollout(progress):
                if not torch.isfinite(latents).all():
                    raise ForcingError(_not_finite(block))
                finished += 1
                yield block, latents
        except (Exception, mm.InterruptProcessingException) as error:
            self.denoiser.free()  # before anything else is allocated
            explained = self._explained(error)
            if not finished or not self._may_keep(error):
                if explained is error:  # an error that is its own cause would keep the whole run alive
                    raise
                raise explained from error
            blocks = "endless" if self.endless else len(self.blocks)
            if isinstance(error, mm.InterruptProcessingException):  # which says nothing, and is no mistake
                log.info("Cancelled after %d of %s blocks; the finished ones are returned.", finished, blocks)
            else:
                log.error("Stopped after %d of %s blocks; the finished ones are returned. %s", finished, blocks, explained)

    def _rollout(self, progress: _Progress):
        options = self.options
        knot = {"knot": options.knot, "reference": self.reference, "over": options.cache.rollout}
        rollout = functools.partial(
            ROLLOUTS[options.rollout],
            _Ticking(Joining(self.denoiser) if options.joined else self.denoiser, progress), self.blocks, self.levels,
            self.noise, first_levels=self.first_levels,
            context=self.given, block=options.block, independent_first=options.independent_first,
            context_timestep=options.context_timestep, window=replayed_frames(self.policy), switches=self.switches,
            solver=SOLVERS[options.solver], **({"make": self.restyling.make} if self.restyling else {}),
            **({"steer": self.helm} if self.helm else {}), **(knot if options.rollout == "knot" else {}))
        return self.kept.blocks(rollout) if self.kept else rollout()

    def _may_keep(self, error: BaseException) -> bool:
        if isinstance(error, mm.InterruptProcessingException):
            return self.options.keep_on_interrupt
        return out_of_memory(error) or isinstance(error, ForcingError)

    def _explained(self, error: BaseException) -> BaseException:
        """Turn an allocation failure into a sentence with the numbers and the fix; leave the rest alone."""
        if not out_of_memory(error):
            return error
        need = run_bytes(self.guider, self.options, (self.shape.batch, self.guider.inner_model.diffusion_model.out_dim,
                                                     self.shape.frames, self.shape.height, self.shape.width))
        return ForcingError(f"Out of memory: the KV store of this run takes {need / 1e9:.2f} GB beside the model. Use a "
                            "smaller window (Forcing Cache), a smaller picture, fp8 weights, or fewer conditions.")


def _not_finite(block: Block) -> str:
    return (f"Block {block.index + 1} (latent frames {block.first}-{block.end - 1}) came out as NaN or infinite. "
            "Load the model in bf16 instead of fp16 or fp8_fast, and check LoRA strengths.")
