"""The user's webdataset stages (`data.stages`), whose errors name the stage and a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gigabatch.data.errors import GigabatchError

Sample = dict[str, Any]


@dataclass(frozen=True)
class NamedStage:
    """A stage whose errors name it and the last sample that it took.

    An error of a stage fails the run. It cannot be a bad sample: a generator that has raised an
    error yields no further samples.
    """

    path: str
    stage: Callable[[Iterator[Sample]], Iterator[Sample]] = field(repr=False)

    def __call__(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        taken = _Taken(samples)
        try:
            yield from self.stage(taken)
        except GigabatchError:
            raise
        except Exception as error:
            if error is not taken.error:
                error.add_note(f"data.stages: {self.path} raised this{taken.place}.")
            raise


class _Taken(Iterator[Sample]):
    """The samples that a stage takes, with the location of the last and the error of the source."""

    def __init__(self, samples: Iterator[Sample]) -> None:
        self.samples, self.place = iter(samples), " before it took a sample"
        self.error: Exception | None = None

    def __next__(self) -> Sample:
        try:
            sample = next(self.samples)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise
        where = f"{sample.get('__url__')}: sample {sample.get('__key__')!r}"
        self.place = f"; the last sample it took is {where}"
        return sample
