"""What a run reads, and in what portions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gigabatch.data.augment import Augmentation
from gigabatch.data.decode.members import ImageSettings
from gigabatch.data.settings import Settings
from gigabatch.data.text.captions import CaptionSettings
from gigabatch.data.text.tokenizer import TextSettings
from gigabatch.trainer.fields import Amount, Count


class SourceSettings(Settings):
    path: str
    """A folder of shards or a view, inside `data.root` or by its path; a pattern with `*`, `?` or
    `{000..123}`; or a URL of those (s3://, gs://, hf://, https://)."""
    weight: float = Field(1.0, ge=0)
    """Its share of the samples drawn, against the other sources' weights."""


class CurriculumSettings(Settings):
    from_sample: Amount
    """Samples of the run after which these weights hold."""
    weights: tuple[Annotated[float, Field(ge=0)], ...]
    """A weight for each source, in their order."""


def _sources(value: Any) -> Any:
    listed = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": each} if isinstance(each, str) else each for each in listed)


class DataSettings(Settings):
    root: str = "demo:glyphs"
    """A folder or URL, or `demo:glyphs` for the demo set, which is made on first use."""
    train: Annotated[tuple[SourceSettings, ...], BeforeValidator(_sources)] = Field(
        (SourceSettings(path="train"),), min_length=1
    )
    """The training shards, inside `data.root`; `.` when the root holds them itself. A list mixes
    several sources, each a path or {path, weight}."""
    curriculum: tuple[CurriculumSettings, ...] = ()
    """Other weights of the sources, from later positions of the run on."""
    group: str | None = None
    """A field of the samples' json, or `source`: each batch holds samples of one value alone, and
    what is left over comes in mixed batches, where only samples of one value are compared."""
    window: Count = 64
    """Shards mixed at a time by the shuffle."""
    workers: Amount = 1
    """Loader processes of each rank; 0 reads in the training process."""
    prefetch: Count = 2
    """Micro-batches that each loader process keeps ready."""
    cache_gib: float = Field(64.0, gt=0)
    """Room for copies of remote shards on each node, in $GIGABATCH_CACHE."""
    missing: Literal["error", "mask"] = "error"
    """Samples without an image, a caption, or what a tower of `towers.more` reads: refused, or
    kept, and left out of the loss where they have nothing to compare."""
    max_damaged: float = Field(0.001, ge=0, le=1)
    """Share of a source's samples that may be damaged (each is replaced and recorded) before the
    run stops."""
    stages: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = ()
    """`package.mod:name` of your own webdataset stages, from decoded sample to decoded sample."""
    image: ImageSettings = ImageSettings()
    captions: CaptionSettings = CaptionSettings()
    text: TextSettings = TextSettings()
    augment: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        starts = [phase.from_sample for phase in self.curriculum]
        if starts != sorted(set(starts)) or (starts and starts[0] == 0):
            raise ValueError(
                "data.curriculum: from_sample must grow from line to line, from above 0"
            )
        for phase in self.curriculum:
            if len(phase.weights) != len(self.train):
                raise ValueError(
                    f"data.curriculum: {len(phase.weights)} weights for {len(self.train)} sources "
                    "of data.train; give one each, 0 for none"
                )
        given = [[source.weight for source in self.train], *(p.weights for p in self.curriculum)]
        if not all(map(sum, given)):
            raise ValueError("data.train, data.curriculum: some source needs a weight above 0")
        return self


class BatchSettings(Settings):
    global_size: Count = 256
    """Samples a step, over all workers: the N of the contrastive loss."""
    micro_size: Count = 256
    """Samples that pass the towers together. Part of the run: it may not change on resume."""
