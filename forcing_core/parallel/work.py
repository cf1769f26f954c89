"""What a worker does: rollouts from weights to files. Run as a program by `launch`, with a file of requests.

Axis legend of latents: [B, C, F, h, w].
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import snapshot
from ..errors import ForcingError
from ..files import whole
from ..media import write_mp4
from ..noise import BlockNoise
from ..policies import build, replayed_frames
from ..rollout import RolloutState
from ..standalone import blocks_of, latent_size, make_denoiser, preset_rollout, window_options
from .launch import watched
from .ranks import Ranks, joined
from .request import LATENTS, SNAPSHOT, VIDEO, Request, make_folder, unpack
from .sources import source_of
from .ulysses import spread

FPS = 16  # of every model of the family


class Rollout:
    """One request in the hands of these processes; all of them do the same, process 0 writes the files.

    `run` yields (block number from 1, blocks) after each block. Raises ForcingError for requests that cannot be fulfilled.
    """

    def __init__(self, request: Request, ranks: Ranks):
        self.request, self.ranks = request, ranks
        self.source = source_of(request, ranks.device)
        preset, net = self.source.preset, self.source.net
        options, size = window_options(preset, **request.cache), latent_size(*self.source.size)
        self.window = replayed_frames(build(options, request.frames))
        made = make_denoiser(net, options, request.frames, size, self.source.prompts, preset.cfg)
        self.denoiser = spread(made, ranks)
        channels = net.config.out_channels
        self.noise = BlockNoise(request.seed, (1, channels), size, ranks.device)
        self.identity = snapshot.Identity(snapshot.fingerprint(net.named_parameters()), snapshot.settings(options),
                                          (1, channels, *size))
        self.state, self.done = RolloutState(), []
        if request.resume and self._path(SNAPSHOT).is_file():
            found = snapshot.load(self._path(SNAPSHOT))
            self.state = found.resume(self.identity, self.denoiser, ranks.device)
            self.done = [found.latents(self.identity, self.state.done[0].end)]

    def run(self) -> Iterator[tuple[int, int]]:
        request, preset = self.request, self.source.preset
        blocks = len(blocks_of(preset, request.frames))
        for block, x0 in preset_rollout(preset, self.denoiser, request.frames, self.noise, window=self.window,
                                        resume=self.state):
            self.done.append(x0.cpu())
            if (block.index + 1) % request.every == 0:
                self._save()
            yield block.index + 1, blocks
        if self.ranks.rank == 0:
            self._finish(torch.cat(self.done, dim=2)[:, :, :request.frames].float())

    def _path(self, name: str) -> Path:
        return self.request.folder / name

    def _save(self) -> None:
        """All processes give their heads."""
        packed = snapshot.pack(self.identity, self.denoiser, self.state, seed=self.request.seed,
                               latents=torch.cat(self.done, dim=2))
        if self.ranks.rank == 0:
            snapshot.write(self._path(SNAPSHOT), packed)

    def _finish(self, latents: Tensor) -> None:
        """The latents last: they say that the folder is complete."""
        if self.source.decoder is not None:
            write_mp4(self._path(VIDEO), self.source.decoder()(latents), FPS)
        with whole(self._path(LATENTS)) as temporary:
            save_file({"latents": latents.contiguous()}, temporary)


def fulfil(request: Request, ranks: Ranks, tell: Callable[[str], object]) -> None:
    """One request, unless its folder is complete and it may go on. tell: hears in process 0 how far it is."""
    make_folder(request.folder)
    if request.resume and (request.folder / LATENTS).is_file():
        return
    if ranks.rank == 0:
        (request.folder / LATENTS).unlink(missing_ok=True)
    for number, blocks in Rollout(request, ranks).run():
        if ranks.rank == 0:
            tell(f"{request.folder.name}: block {number} of {blocks}")


def fulfil_all(requests: Sequence[Request], ranks: Ranks) -> None:
    """One after the other. Alone, what is wrong with one does not keep the others from being made."""
    problems = []
    for request in requests:
        try:
            fulfil(request, ranks, lambda text: sys.stderr.write(text + "\n"))
        except ForcingError as error:
            if ranks.size > 1:
                raise
            problems.append(f"{request.folder.name}: {error}")
    if problems:
        raise ForcingError(" ".join(problems))


def main(path: str) -> None:
    with watched():
        requests = unpack(Path(path).read_text(encoding="utf-8"))
        with joined(requests[0].device) as ranks:
            fulfil_all(requests, ranks)


if __name__ == "__main__":
    main(sys.argv[1])
