"""Vectors of numbers, from a .npy member or from fields of the json: one a sample (an embedding, a
row of a table), or several (a set, a sequence)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gigabatch.data.captions import value_at
from gigabatch.data.decode import decode_array
from gigabatch.data.errors import BadSample
from gigabatch.data.settings import Settings


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
    found = _of_json(data, settings, where) if settings.fields else decode_array(data, where)
    told = f"{where}: its vector ({', '.join(settings.fields) or settings.member})"
    if found.is_complex():
        raise BadSample(f"{told} holds complex numbers.")
    found = found.to(torch.float32)
    if isinstance(settings, VectorsSettings):
        if not found.numel():
            raise NoVector(f"{told} is empty.")
        if found.ndim != 2 or found.shape[1] != settings.size:
            raise BadSample(
                f"{told} is of shape {list(found.shape)}, not [any, {settings.size}] (`size`)."
            )
        found = found[: settings.length]
    elif found.numel() != settings.size:
        raise BadSample(f"{told} holds {found.numel()} numbers, not {settings.size} (`size`).")
    else:
        found = found.flatten()
    if not torch.isfinite(found).all():
        raise BadSample(f"{told} holds values that are not finite.")
    return found


def _of_json(data: bytes, settings: VectorSettings, where: str) -> Tensor:
    """The fields' numbers side by side, along the last axis."""
    parts = []
    try:
        record = json.loads(data)
        for name in settings.fields:
            value = value_at(record, name)
            if value is None:
                raise NoVector(f"{where}: its json has no {name}.")
            parts.append(_numbers(value, name))
        whole = np.concatenate(parts, axis=-1)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{where}: its json cannot be read: {error}.") from error
    return torch.from_numpy(whole)


def _numbers(value: Any, name: str) -> np.ndarray[Any, Any]:
    """At least one axis. Raises ValueError for what is not numbers, texts of them too."""
    found = np.asarray(value)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{name} is not numbers: {value!r:.60}")
    return np.atleast_1d(found.astype(np.float64))
