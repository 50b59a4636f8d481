"""The typed config of a run; each field's docstring is its help text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.data.settings import Settings
from gigabatch.trainer.config.cluster import ClusterSettings, RunSettings
from gigabatch.trainer.config.data import BatchSettings, DataSettings
from gigabatch.trainer.config.towers import ExtraTextTower, TowersSettings
from gigabatch.trainer.config.training import (
    CheckpointSettings,
    EvalSettings,
    MonitorSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)
from gigabatch.trainer.objectives import AnyObjective, ObjectiveSettings, default_settings
from gigabatch.trainer.objectives.settings import SingleSettings, unique
from gigabatch.trainer.taps import parse_tap
from gigabatch.trainer.towers.base import TowerKind

__all__ = [
    "AnyObjective",
    "BatchSettings",
    "CheckpointSettings",
    "ClusterSettings",
    "Config",
    "DataSettings",
    "EvalSettings",
    "ExtraTextTower",
    "MonitorSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "RunSettings",
    "ScheduleSettings",
    "TowersSettings",
    "TrainSettings",
    "column_keys",
    "columns_of",
    "positives_of",
    "singles",
    "taps_of",
    "vectors_of",
]  # fmt: skip


class Config(Settings):
    """A run. The names of these keys are an API."""

    run: RunSettings = RunSettings()
    """Name, folder and seed of the run."""
    data: DataSettings = DataSettings()
    """Training data: sources, order, decoding, tokens and augmentation."""
    batch: BatchSettings = BatchSettings()
    """Batch sizes."""
    towers: TowersSettings = TowersSettings()
    """Encoders, one for each modality, and their projection heads."""
    objective: AnyObjective = Field(default_factory=default_settings)
    """The contrastive objective, or a weighted sum of several."""
    train: TrainSettings = TrainSettings()
    """Length, precision, memory and error handling of the training."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW."""
    schedule: ScheduleSettings = ScheduleSettings()
    """Learning rate over the steps."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """When checkpoints are saved, which are kept, and where they are copied."""
    monitor: MonitorSettings = MonitorSettings()
    """Metrics and records."""
    eval: EvalSettings = EvalSettings()
    """Evaluations during and after training."""
    cluster: ClusterSettings = ClusterSettings()
    """Workers: launcher, number, placement, environment and restarts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        size, micro = self.batch.global_size, self.batch.micro_size
        if size % micro:
            near = max(d for d in range(1, min(micro, size) + 1) if size % d == 0)
            raise ValueError(
                f"batch.global_size ({size}) cannot be split into micro-batches of "
                f"batch.micro_size ({micro}); the nearest size that divides it is {near}"
            )
        for objective in singles(self.objective):
            self._check_taps(objective)
        self.objective.check(self)
        self._check_towers_are_read()
        self._check_best_is_measured()
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the objective reads: image and text first, then those of
        `towers.more`. Other modalities are not decoded and get no tower."""
        read = {parse_tap(tap).modality for tap in taps_of(self.objective)}
        return tuple(name for name in ("image", "text", *self.towers.more) if name in read)

    @property
    def texts(self) -> tuple[str, ...]:
        """The modalities that are texts."""
        others = {name for name, t in self.towers.more.items() if isinstance(t, ExtraTextTower)}
        return tuple(name for name in self.modalities if name in {"text", *others})

    @property
    def shared(self) -> dict[str, str]:
        """Modality -> the modality whose tower it shares."""
        owners = {name: getattr(self.towers.more.get(name), "share", None) for name in self.texts}
        return {name: owner for name, owner in owners.items() if owner}

    @property
    def outputs_read(self) -> set[tuple[str, str]]:
        """(modality of the tower, output) of every tap that the objective reads."""
        read, shared = map(parse_tap, taps_of(self.objective)), self.shared
        return {(shared.get(tap.modality, tap.modality), tap.output) for tap in read}

    def tower(self, modality: str) -> TowerKind:
        """Return the settings of the tower that reads a modality."""
        modality = self.shared.get(modality, modality)
        tower = self.towers.more.get(modality) or getattr(self.towers, modality)
        tower = tower.tower if isinstance(tower, ExtraTextTower) else tower
        assert isinstance(tower, TowerKind)
        return tower

    def tower_key(self, modality: str) -> str:
        """Return the config key of the tower that reads a modality."""
        modality = self.shared.get(modality, modality)
        if modality not in self.towers.more:
            return f"towers.{modality}"
        is_text = isinstance(self.towers.more[modality], ExtraTextTower)
        return f"towers.more.{modality}{'.tower' * is_text}"

    def with_tower(self, modality: str, tower: TowerKind) -> Self:
        """Return this config with other settings of the tower of an unshared modality."""
        more, entry = self.towers.more, self.towers.more.get(modality)
        changed: dict[str, object] = {modality: tower}
        if isinstance(entry, ExtraTextTower):
            changed = {"more": {**more, modality: entry.model_copy(update={"tower": tower})}}
        elif entry is not None:
            changed = {"more": {**more, modality: tower}}
        return self.model_copy(update={"towers": self.towers.model_copy(update=changed)})

    def text_length(self, modality: str) -> int:
        """Return the number of tokens of a text."""
        return getattr(self.towers.more.get(modality), "length", None) or self.data.text.length

    def _check_taps(self, objective: SingleSettings) -> None:
        modalities = {"image", "text", *self.towers.more}
        for tap in map(parse_tap, objective.taps):
            if tap.modality not in modalities:
                raise ValueError(
                    f"objective.taps: there is no tower {tap.modality!r}; the towers are "
                    f"{', '.join(sorted(modalities))}"
                )

    def _check_towers_are_read(self) -> None:
        """Reject towers and heads that no objective reads, and ambiguous names."""
        for name, output in sorted(self.outputs_read):
            if output == "projection" and (name, "head") not in self.outputs_read:
                raise ValueError(
                    f"objective.taps: {name}.projection is after a second head; the first head, "
                    f"which retrieval reads, would never be trained. Use {name} too, in a sum, or "
                    "instead"
                )
        for name in self.towers.more:
            if name not in self.modalities:
                raise ValueError(
                    f"towers.more.{name}: the objective does not read it; add it to "
                    "objective.taps, or remove it"
                )
            if name in self.shared and (
                "text" not in self.modalities or self.text_length(name) > self.data.text.length
            ):
                raise ValueError(
                    f"towers.more.{name}.share: the text tower must exist (add text to "
                    f"objective.taps), and it reads at most data.text.length="
                    f"{self.data.text.length} tokens"
                )
            if name in (*columns_of(self.objective), self.data.group):
                raise ValueError(
                    f"towers.more.{name} is also a field that the objective reads; rename the tower"
                )
        for part in self.train.init_parts if self.train.init_from else ():
            if part.partition(".")[0] not in {*self.modalities} - {*self.shared}:
                raise ValueError(
                    f"train.init_parts: {part}: the run has no such tower; it has "
                    f"{', '.join(m for m in self.modalities if m not in self.shared)}"
                )

    def _check_best_is_measured(self) -> None:
        best, sets = self.checkpoint.best, [Path(name).name for name in self.eval.sets]
        if best is None:
            return
        _, measured, metric = best.split("/")
        if len(self.modalities) < 2:
            raise ValueError(
                f"checkpoint.best: {best} is never measured: retrieval needs two modalities, and "
                f"the objective reads only {self.modalities[0]}"
            )
        if measured not in sets or not self.eval.every_steps:
            raise ValueError(
                f"checkpoint.best: {best} is never measured during training; use one of eval.sets "
                f"({', '.join(sets) or 'none'}) and set eval.every_steps"
            )
        if metric.endswith("_rank"):
            raise ValueError(f"checkpoint.best: {best} is better when lower; use a recall")


def singles(settings: ObjectiveSettings) -> tuple[SingleSettings, ...]:
    """Return the terms of a sum, or the objective itself if it is not a sum."""
    return settings.singles()


def taps_of(settings: ObjectiveSettings) -> tuple[str, ...]:
    """Return all taps that the objectives read, without duplicates."""
    return unique(tap for single in settings.singles() for tap in single.taps)


def positives_of(settings: ObjectiveSettings) -> str | None:
    """Return the first objective's field whose equal values mark positives, if any has one."""
    return settings.positives_field()


def columns_of(settings: ObjectiveSettings) -> tuple[str, ...]:
    """Return the fields of the samples' json that the objectives read."""
    return settings.columns()


def column_keys(config: Config) -> dict[str, str]:
    """Return field of the samples' json -> key of the config that names it, for messages."""
    keys = {config.data.group: "data.group"} if config.data.group else {}
    columns = config.objective.columns()
    leaves = _named_leaves(config.objective.model_dump(), "objective")
    return keys | {value: key for key, value in reversed([*leaves]) if value in columns}


def _named_leaves(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, text) of the texts in nested settings."""
    if isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for name, value in items:
            yield from _named_leaves(value, f"{key}.{name}")
    elif isinstance(tree, str) and not key.endswith(".name"):
        yield key, tree


def vectors_of(settings: ObjectiveSettings) -> dict[str, VectorSettings]:
    """Return the samples' vectors that the objectives read but no tower reads, by name."""
    return settings.vectors()
