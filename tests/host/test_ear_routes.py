"""A voice over HTTP: pieces reach the ear of a running stream, and every other answer names the fix."""
import asyncio

import numpy
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from forcing_pack.forcing_core.steering import Steering
from forcing_pack.forcing_core.streaming.ear import RATE, Ear
from forcing_pack.forcing_core.streaming.live import Live
from forcing_pack.nodes import routes

PIECE = (0.5 * numpy.sin(numpy.arange(RATE) / 10) * 32767).astype("<i2").tobytes()  # a second


def client(test, ear):
    """Run an async test with (post(query, body) -> (status, answer), the running stream)."""
    async def go():
        streams = routes.Streams()
        live = Live("p.1", "1", "p", 16.0, Steering())
        live.ear = ear
        streams.begin(live)
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(routes.table(streams))
        async with TestClient(TestServer(app)) as asked:
            async def post(query="", body=PIECE, name="p.1"):
                answer = await asked.post(f"/forcing/streams/{name}/sound{query}", data=body)
                return answer.status, await answer.json()
            await test(post, live)
    asyncio.run(go())


def test_pieces_reach_the_ear_until_too_much_waits():
    ear = Ear(16)

    async def test(post, live):
        assert await post() == (200, {"waiting": 1.0})
        assert await post("?rate=8000") == (200, {"waiting": 3.0})
        for _ in range(7):
            assert (await post())[0] == 200
        status, said = await post()
        assert status == 429 and "10.0 s of sound wait already" in said["error"]
        assert max(ear.opening(0, 16)) > 0.9  # the stream comes to it
        assert await post() == (200, {"waiting": 10.0})
    client(test, ear)


def test_the_end_of_the_voice_and_of_the_stream():
    async def test(post, live):
        assert await post("?end=1") == (200, {"waiting": 1.0})
        status, said = await post()
        assert status == 409 and "has ended" in said["error"]
        live.over()
        status, said = await post()
        assert status == 409 and "is over" in said["error"]
    client(test, Ear(16))


def test_what_is_no_sound_is_answered_without_tracebacks():
    async def test(post, live):
        for query, body, status in (("", b"\0", 400), ("", b"RIFFnonsense", 400), ("?rate=x", PIECE, 400),
                                    ("?rate=9999999", PIECE, 400), ("?rate=100", PIECE, 400), ("", b"", 200),
                                    ("", bytes((1 << 20) + 2), 413)):
            answer = await post(query, body)
            assert answer[0] == status and "Traceback" not in str(answer), (query, answer)
        assert (await post(name="other"))[0] == 404
    client(test, Ear(16))


def test_a_stream_that_does_not_listen_says_so():
    async def test(post, live):
        status, said = await post()
        assert status == 409 and "Turn on listen of Forcing Idle Portrait" in said["error"]
    client(test, None)
