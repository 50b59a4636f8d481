"""Read vectors of numbers from a .npy member or from json fields.

A sample has one vector (an embedding, a row of a table) or several (a set, a sequence).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gigabatch.data.decode.members import Array, load_array
from gigabatch.data.errors import BadSample, brief
from gigabatch.data.settings import Settings
from gigabatch.data.text.captions import value_at


class VectorSettings(Settings):
    """Location and size of a sample's vector."""

    size: int = Field(ge=1, strict=True)
    """Number of values in a vector."""
    member: str = "npy"
    """Extension of the .npy member that holds the vector, such as `npy` or `gaze.npy`."""
    fields: tuple[str, ...] = ()
    """Read the vector from these json fields instead: names, or paths such as `sensor.gaze`, of
    numbers and lists of numbers, which are concatenated."""

    @property
    def extension(self) -> str:
        """Extension of the member that is read."""
        return "json" if self.fields else self.member


class VectorsSettings(VectorSettings):
    """Location and size of a sample's set or sequence of vectors."""

    length: int = Field(ge=1, strict=True)
    """Maximum number of vectors of a sample; additional ones are dropped."""


class MissingVector(BadSample):
    """Raised if a sample has no vector; not an error if modalities may be missing."""


def read_vectors(data: bytes, settings: VectorSettings, where: str) -> Tensor:
    """Read the vector or vectors of a sample.

    Args:
        data: Contents of the member `settings.extension`.
        settings: Size of the vectors; `VectorsSettings` reads several.
        where: Name of the sample, for error messages.

    Returns:
        float32 [size]; with `VectorsSettings`, float32 [n, size], n from 1 to `length`.

    Raises:
        MissingVector: if the sample has no vector.
        BadSample: if the vector cannot be read, has the wrong size, or is not finite.
    """
    array = _from_json(data, settings, where) if settings.fields else load_array(data, where)
    subject = f"{where}: its vector ({', '.join(settings.fields) or settings.member})"
    if array.dtype.kind not in "biuf":
        kind = "complex numbers" if array.dtype.kind == "c" else f"no numbers ({array.dtype})"
        raise BadSample(f"{subject} contains {kind}.")
    if array.dtype != np.float32:
        with np.errstate(over="ignore"):  # overflow gives infinity, which is rejected below
            array = array.astype(np.float32)
    if isinstance(settings, VectorsSettings):
        if not array.size:
            raise MissingVector(f"{subject} is empty.")
        if array.ndim != 2 or array.shape[1] != settings.size:
            raise BadSample(
                f"{subject} has shape {list(array.shape)}, not [any, {settings.size}] (`size`)."
            )
        array = array[: settings.length]
    elif array.size != settings.size:
        raise BadSample(f"{subject} contains {array.size} numbers, not {settings.size} (`size`).")
    else:
        array = array.reshape(-1)
    if not np.isfinite(array).all():
        raise BadSample(f"{subject} contains values that are not finite.")
    return torch.from_numpy(array)


def _from_json(data: bytes, settings: VectorSettings, where: str) -> Array:
    """Return the numbers of all fields, concatenated along the last axis."""
    parts = []
    try:
        record = json.loads(data)
        for name in settings.fields:
            value = value_at(record, name)
            if value is None:
                raise MissingVector(f"{where}: its json has no {name}.")
            parts.append(_to_array(value, name))
        return np.concatenate(parts, axis=-1)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{where}: its json cannot be read: {error}.") from error


def _to_array(value: Any, name: str) -> Array:
    """Convert a json value to float64 [...] of at least one axis; ValueError if not numeric."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":  # also rejects numbers written as text
        raise ValueError(f"{name} contains no numbers: {brief(value)}")
    return np.atleast_1d(array.astype(np.float64))
