"""Base classes of evaluation tasks: settings, help text and measurement in one class.

`gigabatch eval --help` imports this module and every task, so these must not import torch at the
top. Tasks import such modules inside `measure`, which keeps the help below one second.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field

from gigabatch.data.settings import Settings

if TYPE_CHECKING:
    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.result import TaskResult
    from gigabatch.trainer.run.folder import RunFolder

OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Texts = Annotated[tuple[str, ...], OneOrMore]
"""One or several texts; a single text needs no brackets on the command line."""


class EvalTask(Settings):
    """A task of `gigabatch eval`: subclass `SetTask` or `RunTask`, and decorate with `register`.

    The fields of a task are its `key=value` settings; the docstring of a field is its help text.

    Attributes:
        name: Value of `--task`.
        summary: One line for `gigabatch eval --help`.
        aliases: Further values that `--task` accepts.
        tag: Name of the task in metric tags and result files; empty means `name`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    tag: ClassVar[str] = ""

    @classmethod
    def result_tag(cls) -> str:
        """Return the name of the task in metric tags and result files."""
        return cls.tag or cls.name


class SetTask(EvalTask):
    """A task that measures the towers of a run's newest checkpoint on a set."""

    @abstractmethod
    def measure(self, context: EvalContext) -> TaskResult:
        """Measure the set; every rank must call this.

        Raises:
            GigabatchError: if the set or the run lacks what the task reads.
        """

    @classmethod
    def metric_prefix(cls, set_name: str) -> str:
        """Return the prefix of all metric tags of a set."""
        return f"eval/{set_name}/{cls.result_tag()}/"

    def headline(self, result: TaskResult) -> str | None:
        """Return a sentence to print above the metrics, or None."""
        return None


class RunTask(EvalTask):
    """A task that reads only files of a run, without a set or a checkpoint."""

    @abstractmethod
    def read(self, run: RunFolder) -> dict[str, float]:
        """Return metrics by tag.

        Raises:
            GigabatchError: if the run lacks the files.
        """


class LabeledTask(SetTask):
    """Settings of a task that reads a labeled training set and predicts the labels of a set."""

    label: str
    """JSON field of the class."""
    train: str | None = None
    """Set with the known labels. Default: the run's training set."""
    modality: str | None = None
    """`image`, `text`, or a tower of `towers.more`. Default: the run's first, in this order."""
    tap: str = "head"
    """Tower output to read: head, encoder (before the head), or a module's path."""
    width: int | None = Field(None, ge=1)
    """Number of leading coordinates to keep (Matryoshka). Default: all."""
