"""Config sections `data` and `batch`: what a run reads, and how much per step."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gigabatch.data.augment import Augmentation
from gigabatch.data.decode.ids import FieldsVersion, MissingIds
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.settings import Settings
from gigabatch.data.text.captions import CaptionSettings
from gigabatch.data.text.tokenizer import TextSettings
from gigabatch.trainer.fields import Amount, Count


class SourceSettings(Settings):
    """One source of training samples."""

    path: str
    """Shards of a source: a folder or a filtered view, inside `data.root` or by its path; a pattern
    with `*`, `?` or `{000..123}`; or the URL of any of these (s3://, gs://, hf://, https://)."""
    weight: float = Field(1.0, ge=0)
    """Share of the samples drawn from this source, relative to the other sources' weights."""


class CurriculumSettings(Settings):
    """One phase of a curriculum."""

    from_sample: Amount
    """Number of samples of the run after which a curriculum phase starts."""
    weights: tuple[Annotated[float, Field(ge=0)], ...]
    """Weights of the sources during a curriculum phase, in the order of `data.train`."""


def _sources(value: Any) -> Any:
    """Accept a path in place of a source, and a single source in place of a list."""
    sources = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": source} if isinstance(source, str) else source for source in sources)


class DataSettings(Settings):
    """The samples of a run, their decoding and augmentation."""

    root: str = "demo:glyphs"
    """Folder or URL of the data, or `demo:glyphs` for the demo set, which is created on first
    use."""
    train: Annotated[tuple[SourceSettings, ...], BeforeValidator(_sources)] = Field(
        (SourceSettings(path="train"),), min_length=1
    )
    """Training shards, inside `data.root`; `.` if they are in the root itself. A list mixes
    several sources, written as paths or as {path, weight}."""
    curriculum: tuple[CurriculumSettings, ...] = ()
    """Changes of the sources' weights during the run. Default: none."""
    group: str | None = None
    """Field of the samples' json, or `source`, that groups batches: each batch has samples of a
    single value. The remaining samples come in mixed batches, where only samples of the same value
    are compared. Unset: no groups."""
    window: Count = 64
    """Number of shards that the shuffle mixes at a time."""
    workers: Amount = 1
    """Loader processes per worker; 0 reads in the training process."""
    prefetch: Count = 2
    """Micro-batches that each loader process keeps ready."""
    cache_gib: float = Field(64.0, gt=0)
    """Size in GiB of each node's cache of remote shards, in $GIGABATCH_CACHE."""
    missing: Literal["error", "mask"] = "error"
    """Treatment of samples without an image, a caption, or the input of a tower of `towers.more`.
    error: stop. mask: keep them, and leave them out of the terms that need the missing part."""
    missing_ids: MissingIds = "error"
    """Treatment of samples without a value in a field of the objective or in `data.group`: null,
    NaN, an empty text. error: stop and count them. unique: each such sample equals only itself."""
    fields_version: FieldsVersion = 2
    """Meaning of fields and lists; a run keeps the version that it began with. 1, before 0.2: nulls
    in an indexed field are equal to each other, 7 and 7.0 differ, and an empty text at the first
    position of a list is skipped, even if the first text is the positive."""
    max_damaged: float = Field(0.001, ge=0, le=1)
    """Largest share of a source's samples that may be unreadable before the run stops. Each is
    replaced and recorded."""
    stages: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = ()
    """Your own webdataset stages, as `package.mod:name`; they map decoded samples to decoded
    samples."""
    image: ImageSettings = ImageSettings()
    captions: CaptionSettings = CaptionSettings()
    text: TextSettings = TextSettings()
    augment: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        starts = [phase.from_sample for phase in self.curriculum]
        if starts != sorted(set(starts)) or (starts and starts[0] == 0):
            raise ValueError(
                "data.curriculum: from_sample must be above 0 and increase from phase to phase"
            )
        for phase in self.curriculum:
            if len(phase.weights) != len(self.train):
                raise ValueError(
                    f"data.curriculum: {len(phase.weights)} weights for {len(self.train)} sources "
                    "of data.train; give one weight per source, 0 for none"
                )
        weights = [[source.weight for source in self.train], *(p.weights for p in self.curriculum)]
        if not all(map(sum, weights)):
            raise ValueError(
                "data.train, data.curriculum: at least one source needs a weight above 0"
            )
        return self


class BatchSettings(Settings):
    """Size of a step."""

    global_size: Count = 256
    """Samples per step over all workers: the N of the contrastive loss."""
    micro_size: Count = 256
    """Samples that pass through the towers together; must divide `global_size`. It cannot change
    when a run resumes."""
