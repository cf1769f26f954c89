"""Steering a rollout while it runs: commands, the mailbox that a rollout asks before every block, and their exact replay.

    steering = Steering(prepare=encode)            thread-safe; `send` from anywhere
    helm = Helm(steering, denoiser, noise, ...)    what a rollout is given as `steer`
    for block, x0 in block_rollout(..., steer=helm): ...
    again = Steering(steering.log, prepare=encode)     does the same at the same blocks, bit for bit

A block never changes while it is made: a command acts before the next block that begins, and the log says which one that
was. Pauses change no number, so a replay does not wait. Changes of prompt go the ways of `rollout/transitions.py`.
"""
from __future__ import annotations

import json
import math
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Iterable, Sequence

from torch import Tensor

from .errors import ForcingError
from .noise import BlockNoise
from .plan import Block
from .rollout.transitions import Switch, take_up
from .track import KINDS, SOFT_BLOCKS

LONGEST_TEXT, LONGEST_NAME = 20_000, 200  # characters
MOST_WAITING = 256
LONGEST_LOG, MOST_ENTRIES = 16 << 20, 100_000  # bytes, commands
PATIENCE = 0.1  # seconds between two looks at whether a paused run is to be interrupted
LARGEST = 1 << 40
PAUSES = {"pause": True, "resume": False, "stop": False}  # whether a run is paused after such a command


class Refused(ForcingError):
    """A command that makes sense, but not for this run, or not now."""


@dataclass(frozen=True)
class Command:
    """kind: key of FIELDS, which says what of the rest belongs to it. text, transition, blocks: the new prompt and how it
    takes over (blocks: of a soft transition). seed: of the coming blocks. strength, name: of a LoRA that the model has.
    client: who sent it. Raises ForcingError for values that cannot be meant."""

    kind: str
    text: str = ""
    transition: str = "recache"
    blocks: int = SOFT_BLOCKS
    seed: int = 0
    strength: float = 1.0
    name: str | None = None
    client: str = ""

    def __post_init__(self):
        if self.kind not in FIELDS:
            raise ForcingError(f"There is no command {_shown(self.kind)}. Use one of {', '.join(FIELDS)}.")
        for name in (*FIELDS[self.kind], "client"):
            CHECKS[name](getattr(self, name))

    def plain(self) -> dict[str, Any]:
        """What JSON can hold, and `read_command` reads."""
        names = [name for name in (*FIELDS[self.kind], "client") if getattr(self, name) not in (None, "")]
        return {"kind": self.kind, **{name: getattr(self, name) for name in names}}


def _text(value: Any, name: str, longest: int) -> None:
    if type(value) is not str or len(value) > longest:
        raise ForcingError(f"{name} has to be a text of at most {longest} characters.")
    if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in value):
        raise ForcingError(f"{name} holds characters that are none. Send plain UTF-8.")


def _prompt(value: Any) -> None:
    _text(value, "text", LONGEST_TEXT)
    if not value.strip():
        raise ForcingError("The prompt is empty. Write what is to be seen from now on.")


def _transition(value: Any) -> None:
    if type(value) is not str or value not in KINDS:
        raise ForcingError(f"{_shown(value)} is not a transition. Use one of {', '.join(KINDS)}.")


def _number(name: str, low: int, high: int) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise ForcingError(f"{name} has to be a whole number from {low} to {high}.")
    return check


