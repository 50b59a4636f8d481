"""An error of a user's stage names the stage and the last sample that it took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.data.stages import NamedStage, Sample

SAMPLES = [{"__url__": "a.tar", "__key__": f"s{n}", "n": n} for n in range(4)]


def inverse(samples: Iterator[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"inverse": 1 / (2 - sample["n"])}


def at_once(samples: Iterator[Sample]) -> Iterator[Sample]:
    raise KeyError("table")


def refusing(samples: Iterator[Sample]) -> Iterator[Sample]:
    for sample in samples:
        raise GigabatchError("a clear message")
        yield sample


@pytest.mark.parametrize(
    ("stage", "error", "where"),
    [
        (inverse, ZeroDivisionError, "; the last sample it took is a.tar: sample 's2'."),
        (at_once, KeyError, " before it took a sample."),
    ],
)
def test_error_of_a_stage_names_it_and_its_sample(stage: Any, error: Any, where: str) -> None:
    with pytest.raises(error) as raised:
        list(NamedStage("mine:stage", stage)(iter(SAMPLES)))
    assert raised.value.__notes__ == [f"data.stages: mine:stage raised this{where}"]


def test_error_of_the_source_is_not_blamed_on_the_stage() -> None:
    def source() -> Iterator[Sample]:
        yield from SAMPLES[:1]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone") as raised:
        list(NamedStage("mine:stage", inverse)(source()))
    assert not hasattr(raised.value, "__notes__")


def test_clear_message_of_a_stage_stays_as_it_is() -> None:
    with pytest.raises(GigabatchError, match=r"^a clear message$") as raised:
        list(NamedStage("mine:stage", refusing)(iter(SAMPLES)))
    assert not hasattr(raised.value, "__notes__")


def test_stage_without_an_error_returns_its_samples() -> None:
    out = list(NamedStage("mine:stage", inverse)(iter(SAMPLES[:2])))
    assert [sample["inverse"] for sample in out] == [0.5, 1.0]
