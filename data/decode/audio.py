"""Decode audio to a mono waveform of fixed rate and length, truncated or zero-padded."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gigabatch.data.decode.audio_headers import expected_samples, is_truncated
from gigabatch.data.decode.signatures import describe_bytes
from gigabatch.data.errors import BadSample
from gigabatch.data.settings import Settings

AUDIO_MEMBERS = ("wav", "flac", "ogg", "mp3")
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
_NAMES = ("a WAV", "a FLAC", "an Ogg file", "an MP3")
_RATES = (1_000, 1_000_000)
_MAX_CHANNELS = 64
_MARGIN_S = 0.1
"""Seconds read beyond the kept part: the reach of the resampling filter, so that the end of the
kept part is the same as in the full file."""
_MISSING_SAMPLES = 3 * 1152
"""Number of samples that may be missing: codecs drop up to three of their frames at the ends."""

F32 = NDArray[np.float32]


class AudioSettings(Settings):
    """Rate and length of audio; all channels are averaged to one."""

    rate: int = Field(16000, ge=1_000, le=192_000)
    """Samples per second; audio of a different rate is resampled."""
    member: str | None = Field(None, pattern=r"^[^/\s]+$")
    """Extension of the audio's member, such as `flac`, for samples that have several. Unset: the
    only one of wav, flac, ogg and mp3; a sample with two of them is an error."""
    seconds: float = Field(10.0, ge=0.01, le=3600)
    """Length in seconds; longer audio is truncated, shorter audio padded with silence."""

    @property
    def members(self) -> tuple[str, ...]:
        """Possible extensions of the audio's member, in the order in which they are tried."""
        return AUDIO_MEMBERS if self.member is None else (self.member.lower(),)

    @property
    def samples(self) -> int:
        """Length in samples."""
        return round(self.rate * self.seconds)


def decode_audio(data: bytes, settings: AudioSettings, where: str) -> tuple[Tensor, int]:
    """Decode a WAV, FLAC, OGG or MP3 file.

    Args:
        data: Contents of the file.
        settings: Rate and length of the result.
        where: Name of the sample, for error messages.

    Returns:
        The waveform, float32 [settings.samples], and the number of samples before the padding.

    Raises:
        BadSample: if the file is not such audio, is truncated inside the kept part, or has no
            samples.
    """
    import soxr

    wave, rate = _read_start(data, settings.seconds + _MARGIN_S, where)
    if rate != settings.rate:
        wave = soxr.resample(wave, rate, settings.rate)
    wave = wave[: settings.samples]
    if not len(wave):
        raise _error(where, "it has no samples")
    if not np.isfinite(wave).all():
        raise _error(where, "it has values that are not finite")
    out = np.zeros(settings.samples, np.float32)
    out[: len(wave)] = wave
    return torch.from_numpy(out), len(wave)


def _read_start(data: bytes, seconds: float, where: str) -> tuple[F32, int]:
    """Read the first seconds as mono; return float32 [T] and the rate."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, where)
            wanted = math.ceil(seconds * file.samplerate)
            expected = expected_samples(data, file.format, file.frames, wanted)
            # Integers are several times as fast to read from a WAV file as floats.
            dtype = "int16" if file.subtype == "PCM_16" else "float32"
            # Read at most `wanted`: memory must not depend on the length that a header claims.
            frames = file.read(min(wanted, file.frames), dtype=dtype, always_2d=True)
            kind, rate = file.format, file.samplerate
    except soundfile.LibsndfileError as error:  # its str() contains a memory address
        why = error.error_string.removeprefix("Error : ").rstrip(" .")
        kind = describe_bytes(data)
        if kind is not None and kind not in _NAMES:
            why = f"it is {kind}" if data else "the file has 0 bytes"
        raise _error(where, why) from error
    if is_truncated(data, kind):
        raise _error(where, f"the {kind} file is truncated")
    expected = min(wanted, expected)
    if len(frames) < expected - _MISSING_SAMPLES:
        problem = f"only {len(frames)} of at least {expected} samples can be read"
        raise _error(where, f"{problem} (an MP3 of varying bit rate needs a Xing header)")
    scale = 32768 if dtype == "int16" else 1
    return _sum_channels(frames) / np.float32(scale * frames.shape[1]), rate


def _check_header(file: Any, where: str) -> None:
    """Raise BadSample for an unsupported format or a header with implausible values."""
    if file.format not in _FORMATS:
        raise _error(where, f"{file.format} is not one of {', '.join(AUDIO_MEMBERS)}")
    if not _RATES[0] <= file.samplerate <= _RATES[1] or file.channels > _MAX_CHANNELS:
        claim = f"{file.samplerate} samples per second on {file.channels} channels"
        raise _error(where, f"its header claims {claim}")


def _sum_channels(frames: NDArray[Any]) -> F32:
    """Return the sum over channels of [T, channels], float32 [T]."""
    total = frames[:, 0].astype(np.float32)  # `np.sum` is slow along an axis of length two
    for channel in range(1, frames.shape[1]):
        total += frames[:, channel]
    return total


def _error(where: str, why: str) -> BadSample:
    return BadSample(f"{where}: the audio cannot be decoded: {why}. Restore or remove the sample.")
