"""A voice in pieces: given to frames in order, once, heard as it moved the mouth, and held back where it comes too fast."""
import io
import wave

import av
import numpy
import pytest
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.steering import Refused
from forcing_pack.forcing_core.streaming import Audio, VideoSink
from forcing_pack.forcing_core.streaming.ear import KEPT, MOST, RATE, Ear, pcm_of


def tone(seconds, loud=0.5):
    return (loud * numpy.sin(2 * numpy.pi * 300 * numpy.arange(round(seconds * RATE)) / RATE)).astype(numpy.float32)


def raw(samples):
    return (samples * 32767).astype("<i2").tobytes()


def wav(samples, rate=RATE, channels=1, width=2):
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw(samples) if width == 2 else bytes(len(samples) * width))
    return data.getvalue()


def test_pieces_open_the_mouth_in_order_and_silence_shuts_it():
    ear = Ear(16)
    ear.push(tone(0.5))
    first = ear.opening(0, 12)
    assert min(first[2:8]) > 0.6 and first[-1] < first[7]
    ear.push(tone(0.5))
    later = ear.opening(12, 20)
    assert max(later[:8]) > 0.6 and max(later[13:]) < 0.05


def test_what_a_frame_was_given_stays_its_own():
    """Steps of one block ask several times, and a pass may go back."""
    ear = Ear(16)
    ear.push(tone(1.0))
    asked = ear.opening(0, 13)
    ear.push(tone(1.0, 0.01))
    assert ear.opening(0, 13) == asked and ear.opening(0, 17)[:13] == asked
    assert numpy.allclose(ear[:, 0:13000], tone(1.0)[None, :13000])


@pytest.mark.parametrize("fps", [16, 25, 24000 / 1001])
def test_every_sample_is_heard_once(fps):
    ear, voice, frames = Ear(fps), tone(9.0), 0
    for start in range(0, len(voice), 1777):
        ear.push(voice[start:start + 1777])
        while (frames + 1) * RATE / fps <= min(start + 1777, len(voice)):
            ear.opening(frames, 1)
            frames += 1
    heard = ear[:, 0:int(frames * RATE / fps)][0]
    assert len(heard) > 8 * RATE and numpy.array_equal(heard, voice[:len(heard)])


def test_too_much_is_refused_until_the_stream_has_come_to_it():
    ear = Ear(16)
    ear.push(tone(9.5))
    with pytest.raises(Refused, match="9.5 s of sound wait already, and at most 10 s may. Send the piece again"):
        ear.push(tone(1.0))
    ear.opening(0, 16)
    assert ear.push(tone(1.0)) == {"waiting": 9.5} and len(tone(9.5)) < MOST


def test_the_end():
    ear = Ear(16)
    ear.push(tone(0.1), end=True)
    with pytest.raises(Refused, match="has ended"):
        ear.push(tone(0.1))
    assert ear.opening(0, 2)[0] > 0.5  # what waited is still heard
    other = Ear(16)
    other.push(tone(0.1))
    other.close()
    assert max(other.opening(0, 4)) == 0


def test_memory_ends_after_two_minutes():
    ear = Ear(16)
    ear.opening(0, 16 * 200)
    assert len(ear._given) <= KEPT + RATE and len(ear._opening) <= 16 * (KEPT / RATE + 1)
    assert ear.opening(0, 2) == [0.0, 0.0] and not ear[:, 0:100].any()
    ear.push(tone(1.0))
    ear.opening(3200, 16)
    assert numpy.allclose(ear[:, 200 * RATE:201 * RATE], tone(1.0)[None])


def test_a_file_has_the_voice_in_its_place(tmp_path):
    ear = Ear(16)
    with VideoSink(tmp_path / "a", 16, "mkv lossless", audio=Audio(ear, RATE)) as sink:
        for block in range(8):
            if block == 3:
                ear.push(tone(1.0))
            ear.opening(12 * block, 12)
            sink.write(numpy.zeros((12, 32, 32, 3), numpy.uint8))
    with av.open(str(sink.path)) as container:
        sound = numpy.concatenate([frame.to_ndarray().flatten() for frame in container.decode(audio=0)]) / 32768
    loud = numpy.flatnonzero(numpy.abs(sound) > 0.1)
    assert len(sound) == 6 * RATE and abs(loud[0] - 36 * 1000) < 20 and abs(loud[-1] - 52 * 1000) < 30


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_and_wav_files(rate):
    voice = numpy.sin(2 * numpy.pi * 100 * numpy.arange(rate) / rate).astype(numpy.float32) * 0.5
    wanted = 0.5 * numpy.sin(2 * numpy.pi * 100 * numpy.arange(RATE) / RATE)
    for made in (pcm_of(raw(voice), rate), pcm_of(wav(voice, rate)), pcm_of(wav(numpy.repeat(voice, 2), rate, 2))):
        assert len(made) == RATE and numpy.abs(made - wanted)[:-4].max() < 0.01


@pytest.mark.parametrize(("body", "rate", "match"), [
    (b"RIFFxxxx", RATE, "WAV cannot be read.*Send 16-bit PCM"), (wav(tone(0.1), width=4), RATE, "has 32 bits"),
    (b"\0\0\0", RATE, "end in the middle"), (b"\0\0", 4000, "4000 samples a second are not taken"),
])
def test_what_is_no_sound(body, rate, match):
    with pytest.raises(ForcingError, match=match):
        pcm_of(body, rate)
