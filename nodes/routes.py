"""Steering over HTTP and WebSocket: what runs, its state, its newest pictures, and commands for it.

    GET  /forcing/streams                    running streams and the last finished ones
    GET  /forcing/streams/{id}               the state of one
    POST /forcing/streams/{id}/commands      a command (`forcing_core.steering`) -> its number and earliest block
    POST /forcing/streams/{id}/sound?rate&end  a piece of a voice, WAV or 16-bit mono PCM -> how much waits
    GET  /forcing/streams/{id}/log           all commands that it carried out, for the replay input
    GET  /forcing/streams/{id}/frames?after  preview pictures, base64 JPEG
    GET  /forcing/streams/{id}/ws            states as they change; takes the same commands

They are ordinary routes of ComfyUI's server, behind its middleware. No path and no file name is taken from a client. Every
change is also sent to all clients of ComfyUI's own WebSocket as "forcing.stream". Several clients: the last write wins.
"""
from __future__ import annotations

import asyncio
import base64
import json
import logging
import sys
import threading
from typing import Any, Awaitable, Callable

from aiohttp import WSMsgType, web

from ..forcing_core.errors import ForcingError
from ..forcing_core.steering import Refused, read_command
from ..forcing_core.streaming.ear import RATE, Full, pcm_of
from ..forcing_core.streaming.live import OVER, Live

log = logging.getLogger(__name__)
LARGEST_BODY = 1 << 16  # bytes
LARGEST_SOUND = 1 << 20
FINISHED = 8  # streams whose last state is remembered
EVENT = "forcing.stream"
MOST_PICTURES = 48  # of one answer


class Streams:
    """The streams of this process: running ones, and the last states and logs - plain data - of finished ones."""

    def __init__(self):
        self._running: dict[str, Live] = {}
        self._finished: dict[str, dict] = {}
        self._logs: dict[str, dict] = {}  # of the finished ones
        self._listeners: dict[str, set[Callable[[dict], None]]] = {}
        self._lock = threading.Lock()

    def begin(self, live: Live) -> None:
        """Show a stream from now on, until it says that it is over."""
        with self._lock:
            self._running[live.id] = live
            self._finished.pop(live.id, None)
        live.tell = self._tell
        self._tell(live.state())

    def running(self, name: str) -> Live | None:
        with self._lock:
            return self._running.get(name)

    def state(self, name: str) -> dict | None:
        live = self.running(name)
        return live.state() if live is not None else self._finished.get(name)

    def script(self, name: str) -> dict | None:
        """The log of a stream, as a replay takes it."""
        live = self.running(name)
        return live.script() if live is not None else self._logs.get(name)

    def states(self) -> list[dict]:
        with self._lock:
            running, finished = list(self._running.values()), list(self._finished.values())
        return [live.state() for live in running] + finished[::-1]

    def listen(self, name: str, listener: Callable[[dict], None]) -> Callable[[], None]:
        """Call `listener` with every new state; returns how to end that."""
        with self._lock:
            self._listeners.setdefault(name, set()).add(listener)

        def end() -> None:
            with self._lock:
                self._listeners.get(name, set()).discard(listener)
                if not self._listeners.get(name):
                    self._listeners.pop(name, None)
        return end

    def _tell(self, state: dict) -> None:
        with self._lock:
            if state["status"] in OVER:
                live = self._running.pop(state["id"], None)
                self._finished[state["id"]] = state
                if live is not None:
                    self._logs[state["id"]] = live.script()
                while len(self._finished) > FINISHED:
                    oldest = next(iter(self._finished))
                    self._finished.pop(oldest)
                    self._logs.pop(oldest, None)
            listeners = list(self._listeners.get(state["id"], ()))
        server = _server()
        try:
            for listener in listeners:
                listener(state)
            if server is not None:
                server.send_sync(EVENT, state)
        except RuntimeError:  # its loop is closed: ComfyUI is ending
            log.debug("Nobody could be told about %s", state["id"])


STREAMS = Streams()  # plain data and running streams only; nothing of a finished one stays but its last state


def _server():
    """ComfyUI's server, if there is one: in tests and scripts there is not."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


class Problem(Exception):
    """An answer with an HTTP status and a sentence that names the fix."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def _answering(handler: Callable[[web.Request, Streams], Awaitable[Any]], streams: Streams):
    """A handler of aiohttp that answers with JSON whatever happens, and never with a traceback."""
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            made = await handler(request, streams)
            return made if isinstance(made, web.StreamResponse) else web.json_response(made)
        except Problem as problem:
            return web.json_response({"error": str(problem)}, status=problem.status)
        except (web.HTTPException, asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            log.exception("A request for %s failed", request.path)
            return web.json_response({"error": "The server could not answer. Its log says why."}, status=500)
    return answer


def _known(request: web.Request, streams: Streams) -> str:
    name = request.match_info["id"]
    if streams.state(name) is None:
        raise Problem(404, "There is no such stream. Ask /forcing/streams for those that there are.")
    return name


def carry_out(streams: Streams, name: str, body: bytes | str) -> dict:
    """Hand a command on. Raises Problem: 413, 400, 404 or 409."""
    if len(body) > LARGEST_BODY:
        raise Problem(413, f"A command has at most {LARGEST_BODY >> 10} KiB. Shorten the prompt.")
    try:
        value = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "The body is no JSON. Send one object, such as {\"kind\": \"pause\"}.") from error
    try:
        command = read_command(value)
    except ForcingError as error:
        raise Problem(400, str(error)) from error
    live = streams.running(name)
    if live is None:
        raise Problem(409, "This stream is over. Start it again to steer it.")
    try:
        number, block = live.steering.send(command)
    except Refused as error:
        raise Problem(409, str(error)) from error
    except ForcingError as error:  # of the encoder: words that it does not know
        raise Problem(400, str(error)) from error
    return {"number": number, "at_block": block}


