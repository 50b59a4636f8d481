"""Whatever a member holds, decoding it gives values or a bad sample with shard, key and reason."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tarfiles import write_tar

from gigabatch.data.decode.fields import Fields
from gigabatch.data.decode.vectors import VectorSettings, VectorsSettings
from gigabatch.data.errors import BadSample, GigabatchError
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.text.captions import CaptionSettings

WHERE = "/data/s.tar: sample 'k'"
FIELDS = Fields(
    text=CaptionSettings(field="a.b"),
    more={"v": VectorSettings(size=2, fields=("x", "y")), "w": VectorsSettings(size=2, length=3)},
    arrays=("arr.npy",),
    columns=("x",),
    numbers=("y",),
)
GOOD = {"a": {"b": "text"}, "x": 1, "y": 2}


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_header(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(2))
    return file.getvalue()


def nested(depth: int) -> bytes:
    return b'{"x": ' + b"[" * depth + b"1" + b"]" * depth + b', "y": 2, "a": {"b": "t"}}'


def with_x(text: bytes) -> bytes:
    return b'{"a": {"b": "text"}, "y": 2, "x": ' + text + b"}"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("set")
    write_tar(folder / "a.tar", {"k.json": b"{}", "k.npy": b"x"})
    return open_index(folder)


def outcome(index: Any, **members: bytes) -> str:
    """Return "decoded", or the message of the bad sample."""
    raw = {"json": json.dumps(GOOD).encode(), "npy": npy(np.zeros((1, 2))), "arr.npy": npy([1])}
    raw |= {name.replace("_", "."): data for name, data in members.items()}
    try:
        FIELDS.decode(raw, WHERE, None)
        FIELDS.column_values(0, index, 0, raw, WHERE)
    except BadSample as error:
        return str(error)
    return "decoded"


DAMAGE = [
    ("npy", npz(), "numpy.savez"),
    ("arr_npy", npz(), "numpy.savez"),
    ("npy", npy_header((1 << 40, 1 << 20)), "its header claims 1,152,921,504,606,846,976"),
    ("arr_npy", npy_header((-3,)), "its header claims -3 values"),
    ("arr_npy", npy(np.array([None]), allow_pickle=True), "Python objects"),
    ("arr_npy", npy(np.array(["text"])), "cannot be read"),
    ("npy", npy(np.zeros((2, 2)))[:-1], "the file has 31 bytes of values"),
    ("npy", b"\x93NUMPY\x01\x00\x88\x13" + b"(" * 5000, "cannot be read"),
    ("npy", b"", "cannot be read"),
    ("json", b"", "cannot be read"),
    ("json", b"\xff\xfe\x00", "cannot be read"),
    ("json", b'{"a": "\x00"}', "cannot be read"),
    ("json", nested(100_000), "recursion"),
    ("json", nested(900), "cannot be read"),
    ("json", nested(400), "cannot be read"),
    ("json", with_x(b"1" + b"0" * 400), "cannot be read"),
    ("json", with_x(b"1").replace(b'"y": 2', b'"y": 1' + b"0" * 400), "cannot be read"),
    ("json", with_x(b"1" * 5000), "4300 digits"),
    ("json", with_x(b"1e999"), "cannot be read|not finite|has no 'x'"),
    ("json", b"[1, 2]", "expected a mapping"),
    ("json", b"null", "is empty"),
    ("json", with_x(b'"\\ud800"').replace(b"text", b"\\udfff"), "half a surrogate"),
    ("json", with_x(b"[[1, 2], [3]]"), "cannot be read"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_member_is_a_bad_sample(number: int, index: Any) -> None:
    member, data, reason = DAMAGE[number]
    message = outcome(index, **{member: data})
    assert message.startswith(f"{WHERE}: ")
    assert "\n" not in message
    assert len(message) < 500
    assert " at 0x" not in message
    assert any(words in message for words in reason.split("|")), message


@given(st.binary(max_size=80), st.sampled_from(["json", "npy", "arr_npy"]))
def test_any_bytes_decode_or_are_a_bad_sample(data: bytes, member: str) -> None:
    fields = Fields(more=FIELDS.more, text=FIELDS.text, arrays=FIELDS.arrays)
    raw = {"json": json.dumps(GOOD).encode(), "npy": npy(np.zeros((1, 2))), "arr.npy": npy([1])}
    try:
        fields.decode({**raw, member.replace("_", "."): data}, WHERE, None)
        message = WHERE
    except BadSample as error:
        message = str(error)
    assert message.startswith(WHERE)


def test_large_integer_is_an_id(index: Any) -> None:
    raw = {"json": with_x(b"1" + b"0" * 400)}
    assert Fields(columns=("x",)).column_values(0, index, 0, raw, WHERE)["x"] > 0


@pytest.mark.parametrize("depth", [860, 900, 930, 960, 990, 1100])
def test_index_names_the_shard_of_a_deeply_nested_field(depth: int, tmp_path: Path) -> None:
    """Which of the limits on nesting applies depends on the depth of the caller."""
    write_tar(tmp_path / "a.tar", {"k.json": nested(depth)})
    try:
        open_index(tmp_path, columns=["x"])
        message = ""
    except GigabatchError as error:
        message = str(error)
    assert not message or "a.tar: " in message
    assert not message or "nested too deeply" in message or "recursion" in message
    assert message or depth < 1000


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.zeros((0, 5), np.float16), np.array(3.5), np.arange(4, dtype=">i4"), np.array([True]),
    ],
)  # fmt: skip
def test_array_has_the_values_that_numpy_reads(array: Any) -> None:
    fields = Fields(arrays=("z.npy",))
    tensor = fields.decode({"z.npy": npy(array)}, WHERE, None)["z.npy"]
    assert tensor.shape == array.shape
    assert np.array_equal(tensor.numpy(), array)
