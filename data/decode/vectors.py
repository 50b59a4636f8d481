"""Vectors of numbers, from a .npy member or from fields of the json: one a sample (an embedding, a
row of a table), or several (a set, a sequence)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gigabatch.data.decode.members import Array, load_array
from gigabatch.data.errors import BadSample
from gigabatch.data.settings import Settings
from gigabatch.data.text.captions import value_at


class VectorSettings(Settings):
    """Where a sample's vector is, and how long it is."""

    size: int = Field(ge=1, strict=True)
    """Numbers in a vector."""
    member: str = "npy"
    """The extension of the .npy file that holds it, such as `npy` or `gaze.npy`."""
    fields: tuple[str, ...] = ()
    """Or fields of the json, or paths such as `sensor.gaze`: numbers and lists of them, put end to
    end, as from the columns of a table."""

    @property
    def extension(self) -> str:
        """That of the member that is read."""
        return "json" if self.fields else self.member


class VectorsSettings(VectorSettings):
    """Where a sample's set or sequence of vectors is."""

    length: int = Field(ge=1, strict=True)
    """Vectors a sample at most; what comes after them is cut off."""


class NoVector(BadSample):
    """A sample without a vector; where modalities may be missing, no fault."""


def read_vectors(data: bytes, settings: VectorSettings, where: str) -> Tensor:
    """float32 [size]; of VectorsSettings [n, size], n from 1 to `length`.

    Raises BadSample for what is no such array of finite numbers, NoVector where there is none.
    """
    found = _of_json(data, settings, where) if settings.fields else load_array(data, where)
    if found.dtype.kind not in "biuf":
        what = "complex numbers" if found.dtype.kind == "c" else f"no numbers ({found.dtype})"
        raise BadSample(f"{_told(settings, where)} holds {what}.")
    if found.dtype != np.float32:
        with np.errstate(over="ignore"):  # infinite then, which is refused below
            found = found.astype(np.float32)
    if isinstance(settings, VectorsSettings):
        if not found.size:
            raise NoVector(f"{_told(settings, where)} is empty.")
        if found.ndim != 2 or found.shape[1] != settings.size:
            raise BadSample(
                f"{_told(settings, where)} is of shape {list(found.shape)}, not [any, "
                f"{settings.size}] (`size`)."
            )
        found = found[: settings.length]
    elif found.size != settings.size:
        raise BadSample(
            f"{_told(settings, where)} holds {found.size} numbers, not {settings.size} (`size`)."
        )
    else:
        found = found.reshape(-1)
    if not np.isfinite(found).all():
        raise BadSample(f"{_told(settings, where)} holds values that are not finite.")
    return torch.from_numpy(found)


def _told(settings: VectorSettings, where: str) -> str:
    return f"{where}: its vector ({', '.join(settings.fields) or settings.member})"


def _of_json(data: bytes, settings: VectorSettings, where: str) -> Array:
    """The fields' numbers side by side, along the last axis."""
    parts = []
    try:
        record = json.loads(data)
        for name in settings.fields:
            value = value_at(record, name)
            if value is None:
                raise NoVector(f"{where}: its json has no {name}.")
            parts.append(_numbers(value, name))
        return np.concatenate(parts, axis=-1)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{where}: its json cannot be read: {error}.") from error


def _numbers(value: Any, name: str) -> Array:
    """At least one axis. Raises ValueError for what is not numbers, texts of them too."""
    found = np.asarray(value)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{name} is not numbers: {value!r:.60}")
    return np.atleast_1d(found.astype(np.float64))