def _refuse(constant: str) -> None:
    raise ValueError(constant)


async def _body(request: web.Request, most: int = LARGEST_BODY) -> bytes:
    """The whole body, or one byte more than is allowed: a longer one is not read."""
    parts, size = [], 0
    while size <= most and (part := await request.content.read(most + 1 - size)):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


async def _list(request: web.Request, streams: Streams) -> dict:
    return {"streams": streams.states()}


async def _state(request: web.Request, streams: Streams) -> dict:
    return streams.state(_known(request, streams))


async def _log(request: web.Request, streams: Streams) -> dict:
    return streams.script(_known(request, streams)) or {}


async def _command(request: web.Request, streams: Streams) -> dict:
    name, body = _known(request, streams), await _body(request)
    return await asyncio.get_running_loop().run_in_executor(None, carry_out, streams, name, body)


def hear(streams: Streams, name: str, body: bytes, rate: str, end: bool) -> dict:
    """Hand a piece of a voice on. Raises Problem: 413, 400, 409, or 429 where it is to be sent again later."""
    if len(body) > LARGEST_SOUND:
        raise Problem(413, f"A piece of sound has at most {LARGEST_SOUND >> 10} KiB. Send shorter ones.")
    if not (rate.isascii() and rate.isdigit() and len(rate) <= 6):
        raise Problem(400, f"rate has to be samples a second. Leave it out for {RATE}.")
    live = streams.running(name)
    if live is None:
        raise Problem(409, "This stream is over. Start it again to speak to it.")
    if live.ear is None:
        raise Problem(409, "This stream does not listen. Turn on listen of Forcing Idle Portrait.")
    try:
        return live.ear.push(pcm_of(body, int(rate)), end)
    except Full as error:
        raise Problem(429, str(error)) from error
    except Refused as error:
        raise Problem(409, str(error)) from error
    except ForcingError as error:
        raise Problem(400, str(error)) from error


async def _sound(request: web.Request, streams: Streams) -> dict:
    name, body = _known(request, streams), await _body(request, LARGEST_SOUND)
    query = request.query.get("rate", str(RATE)), request.query.get("end") == "1"
    return await asyncio.get_running_loop().run_in_executor(None, hear, streams, name, body, *query)


async def _frames(request: web.Request, streams: Streams) -> dict:
    name, after = _known(request, streams), request.query.get("after", "-1")
    if not (after.isascii() and after.removeprefix("-").isdigit() and len(after) <= 15):
        raise Problem(400, "after has to be the number of a frame. Leave it out for the newest ones.")
    live = streams.running(name)
    if live is None:
        return {"first": 0, "fps": streams.state(name)["fps"], "frames": [], "newest": -1}
    loop = asyncio.get_running_loop()
    first, pictures, newest = await loop.run_in_executor(None, live.previews.after, int(after), MOST_PICTURES)
    return {"first": first, "fps": live.fps, "frames": [base64.b64encode(p).decode() for p in pictures], "newest": newest}


async def _socket(request: web.Request, streams: Streams) -> web.WebSocketResponse:
    name = _known(request, streams)
    socket = web.WebSocketResponse(max_msg_size=LARGEST_BODY, heartbeat=30)
    await socket.prepare(request)
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    end = streams.listen(name, lambda state: loop.call_soon_threadsafe(news.set))
    sender = asyncio.create_task(_tell_states(socket, streams, name, news))
    try:
        async for message in socket:
            if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                await socket.send_json(await loop.run_in_executor(None, _acknowledged, streams, name, message.data))
    finally:
        end()
        sender.cancel()
    return socket


async def _tell_states(socket: web.WebSocketResponse, streams: Streams, name: str, news: asyncio.Event) -> None:
    """The newest state whenever there is one: a slow client misses some, and nobody waits for it."""
    while not socket.closed:
        state = streams.state(name)
        if state is None:
            return
        await socket.send_json({"type": "state", **state})
        await news.wait()
        news.clear()


def _acknowledged(streams: Streams, name: str, body: bytes | str) -> dict:
    try:
        return {"type": "ack", **carry_out(streams, name, body)}
    except Problem as problem:
        return {"type": "error", "status": problem.status, "error": str(problem)}


ROUTES = (("GET", "/forcing/streams", _list), ("GET", "/forcing/streams/{id}", _state),
          ("POST", "/forcing/streams/{id}/commands", _command), ("GET", "/forcing/streams/{id}/frames", _frames),
          ("POST", "/forcing/streams/{id}/sound", _sound),
          ("GET", "/forcing/streams/{id}/log", _log), ("GET", "/forcing/streams/{id}/ws", _socket))


def table(streams: Streams = STREAMS) -> web.RouteTableDef:
    """The routes over these streams."""
    routes = web.RouteTableDef()
    for method, path, handler in ROUTES:
        routes.route(method, path)(_answering(handler, streams))
    return routes


def register() -> None:
    """Add the routes to ComfyUI's server, where there is one."""
    server = _server()
    if server is not None:
        for route in table():
            server.routes.route(route.method, route.path)(route.handler)
