"""Collect the messages ComfyUI sends over its websocket while prompts run."""
import asyncio
import json
import struct
import threading
from dataclasses import dataclass

from forcing_testkit.poll import until

# Binary message types (protocol.py of ComfyUI).
PREVIEW, PREVIEW_WITH_METADATA = 1, 4


@dataclass(frozen=True)
class Event:
    """`kind` is the message type, or "preview"; `data` is its JSON. `image` holds a preview's encoded bytes."""
    kind: str
    data: dict
    image: bytes = b""


class Events:
    """Iterable list of events, filled by a thread for as long as the `with` block lasts."""

    def __init__(self, url, client_id):
        self.url = f"{url}/ws?clientId={client_id}"
        self.received = []
        self.thread = threading.Thread(target=lambda: asyncio.run(self._collect()), daemon=True)
        self.loop = self.socket = None

    def __enter__(self):
        self.thread.start()
        # The server greets every client with its status: from then on nothing is missed.
        self.wait_for("status")
        return self

    def __exit__(self, *error):
        asyncio.run_coroutine_threadsafe(self.socket.close(), self.loop).result(10)
        self.thread.join(10)

    def __iter__(self):
        return iter(list(self.received))

    def of(self, kind, prompt_id=None):
        """Events of one kind so far, of one prompt if its id is given."""
        return [event for event in self if event.kind == kind and prompt_id in (None, event.data.get("prompt_id"))]

    def wait_for(self, kind, prompt_id=None, timeout=60, count=1):
        """The last event of that kind, as soon as there are `count` of them."""
        found = until(lambda: len(self.of(kind, prompt_id)) >= count and self.of(kind, prompt_id), timeout,
                      f"{kind} event {count}")
        return found[-1]

    async def _collect(self):
        import aiohttp

        self.loop = asyncio.get_running_loop()
        async with aiohttp.ClientSession() as session, session.ws_connect(self.url, max_msg_size=0) as self.socket:
            features = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            await self.socket.send_json(features)
            async for message in self.socket:
                if event := _decode(message.data):
                    self.received.append(event)


def _decode(payload):
    if isinstance(payload, str):
        message = json.loads(payload)
        return Event(message["type"], message.get("data") or {})
    kind, = struct.unpack_from(">I", payload)
    if kind == PREVIEW:
        return Event("preview", {}, payload[8:])
    if kind == PREVIEW_WITH_METADATA:
        size, = struct.unpack_from(">I", payload, 4)
        return Event("preview", json.loads(payload[8:8 + size]), payload[8 + size:])
    return None
