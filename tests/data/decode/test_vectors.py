from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import write_modalities

from gigabatch.data.decode.audio import AudioSettings
from gigabatch.data.decode.fields import Fields
from gigabatch.data.decode.vectors import (
    MissingVector,
    VectorSettings,
    VectorsSettings,
    read_vectors,
)
from gigabatch.data.errors import BadSample
from gigabatch.data.order.assignment import EvalPlans
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.stream import MicroBatch, open_stream

WHERE = "a.tar: sample 'x'"
THREE = VectorSettings(size=3)
PAIRS = VectorsSettings(size=2, length=3)


def npy(array: Any) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def from_json(record: Any, settings: VectorSettings, *fields: str) -> torch.Tensor:
    with_fields = settings.model_copy(update={"fields": fields})
    return read_vectors(json.dumps(record).encode(), with_fields, WHERE)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", ">f4", "int64", "uint8", "bool"])
def test_vectors_of_any_numeric_dtype_become_float32(kind: str) -> None:
    vector = read_vectors(npy(np.array([[1, 0, 1]]).astype(kind)), THREE, WHERE)
    assert vector.dtype == torch.float32
    assert vector.tolist() == [1, 0, 1]


def test_json_fields_are_concatenated() -> None:
    record = {"age": 40, "sick": True, "lab": {"sodium": 1.5}, "gaze": [1, 2]}
    assert from_json(record, THREE, "age", "sick", "lab.sodium").tolist() == [40, 1, 1.5]
    assert from_json(record, THREE, "gaze", "age").tolist() == [1, 2, 40]


def test_sets_are_truncated_to_length() -> None:
    vectors = read_vectors(npy(np.arange(10).reshape(5, 2)), PAIRS, WHERE)
    assert vectors.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert from_json({"path": [[1, 2]]}, PAIRS, "path").tolist() == [[1, 2]]
    both = from_json({"x": [[1], [3]], "y": [[2], [4]]}, PAIRS, "x", "y")
    assert both.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (npy(np.ones(4)), THREE, "contains 4 numbers, not 3"),
        (npy(np.ones(2)), PAIRS, r"has shape \[2\], not \[any, 2\]"),
        (npy(np.ones((2, 3))), PAIRS, r"has shape \[2, 3\]"),
        (npy(np.array([1, np.nan, 1])), THREE, "not finite"),
        (npy(np.full(3, 1e300)), THREE, "not finite"),
        (npy(np.ones(3, complex)), THREE, "complex"),
        (npy(np.array(["1", "2", "3"])), THREE, "contains no numbers"),
        (npy(np.ones(3))[:-4], THREE, "cannot be read"),
        (b"no array", THREE, "cannot be read"),
    ],
)  # fmt: skip
def test_invalid_array_raises_bad_sample(
    data: bytes, settings: VectorSettings, message: str
) -> None:  # fmt: skip
    with pytest.raises(BadSample, match=message):
        read_vectors(data, settings, WHERE)


@pytest.mark.parametrize("value", ["3", ["1", "2", "3"], [1, [2], 3], {"a": 1}, [1, None, 3]])
def test_json_fields_that_are_not_numbers_raise(value: Any) -> None:
    with pytest.raises(BadSample, match="cannot be read"):
        from_json({"x": value}, THREE, "x")


def test_missing_vector_raises_missing_vector() -> None:
    for record in ({}, {"x": None}):
        with pytest.raises(MissingVector):
            from_json(record, THREE, "x")
    with pytest.raises(MissingVector):
        from_json({"x": []}, PAIRS, "x")
    with pytest.raises(MissingVector):
        read_vectors(npy(np.ones((0, 2))), PAIRS, WHERE)


def micro_batches(
    folder: Path, workers: int, vectors: dict[str, VectorSettings] | None = None, **more: Any
) -> list[MicroBatch]:
    fields = Fields(more=more, vectors=vectors or {}, allow_missing=True)
    stream = open_stream(
        [open_index(str(folder))], EvalPlans(12, 6, 1, 0), fields=fields, tokenizer=None, seed=0,
        workers=workers, prefetch=2,
    )  # fmt: skip
    return list(stream)


@pytest.mark.parametrize("workers", [0, 1])
def test_micro_batches_hold_other_modalities(tmp_path: Path, workers: int) -> None:
    write_modalities(tmp_path, 12, seed=0, incomplete=True)
    first, second = micro_batches(
        tmp_path, workers, numbers=VectorSettings(size=6), tone=AudioSettings(rate=8000, seconds=1),
        path=VectorsSettings(size=2, length=4, fields=("path",)),
    )  # fmt: skip
    assert first.more == ("numbers", "tone", "path")
    shapes = {name: (list(t.shape), t.dtype) for name, t in first.tensors.items()}
    assert shapes == {
        "sample": ([6], torch.int64),
        "numbers": ([6, 6], torch.float32),
        "numbers_present": ([6], torch.bool),
        "tone": ([6, 8000], torch.float32),
        "tone_length": ([6], torch.int64),
        "tone_present": ([6], torch.bool),
        "path": ([6, 4, 2], torch.float32),
        "path_mask": ([6, 4], torch.bool),
        "path_present": ([6], torch.bool),
    }
    for micro, numbers in ((first, range(6)), (second, range(6, 12))):
        present = {name: micro.tensors[f"{name}_present"].tolist() for name in micro.more}
        assert present["numbers"] == [n % 4 != 1 for n in numbers]
        assert present["tone"] == [n % 6 != 1 for n in numbers]
        assert present["path"] == [n % 3 != 2 for n in numbers]
        for name in micro.more:
            rows = micro.tensors[name][~micro.tensors[f"{name}_present"]]
            assert len(rows)
            assert not rows.any()
        assert torch.equal(micro.tensors["path_mask"].any(1), micro.tensors["path_present"])
        assert not micro.tensors["path"][~micro.tensors["path_mask"]].any()


def test_micro_batch_without_a_modality_is_masked(tmp_path: Path) -> None:
    write_modalities(tmp_path, 12, seed=0, incomplete=True)
    missing = VectorsSettings(size=3, length=2, fields=("missing",))
    for micro in micro_batches(tmp_path, 0, other=missing):
        assert micro.tensors["other"].shape == (6, 2, 3)
        assert not micro.tensors["other_present"].any()
        assert not micro.tensors["other_mask"].any()


def test_vectors_without_tower_may_have_any_name(tmp_path: Path) -> None:
    write_modalities(tmp_path, 12, seed=0, incomplete=True)
    name, settings = "teacher: npy", VectorSettings(size=6)
    without_tower, _ = micro_batches(tmp_path, 0, {name: settings})
    with_tower, _ = micro_batches(tmp_path, 0, numbers=settings)
    assert without_tower.more == ()
    assert torch.equal(without_tower.tensors[name], with_tower.tensors["numbers"])
    assert without_tower.tensors[f"{name}_present"].tolist() == [n % 4 != 1 for n in range(6)]
