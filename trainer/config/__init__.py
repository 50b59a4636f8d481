"""The whole run as one typed description; each field's docstring is its help."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from gigabatch.data.settings import Settings
from gigabatch.trainer.config.cluster import ClusterSettings, RunSettings
from gigabatch.trainer.config.data import BatchSettings, DataSettings
from gigabatch.trainer.config.objective import ObjectiveSettings
from gigabatch.trainer.config.towers import (
    ConvTower,
    HuggingFaceTower,
    ModuleTower,
    TextTower,
    TowersSettings,
)
from gigabatch.trainer.config.training import (
    CheckpointSettings,
    EvalSettings,
    MonitorSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)

__all__ = [
    "BatchSettings", "CheckpointSettings", "ClusterSettings", "Config", "ConvTower",
    "DataSettings", "EvalSettings", "HuggingFaceTower", "ModuleTower", "MonitorSettings",
    "ObjectiveSettings", "OptimizerSettings", "RunSettings", "ScheduleSettings", "TextTower",
    "TowersSettings", "TrainSettings",
]  # fmt: skip


class Config(Settings):
    """A run. The names of these keys are an API."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    towers: TowersSettings = TowersSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    monitor: MonitorSettings = MonitorSettings()
    eval: EvalSettings = EvalSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _batch_is_cut(self) -> Self:
        size, micro = self.batch.global_size, self.batch.micro_size
        if size % micro:
            near = max(d for d in range(1, min(micro, size) + 1) if size % d == 0)
            raise ValueError(
                f"batch.global_size ({size}) cannot be cut into micro-batches of "
                f"batch.micro_size ({micro}); the nearest size that divides it is {near}"
            )
        if self.data.group and self.objective.label_smoothing:
            raise ValueError(
                "objective.label_smoothing spreads the target over all candidates of the batch, "
                "which data.group divides; set one of them to nothing"
            )
        if self.objective.same_id == "exclude" and (
            self.data.captions.choose == "all" or self.data.missing == "mask"
        ):
            raise ValueError(
                "objective.same_id=exclude pairs each image with one caption; it goes with neither "
                "data.captions.choose=all nor data.missing=mask"
            )
        self._refuse_unmeasured()
        if self.cluster.launcher == "inline" and self.cluster.workers != 1:
            raise ValueError(
                "cluster.launcher=inline is one worker; add cluster.workers=1, or take torchrun"
            )
        return self

    def _refuse_unmeasured(self) -> None:
        best, sets = self.checkpoint.best, [Path(name).name for name in self.eval.sets]
        if best is None:
            return
        _, measured, metric = best.split("/")
        if measured not in sets or not self.eval.every_steps:
            raise ValueError(
                f"checkpoint.best: {best} is never measured while training; name one of eval.sets "
                f"({', '.join(sets) or 'none'}) and set eval.every_steps"
            )
        if metric.endswith("_rank"):
            raise ValueError(f"checkpoint.best: {best} is better when lower; take a recall")
