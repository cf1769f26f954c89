"""The mailbox that a rollout asks before every block: commands from any thread, or those of a log to be replayed."""
from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Sequence

from ..errors import ForcingError
from ..plan import Block
from .command import Command, Refused
from .log import Entry, pixel_frame

MOST_WAITING = 256
PATIENCE = 0.1  # seconds between two looks at whether a paused run is to be interrupted
KINDS = ("prompt", "seed", "lora", "pause", "resume", "stop")  # what a video that prompts steer can be told
PAUSES = {"pause": True, "resume": False, "stop": False}  # whether a run is paused after such a command


@dataclass
class _Waiting:
    number: int
    command: Command
    made: Future | None = None  # what `prepare` makes of a prompt in the background

    @property
    def ready(self) -> bool:
        return self.made is None or self.made.done()


@dataclass
class Steering:
    """Commands for one run, from any thread, and the log of those that were carried out.

    script: a log to be replayed. prepare: makes of a prompt's text what the denoiser
    takes. background: it does so in a thread of its own when a prompt arrives, so that no block waits for it; otherwise
    between two blocks. check: raises Refused for commands that this run cannot do. kinds: of the commands that it knows at
    all. pixels: number of the first frame of video of a latent frame. changed: called, from any thread, after
    everything that changes what `log`, `paused` or `trouble` say.
    """

    script: Sequence[Entry] = ()
    prepare: Callable[[str], Any] | None = None
    background: bool = False
    check: Callable[[Command], None] = lambda command: None
    changed: Callable[[], None] = lambda: None
    kinds: Sequence[str] = KINDS
    pixels: Callable[[int], int] = pixel_frame
    log: list[Entry] = field(init=False)
    paused: bool = field(init=False, default=False)
    trouble: str | None = field(init=False, default=None)  # why the newest prompt could not be encoded

    def __post_init__(self):
        self.log, self._ahead = [], deque(self.script)
        for entry in self._ahead:
            self._accept(entry.command)
        self._number = max((entry.number for entry in self.script), default=0)
        self._next, self._open = 0, True
        self._inbox: list[_Waiting] = []
        self._news = threading.Condition()
        self._pool: ThreadPoolExecutor | None = None
        # those of a script are known: nothing has to be encoded while it runs
        texts = dict.fromkeys(entry.command.text for entry in self._ahead if entry.command.kind == "prompt")
        self._scripted = {text: self._prepare(text) for text in texts}

    def go_on(self, past: Sequence[Entry], done: int) -> None:
        """Before the first block: be as in a run whose last block was `done`, which `past` is the log of."""
        self.log = [entry for entry in past if entry.block <= done]
        self._ahead = deque(entry for entry in self._ahead if entry.block > done)
        self._number = max([self._number, *(entry.number for entry in self.log)])
        self._next = done + 1
        self._scripted |= {entry.command.text: self._prepare(entry.command.text) for entry in self._last_prompts()}

    def send(self, command: Command) -> tuple[int, int]:
        """(number of the command, index of the first block that it can act on). Raises Refused where it cannot be carried
        out, or the run is over."""
        self._accept(command)
        with self._news:
            if not self._open:
                raise Refused("This stream is over. Start it again to steer it.")
            if len(self._inbox) >= MOST_WAITING:
                raise Refused(f"{MOST_WAITING} commands wait for the next block already. Wait until it begins.")
            self._number += 1
            waiting = _Waiting(self._number, command)
            if command.kind == "prompt" and self.background:
                self._pool = self._pool or ThreadPoolExecutor(1, "forcing-prompt")
                waiting.made = self._pool.submit(self._prepare, command.text)
                waiting.made.add_done_callback(self._encoded)
            self._inbox.append(waiting)
            self._news.notify_all()
            return waiting.number, self._next

    def boundary(self, block: Block, alive: Callable[[], None] = lambda: None) -> list[tuple[Entry, Any]]:
        """The commands that act before a block, in their order, each with what `prepare` made of it; with "stop" among
        them the block is not to be made. Waits while the run is paused; `alive` is called meanwhile and may raise."""
        taken = self._scripted_until(block)
        if taken:
            self.changed()
        while not _stops(taken):
            ready = self._take(block)
            for waiting in ready:
                taken += self._carried_out(waiting, block)
            if ready:
                self.changed()
            if not self.paused:
                break
            alive()
            with self._news:
                if not any(waiting.ready for waiting in self._inbox):
                    self._news.wait(PATIENCE)
        return taken

    def close(self) -> None:
        """The run is over: nothing is accepted any more, and a thread that still encodes is not waited for."""
        with self._news:
            self._open, self.paused = False, False
            self._inbox.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def prompts(self) -> list[tuple[Entry, Any]]:
        """The last prompt of the log of a run that is gone on with, after the one that ruled before it."""
        return [(entry, self._scripted[entry.command.text]) for entry in self._last_prompts()]

    def _last_prompts(self) -> list[Entry]:
        found = [entry for entry in self.log if entry.command.kind == "prompt"]
        return [entry for entry in found if entry.block < found[-1].block][-1:] + found[-1:]

    def _accept(self, command: Command) -> None:
        if command.kind not in self.kinds:
            raise Refused(f"This stream knows no command {command.kind}. Use one of {', '.join(self.kinds)}.")
        if command.kind == "prompt" and self.prepare is None:
            raise Refused("There is no text encoder to encode a new prompt. Connect a CLIP to the clip input of Forcing "
                          "Stream.")
        self.check(command)

    def _prepare(self, text: str) -> Any:
        if self.prepare is None:
            raise Refused("There is no text encoder for the prompts of the log. Connect a CLIP to the clip input of Forcing "
                          "Stream.")
        return self.prepare(text)

    def _encoded(self, made: Future) -> None:
        with self._news:
            self._news.notify_all()

    def _take(self, block: Block) -> list[_Waiting]:
        with self._news:
            ready = [waiting for waiting in self._inbox if waiting.ready]
            self._inbox = [waiting for waiting in self._inbox if waiting not in ready]
            for waiting in ready:
                self.paused = PAUSES.get(waiting.command.kind, self.paused)
            self._next = block.index + (0 if self.paused else 1)
            return ready

    def _scripted_until(self, block: Block) -> list[tuple[Entry, Any]]:
        taken = []
        while self._ahead and self._ahead[0].block <= block.index:
            entry = self._ahead.popleft()
            begins = self.pixels(block.first)
            if (entry.block, entry.at_frame) != (block.index, begins):
                raise ForcingError(f"Command {entry.number} of the log acted at block {entry.block}, frame {entry.at_frame}; "
                                   f"here block {block.index} begins at frame {begins}. Use the block size "
                                   "and the given frames of the stream that wrote it.")
            self.log.append(entry)
            taken.append((entry, self._scripted.get(entry.command.text)))
        return taken

    def _carried_out(self, waiting: _Waiting, block: Block) -> list[tuple[Entry, Any]]:
        command, made = waiting.command, None
        if command.kind == "prompt":
            try:
                made = self._prepare(command.text) if waiting.made is None else waiting.made.result()
                self.trouble = None
            except Exception as error:  # of whatever encodes: no reason to end the video
                self.trouble = f"Prompt {waiting.number} was not used: {error}"
                return []
        entry = Entry(waiting.number, block.index, self.pixels(block.first), command)
        self.log.append(entry)
        return [(entry, made)]


def _stops(taken: Iterable[tuple[Entry, Any]]) -> bool:
    return any(entry.command.kind == "stop" for entry, _ in taken)
