"""Bytes of audio to a waveform of fixed length: mono, one rate, cut or filled up with silence."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gigabatch.data.decode.audio_headers import is_cut, told_frames
from gigabatch.data.errors import BadSample
from gigabatch.data.settings import Settings

AUDIO_MEMBERS = ("wav", "flac", "ogg", "mp3")
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
_RATES = (1_000, 1_000_000)
_CHANNELS = 64
_MARGIN = 0.1
"""Seconds read beyond what is kept: the resampling filter's reach, so that a cut leaves no mark."""
_SLACK = 3 * 1152
"""Samples that may be missing: codecs drop up to three of their frames at the ends."""

F32 = NDArray[np.float32]


class AudioSettings(Settings):
    """The rate and length of audio. It is mixed down to one channel."""

    rate: int = Field(16000, ge=1_000, le=192_000)
    """Samples a second: others are resampled to it."""
    seconds: float = Field(10.0, ge=0.01, le=3600)
    """Longer audio is cut after them; shorter is filled up with silence."""

    @property
    def samples(self) -> int:
        return round(self.rate * self.seconds)


def decode_audio(data: bytes, settings: AudioSettings, where: str) -> tuple[Tensor, int]:
    """(waveform float32 [rate * seconds], its real samples) from WAV, FLAC, OGG or MP3.

    `where` names the sample in errors. Raises BadSample for what is not such audio, is cut short
    before its kept part ends, or holds no samples.
    """
    import soxr

    wave, rate = _read(data, settings.seconds + _MARGIN, where)
    if rate != settings.rate:
        wave = soxr.resample(wave, rate, settings.rate)
    wave = wave[: settings.samples]
    if not len(wave):
        raise _bad(where, "it holds no samples")
    if not np.isfinite(wave).all():
        raise _bad(where, "it holds values that are not numbers")
    out = np.zeros(settings.samples, np.float32)
    out[: len(wave)] = wave
    return torch.from_numpy(out), len(wave)


def _read(data: bytes, seconds: float, where: str) -> tuple[F32, int]:
    """(mono samples, rate) of the first seconds. What a header claims is never allocated."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _refuse_absurd(file, where)
            wanted = math.ceil(seconds * file.samplerate)
            told = told_frames(data, file.format, file.frames, wanted)
            # Whole numbers are several times as fast to read from a WAV.
            dtype = "int16" if file.subtype == "PCM_16" else "float32"
            frames = file.read(min(wanted, file.frames), dtype=dtype, always_2d=True)
            kind, rate = file.format, file.samplerate
    except soundfile.LibsndfileError as error:  # its own text names an address in memory
        why = error.error_string.removeprefix("Error : ").rstrip(" .")
        raise _bad(where, why) from error
    if is_cut(data, kind):
        raise _bad(where, f"the {kind} file is cut short")
    least = min(wanted, told)
    if len(frames) < least - _SLACK:
        lack = f"only {len(frames)} of at least {least} samples can be read"
        raise _bad(where, f"{lack} (an MP3 of varying bit rate needs a Xing header)")
    scale = 32768 if dtype == "int16" else 1
    return _mixed(frames) / np.float32(scale * frames.shape[1]), rate


def _refuse_absurd(file: Any, where: str) -> None:
    if file.format not in _FORMATS:
        raise _bad(where, f"{file.format} is not one of {', '.join(AUDIO_MEMBERS)}")
    if not _RATES[0] <= file.samplerate <= _RATES[1] or file.channels > _CHANNELS:
        claim = f"{file.samplerate} samples a second on {file.channels} channels"
        raise _bad(where, f"its header claims {claim}")


def _mixed(frames: NDArray[Any]) -> F32:
    """The sum of the channels. (numpy's own is slow along an axis of two.)"""
    total = frames[:, 0].astype(np.float32)
    for channel in range(1, frames.shape[1]):
        total += frames[:, channel]
    return total


def _bad(where: str, why: str) -> BadSample:
    return BadSample(f"{where}: the audio cannot be decoded: {why}. Restore or remove the sample.")