def _strength(value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= 100 or not math.isfinite(value):
        raise ForcingError("strength has to be a number from -100 to 100.")


# kind -> names of what belongs to it; name -> its check
FIELDS: dict[str, tuple[str, ...]] = {"prompt": ("text", "transition", "blocks"), "seed": ("seed",),
                                      "lora": ("strength", "name"), "pause": (), "resume": (), "stop": ()}
REQUIRED = {"text", "seed", "strength"}
CHECKS: dict[str, Callable[[Any], None]] = {
    "text": _prompt, "transition": _transition, "blocks": _number("blocks", 2, 1000),
    "seed": _number("seed", 0, (1 << 64) - 1), "strength": _strength,
    "name": lambda value: value is None or _text(value, "name", LONGEST_NAME),
    "client": lambda value: _text(value, "client", LONGEST_NAME)}


def read_command(value: Any) -> Command:
    """The command of a JSON object that nobody vouches for. Raises ForcingError, naming the fix, for everything else."""
    if type(value) is not dict or type(value.get("kind")) is not str or value["kind"] not in FIELDS:
        raise ForcingError(f"A command is a JSON object with a kind: one of {', '.join(FIELDS)}.")
    names = FIELDS[value["kind"]]
    extra = [name for name in value if name not in (*names, "kind", "client")]
    if extra:
        raise ForcingError(f"A command of the kind {value['kind']} has no {_shown(extra[0])}. Leave it out.")
    missing = [name for name in names if name in REQUIRED and name not in value]
    if missing:
        raise ForcingError(f"A command of the kind {value['kind']} needs {missing[0]}. Add it.")
    return Command(**value)


def _shown(value: Any) -> str:
    return repr(value if len(repr(value)) <= 60 else repr(value)[:60] + "...")


@dataclass(frozen=True)
class Entry:
    """A command that was carried out. number: counts the commands of a run from 1. block: index of the first block it
    acted on. at_frame: number of that block's first frame of video, as a file counts them."""

    number: int
    block: int
    at_frame: int
    command: Command

    def plain(self) -> dict[str, Any]:
        return {"number": self.number, "block": self.block, "at_frame": self.at_frame, **self.command.plain()}


def pixel_frame(latent_frame: int) -> int:
    """Number of the first frame of video that a latent frame decodes to."""
    return max(0, 4 * latent_frame - 3)


def write_log(log: Sequence[Entry]) -> str:
    """JSON that `read_log` reads."""
    return json.dumps({"version": 1, "log": [entry.plain() for entry in log]})


def read_log(text: str) -> tuple[Entry, ...]:
    """A log as `write_log` writes it, or only its list of entries; nothing for an empty text. Raises ForcingError, naming
    the entry, for what is no such log."""
    if not text.strip():
        return ()
    if len(text) > LONGEST_LOG:
        raise ForcingError(f"The log is longer than {LONGEST_LOG >> 20} MB. Replay it in parts.")
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ForcingError("The log is no JSON. Paste the log of a steered stream as it is in the file or in the "
                           "panel.") from error
    return read_entries(found.get("log") if isinstance(found, dict) else found)


def read_entries(found: Any) -> tuple[Entry, ...]:
    """The entries of a list of JSON objects, checked. Raises ForcingError for anything else."""
    if not isinstance(found, list) or len(found) > MOST_ENTRIES:
        raise ForcingError(f"The log is no list of at most {MOST_ENTRIES} commands. Paste the log of a steered stream.")
    entries = tuple(_entry(value, place) for place, value in enumerate(found, 1))
    if any(one.block > other.block for one, other in zip(entries, entries[1:])):
        raise ForcingError("The commands of the log are not in the order of their blocks. Sort them.")
    return entries


def _entry(value: Any, place: int) -> Entry:
    try:
        if not isinstance(value, dict):
            raise ForcingError("It is no JSON object.")
        numbers = [value.get(name) for name in ("number", "block", "at_frame")]
        if any(type(n) is not int or not 0 <= n < LARGEST for n in numbers):
            raise ForcingError("It needs number, block and at_frame, whole numbers from 0 on.")
        return Entry(*numbers, read_command({k: v for k, v in value.items() if k not in ("number", "block", "at_frame")}))
    except ForcingError as error:
        raise ForcingError(f"Command {place} of the log cannot be replayed: {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(constant)


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
    between two blocks. check: raises Refused for commands that this run cannot do. changed: called, from any thread, after
    everything that changes what `log`, `paused` or `trouble` say.
    """

    script: Sequence[Entry] = ()
    prepare: Callable[[str], Any] | None = None
    background: bool = False
    check: Callable[[Command], None] = lambda command: None
    changed: Callable[[], None] = lambda: None
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
            if (entry.block, entry.at_frame) != (block.index, pixel_frame(block.first)):
                raise ForcingError(f"Command {entry.number} of the log acted at block {entry.block}, frame {entry.at_frame}; "
                                   f"here block {block.index} begins at frame {pixel_frame(block.first)}. Use the block size "
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
        entry = Entry(waiting.number, block.index, pixel_frame(block.first), command)
        self.log.append(entry)
        return [(entry, made)]


def _stops(taken: Iterable[tuple[Entry, Any]]) -> bool:
    return any(entry.command.kind == "stop" for entry, _ in taken)


@dataclass
class SteeredNoise:
    """Noise of (seed, block, step) whose seed may change: a block keeps the one that ruled when it began.

    inner: with the seed of the start. changes: (index of the first block, seed), rising.
    """

    inner: BlockNoise
    changes: list[tuple[int, int]] = field(default_factory=list)

    def change(self, block: int, seed: int) -> None:
        self.changes.append((block, seed))

    @property
    def seed(self) -> int:
        """Of the newest blocks."""
        return self.changes[-1][1] if self.changes else self.inner.seed

    def initial(self, block: Block) -> Tensor:
        return self._of(block).initial(block)

    def renoise(self, block: Block, step: int) -> Tensor:
        return self._of(block).renoise(block, step)

    def _of(self, block: Block) -> BlockNoise:
        ruling = [seed for first, seed in self.changes if first <= block.index]
        return replace(self.inner, seed=ruling[-1]) if ruling else self.inner


@dataclass
class Helm:
    """Carries commands out before a block: what a rollout is given as `steer`, and calls with the block that comes and the
    switches that are still ahead. False ends the rollout.

    size: latent frames of an ordinary block. lora: sets the strength of the LoRA of that name, or of the only one.
    alive: raises where a paused run is to end. text: the steered prompt that rules now, None before the first one.
    stopping: set once the run was told to stop; `stopped` is called then, while the memory is still that of whole blocks.
    """

    steering: Steering
    denoiser: Any
    noise: SteeredNoise
    size: int
    lora: Callable[[str | None, float], None] | None = None
    alive: Callable[[], None] = lambda: None
    stopped: Callable[[], None] = lambda: None
    text: str | None = None
    stopping: bool = False

    def __call__(self, block: Block, pending: deque[Switch]) -> bool:
        for entry, made in self.steering.boundary(block, self.alive):
            ACTIONS[entry.command.kind](self, entry.command, block, pending, made)
        if self.stopping:
            self.stopped()
        return not self.stopping

    def restore(self, blocks: Sequence[Block], switches: Sequence[Switch]) -> Sequence[Switch]:
        """Be as after the blocks of a run that is gone on with, of which `steering.log` is left. Returns the switches for
        the rollout: those of the last prompt, or the given ones of the prompt track where there was none."""
        pending = deque(sorted(switches, key=lambda s: s.at))
        for entry in self.steering.log:
            if entry.command.kind in ("seed", "lora"):
                ACTIONS[entry.command.kind](self, entry.command, blocks[entry.block], pending, None)
        prompts = self.steering.prompts
        if prompts and prompts[0][0].block:
            take_up(self.denoiser, pending, blocks[prompts[0][0].block - 1].first)
        for place, (entry, made) in enumerate(prompts):
            if place:
                self.denoiser.replace_text(1)  # the one before rules by now
            _prompt_now(self, entry.command, blocks[entry.block], pending, made)
        return tuple(pending)


def _prompt_now(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    """A steered prompt rules until the next one: what is left of a prompt track is dropped."""
    helm.text = command.text
    helm.denoiser.push_prompt(made)
    pending.clear()
    if command.transition != "soft":
        pending.append(Switch(block.first, 1, transition=command.transition))
        return
    places = [block.first, *(block.end + i * helm.size for i in range(command.blocks - 1))]
    pending.extend(Switch(at, 1, transition="soft", previous=0, weight=i / command.blocks)
                   for i, at in enumerate(places[:-1], 1))
    pending.append(Switch(places[-1], 1, transition="keep"))


def _seed_now(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    helm.noise.change(block.index, command.seed)


def _lora_now(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    if helm.lora is not None:
        helm.lora(command.name, command.strength)


def _stop_now(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    helm.stopping = True


def _nothing(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    """`Steering.boundary` has waited already."""


ACTIONS: dict[str, Callable[[Helm, Command, Block, deque, Any], None]] = {
    "prompt": _prompt_now, "seed": _seed_now, "lora": _lora_now, "pause": _nothing, "resume": _nothing, "stop": _stop_now}
