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


def of_json(record: Any, settings: VectorSettings, *fields: str) -> torch.Tensor:
    chosen = settings.model_copy(update={"fields": fields})
    return read_vectors(json.dumps(record).encode(), chosen, WHERE)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", ">f4", "int64", "uint8", "bool"])
def test_vectors_of_any_type_of_number_become_float32(kind: str) -> None:
    found = read_vectors(npy(np.array([[1, 0, 1]]).astype(kind)), THREE, WHERE)
    assert found.dtype == torch.float32
    assert found.tolist() == [1, 0, 1]


def test_columns_of_a_table_stand_side_by_side() -> None:
    record = {"age": 40, "sick": True, "lab": {"sodium": 1.5}, "gaze": [1, 2]}
    assert of_json(record, THREE, "age", "sick", "lab.sodium").tolist() == [40, 1, 1.5]
    assert of_json(record, THREE, "gaze", "age").tolist() == [1, 2, 40]


def test_sets_are_cut_to_their_length() -> None:
    found = read_vectors(npy(np.arange(10).reshape(5, 2)), PAIRS, WHERE)
    assert found.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert of_json({"path": [[1, 2]]}, PAIRS, "path").tolist() == [[1, 2]]
    both = of_json({"x": [[1], [3]], "y": [[2], [4]]}, PAIRS, "x", "y")
    assert both.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("data", "settings", "why"),
    [
        (npy(np.ones(4)), THREE, "holds 4 numbers, not 3"),
        (npy(np.ones(2)), PAIRS, r"of shape \[2\], not \[any, 2\]"),
        (npy(np.ones((2, 3))), PAIRS, r"of shape \[2, 3\]"),
        (npy(np.array([1, np.nan, 1])), THREE, "not finite"),
        (npy(np.full(3, 1e300)), THREE, "not finite"),
        (npy(np.ones(3, complex)), THREE, "complex"),
        (npy(np.array(["1", "2", "3"])), THREE, "holds no numbers"),
        (npy(np.ones(3))[:-4], THREE, "cannot be read"),
        (b"no array", THREE, "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_such_array_is_refused(
    data: bytes, settings: VectorSettings, why: str
) -> None:  # fmt: skip
    with pytest.raises(BadSample, match=why):
        read_vectors(data, settings, WHERE)


@pytest.mark.parametrize("value", ["3", ["1", "2", "3"], [1, [2], 3], {"a": 1}, [1, None, 3]])
def test_fields_that_are_not_numbers_are_refused(value: Any) -> None:
    with pytest.raises(BadSample, match="cannot be read"):
        of_json({"x": value}, THREE, "x")


def test_what_is_not_there_is_told_from_what_is_wrong() -> None:
    for record in ({}, {"x": None}):
        with pytest.raises(MissingVector):
            of_json(record, THREE, "x")
    with pytest.raises(MissingVector):
        of_json({"x": []}, PAIRS, "x")
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
def test_micro_batches_of_other_modalities(tmp_path: Path, workers: int) -> None:
    write_modalities(tmp_path, 12, seed=0, lacking=True)
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
        here = {name: micro.tensors[f"{name}_present"].tolist() for name in micro.more}
        assert here["numbers"] == [n % 4 != 1 for n in numbers]
        assert here["tone"] == [n % 6 != 1 for n in numbers]
        assert here["path"] == [n % 3 != 2 for n in numbers]
        for name in micro.more:
            rows = micro.tensors[name][~micro.tensors[f"{name}_present"]]
            assert len(rows)
            assert not rows.any()
        assert torch.equal(micro.tensors["path_mask"].any(1), micro.tensors["path_present"])
        assert not micro.tensors["path"][~micro.tensors["path_mask"]].any()


def test_a_micro_batch_that_has_none_of_a_modality(tmp_path: Path) -> None:
    write_modalities(tmp_path, 12, seed=0, lacking=True)
    missing = VectorsSettings(size=3, length=2, fields=("nowhere",))
    for micro in micro_batches(tmp_path, 0, other=missing):
        assert micro.tensors["other"].shape == (6, 2, 3)
        assert not micro.tensors["other_present"].any()
        assert not micro.tensors["other_mask"].any()


def test_vectors_of_no_tower_come_along_under_any_name(tmp_path: Path) -> None:
    write_modalities(tmp_path, 12, seed=0, lacking=True)
    name, settings = "teacher: npy", VectorSettings(size=6)
    beside, _ = micro_batches(tmp_path, 0, {name: settings})
    tower, _ = micro_batches(tmp_path, 0, numbers=settings)
    assert beside.more == ()
    assert torch.equal(beside.tensors[name], tower.tensors["numbers"])
    assert beside.tensors[f"{name}_present"].tolist() == [n % 4 != 1 for n in range(6)]
