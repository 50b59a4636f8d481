from __future__ import annotations

import io
import tracemalloc
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from gigabatch.data.decode.audio import AudioSettings, decode_audio
from gigabatch.data.decode.audio_headers import expected_samples, is_truncated
from gigabatch.data.errors import BadSample

WHERE = "/data/s.tar: sample 'dog'"
SECOND = AudioSettings(rate=16000, seconds=1.0)
KINDS = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "float wav": {"format": "WAV", "subtype": "FLOAT"},
    "24-bit wav": {"format": "WAVEX", "subtype": "PCM_24"},
    "flac": {"format": "FLAC"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
}
LOSSY = ("vorbis", "opus", "mp3")


def sine(seconds: float, rate: int = 16000, hertz: float = 440, level: float = 0.5) -> NDArray[Any]:
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def saved(wave: NDArray[Any], kind: str = "wav", rate: int = 16000, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, **KINDS.get(kind, {"format": kind}) | options)
    return file.getvalue()


@lru_cache
def noisy(kind: str, **options: Any) -> bytes:
    """Return three seconds of a noisy sine, which does not compress to almost nothing."""
    noise = np.random.default_rng(0).normal(0, 0.05, 48000)
    return saved(sine(3) + noise, kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_decodes_to_its_waveform(kind: str) -> None:
    wave = sine(0.5)
    decoded, length = decode_audio(saved(wave, kind), SECOND, WHERE)
    assert decoded.dtype == torch.float32
    assert decoded.shape == (16000,)
    assert length == 8000
    tolerance = 0.05 if kind in LOSSY else 1e-4
    inside = slice(1000, 7000) if kind in LOSSY else slice(None, 8000)
    torch.testing.assert_close(
        decoded[inside], torch.from_numpy(wave).float()[inside], atol=tolerance, rtol=0
    )
    assert not decoded[8000:].any()


@pytest.mark.parametrize("kind", ["wav", "float wav", "flac"])
def test_channels_are_averaged(kind: str) -> None:
    left, right = sine(1), sine(1, hertz=300, level=0.3)
    decoded, _ = decode_audio(saved(np.stack([left, right], 1), kind), SECOND, WHERE)
    expected = torch.from_numpy((left + right) / 2).float()
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_other_rates_are_resampled(rate: int) -> None:
    decoded, length = decode_audio(saved(sine(0.75, rate), "flac", rate), SECOND, WHERE)
    assert length == 12000
    expected = torch.from_numpy(sine(0.75)).float()
    torch.testing.assert_close(decoded[500:11500], expected[500:11500], atol=2e-3, rtol=0)
    assert not decoded[12000:].any()


@pytest.mark.parametrize(("kind", "rate"), [("wav", 16000), ("flac", 44100), ("mp3", 44100)])
def test_truncation_does_not_change_kept_samples(kind: str, rate: int) -> None:
    data = saved(np.random.default_rng(0).normal(0, 0.1, 3 * rate), kind, rate)
    full, _ = decode_audio(data, AudioSettings(seconds=3.0), WHERE)
    start, length = decode_audio(data, SECOND, WHERE)
    assert length == 16000
    torch.testing.assert_close(start, full[:16000], atol=1e-5, rtol=0)


def test_length_follows_settings() -> None:
    settings = AudioSettings(rate=8000, seconds=0.3)
    decoded, length = decode_audio(saved(sine(1)), settings, WHERE)
    assert decoded.shape == (2400,)
    assert length == 2400
    full, length = decode_audio(saved(sine(1)), AudioSettings(seconds=1.0), WHERE)
    assert (full.shape, length) == ((16000,), 16000)


def decode_error(data: bytes, settings: AudioSettings = SECOND) -> str:
    """Return the one-line error of decoding."""
    with pytest.raises(BadSample) as error:
        decode_audio(data, settings, WHERE)
    message = str(error.value)
    assert message.startswith(f"{WHERE}: the audio cannot be decoded: ")
    assert "\n" not in message
    assert "0x" not in message  # a memory address would differ from run to run
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_file_raises(kind: str) -> None:
    data = noisy(kind)
    settings = AudioSettings(seconds=3.0)
    decode_audio(data, settings, WHERE)
    for share in (0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.8):
        decode_error(data[: int(share * len(data))], settings)


@pytest.mark.parametrize("kind", ["wav", "float wav", "24-bit wav", "flac", "vorbis", "opus"])
def test_file_without_last_byte_raises(kind: str) -> None:
    decode_error(noisy(kind)[:-1], AudioSettings(seconds=3.0))


@pytest.mark.parametrize("kind", ["vorbis", "opus"])
def test_ogg_without_last_page_raises(kind: str) -> None:
    data = noisy(kind)
    assert "truncated" in decode_error(data[: data.rfind(b"OggS")])


@pytest.mark.parametrize(
    "data", [b"", b"not audio", bytes(5000), b"RIFF\0\0\0\0WAVE", b"ID3", b"OggS", b"fLaC"]
)
def test_bytes_that_are_not_audio_raise(data: bytes) -> None:
    decode_error(data)


@pytest.mark.parametrize("kind", ["AIFF", "AU", "CAF", "W64", "RF64"])
def test_unsupported_format_raises_with_its_name(kind: str) -> None:
    assert f"{kind} is not one of wav, flac, ogg, mp3" in decode_error(saved(sine(1), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_file_without_samples_raises(kind: str) -> None:
    decode_error(saved(np.zeros(0), kind))


def test_less_than_one_sample_after_resampling_raises() -> None:
    assert "no samples" in decode_error(saved(np.ones(1), "wav", 48000))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_raise(value: float) -> None:
    wave = sine(0.5)
    wave[3] = value
    assert "not finite" in decode_error(saved(wave, "float wav"))


def wav_with(chunk: bytes, offset: int, value: int, size: int) -> bytes:
    """Return a WAV file with `value` in `size` bytes at `offset` from the start of a chunk."""
    data = bytearray(noisy("wav"))
    position = data.index(chunk) + offset
    data[position : position + size] = value.to_bytes(size, "little")
    return bytes(data)


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_absurd_rate_raises(rate: int) -> None:
    assert f"claims {rate} samples per second" in decode_error(wav_with(b"fmt ", 12, rate, 4))


def test_absurd_number_of_channels_raises() -> None:
    assert "on 1000 channels" in decode_error(wav_with(b"fmt ", 10, 1000, 2))


def test_memory_does_not_depend_on_claimed_length() -> None:
    flac = bytearray(noisy("flac"))
    flac[21] |= 0x0F  # the 36 bits in STREAMINFO for the number of samples
    flac[22:26] = b"\xff" * 4
    mp3 = bytearray(noisy("mp3"))
    count = mp3.index(b"Xing") + 8
    mp3[count : count + 4] = b"\xff" * 4
    rf64 = bytearray(saved(sine(1), "RF64"))
    sizes = rf64.index(b"ds64") + 8
    rf64[sizes : sizes + 24] = (2**60).to_bytes(8, "little") * 3
    for data in (flac, mp3, rf64):
        tracemalloc.start()
        decode_error(bytes(data), AudioSettings(seconds=10.0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wav_of_unknown_size_is_read_to_its_end(size: int) -> None:
    data = wav_with(b"data", 4, size, 4)
    decoded, length = decode_audio(data, AudioSettings(seconds=4.0), WHERE)
    assert length == 48000
    assert torch.equal(decoded, decode_audio(noisy("wav"), AudioSettings(seconds=4.0), WHERE)[0])


def test_other_wav_chunks_are_skipped() -> None:
    data = noisy("wav")
    position = data.index(b"data")
    chunk = b"LIST\x05\0\0\0abcde\0"  # a chunk of odd size is padded
    more = data[:position] + chunk + data[position:] + chunk
    assert torch.equal(decode_audio(more, SECOND, WHERE)[0], decode_audio(data, SECOND, WHERE)[0])
    decode_error(more[: -len(chunk) - 2])


def without_xing(data: bytes) -> bytes:
    """Return an MP3 file without its first frame, which holds only the Xing tag."""
    return data[data.index(data[:2], 2) :]


def test_mp3_after_id3_tag_is_decoded() -> None:
    tag = b"ID3\x04\0\0\0\0\x07\x76" + bytes(1014)
    settings = AudioSettings(seconds=3.0)
    tagged, length = decode_audio(tag + noisy("mp3"), settings, WHERE)
    assert length == 48000
    assert torch.equal(tagged, decode_audio(noisy("mp3"), settings, WHERE)[0])
    decode_error(tag + noisy("mp3")[:4000], settings)


def test_mp3_of_constant_bit_rate_needs_no_xing_header() -> None:
    data = without_xing(noisy("mp3", bitrate_mode="CONSTANT", compression_level=0.5))
    _, length = decode_audio(data, AudioSettings(seconds=4.0), WHERE)
    assert 48000 <= length < 48000 + 3 * 1152


def mp3_of_varying_rate(quiet_first: bool) -> bytes:
    """Return an MP3 without Xing header whose first frames have another bit rate than the rest."""
    noise = np.random.default_rng(0).normal(0, 0.2, 24000)
    parts = [np.zeros(24000), noise] if quiet_first else [noise, np.zeros(24000)]
    data = saved(np.concatenate(parts), "mp3", bitrate_mode="VARIABLE", compression_level=0.5)
    return without_xing(data)


def test_mp3_with_overestimated_length_is_decoded() -> None:
    _, length = decode_audio(
        mp3_of_varying_rate(quiet_first=True), AudioSettings(seconds=4.0), WHERE
    )
    assert 48000 <= length < 48000 + 3 * 1152


def test_mp3_with_underestimated_length_raises() -> None:
    message = decode_error(mp3_of_varying_rate(quiet_first=False), AudioSettings(seconds=4.0))
    assert "varying bit rate needs a Xing header" in message


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
def test_expected_samples_counts_mp3_frames(rate: int) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, rate)
    data = saved(wave, "mp3", rate, bitrate_mode="CONSTANT", compression_level=0.5)
    without_tag = without_xing(data)
    with soundfile.SoundFile(io.BytesIO(without_tag)) as file:
        samples_read = len(file.read())
    tag = b"ID3\x04\0\0\0\0\0\x14" + bytes(20)
    for frames in (without_tag, tag + without_tag):
        assert expected_samples(frames, "MP3", -1, 10**9) == samples_read
        assert 1000 <= expected_samples(frames, "MP3", -1, 1000) < 1000 + 1152
    assert expected_samples(without_tag + b"junk" + without_tag, "MP3", -1, 10**9) == samples_read


def test_expected_samples_trusts_xing_frame_count() -> None:
    for name, mode in ((b"Xing", "VARIABLE"), (b"Info", "CONSTANT")):
        data = bytearray(noisy("mp3", bitrate_mode=mode, compression_level=0.5))
        assert expected_samples(bytes(data), "MP3", 123, 10**9) == 123
        data[data.index(name) + 7] &= 0xFE
        assert expected_samples(bytes(data), "MP3", 123, 10**9) > 48000


def test_mp3_may_lack_a_few_claimed_frames() -> None:
    data = bytearray(noisy("mp3"))
    position = data.index(b"Xing") + 8
    frames = int.from_bytes(data[position : position + 4], "big")
    settings = AudioSettings(seconds=4.0)
    data[position : position + 4] = (frames + 3).to_bytes(4, "big")
    assert decode_audio(bytes(data), settings, WHERE)[1] >= 48000
    data[position : position + 4] = (frames + 9).to_bytes(4, "big")
    decode_error(bytes(data), settings)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"", "WAV"), (b"RIFF\x04\0\0\0WAVE", "WAV"), (b"", "OGG"), (b"OggS", "OGG"),
     (b"\xff" * 40, "OGG")],
)  # fmt: skip
def test_file_without_end_mark_is_truncated(data: bytes, kind: str) -> None:
    assert is_truncated(data, kind)


def outcome(data: bytes) -> str:
    """Return `an error` or `a waveform` if decoding behaves, else what it returned."""
    try:
        decoded, length = decode_audio(data, SECOND, WHERE)
    except BadSample as error:
        return "an error" if str(error).startswith(WHERE) else str(error)
    valid = decoded.shape == (16000,) and decoded.isfinite().all() and 0 < length <= 16000
    return "a waveform" if valid else f"{decoded}, {length}"


@pytest.mark.parametrize("kind", ["wav", "flac", "vorbis", "mp3"])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))))
def test_damage_gives_a_waveform_or_a_clear_error(
    kind: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(saved(sine(0.2), kind))
    for share, byte in changes:
        data[int(share**3 * len(data))] = byte  # mostly in the headers
    assert outcome(bytes(data)) in ("a waveform", "an error")


@pytest.mark.parametrize(
    "settings",
    [{"rate": 0}, {"rate": 10**9}, {"seconds": 0}, {"seconds": float("inf")}, {"channels": 2}],
)
def test_invalid_settings_raise_validation_error(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AudioSettings(**settings)  # type: ignore[arg-type]
