"""Embeddings of a set or of texts; each rank embeds its share of the samples, in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gigabatch.data.decode.fields import Fields
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import EvalPlans
from gigabatch.data.shards.index import Index
from gigabatch.data.stream import open_stream
from gigabatch.data.text.captions import CaptionSettings
from gigabatch.data.text.tokenizer import encode, load_tokenizer
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.score_rows import Rows
from gigabatch.trainer.evaluation.progress import tracked
from gigabatch.trainer.inputs import cache_of, eval_fields
from gigabatch.trainer.objectives.common import first_coordinates
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.step import tower_inputs

log = logging.getLogger(__name__)
Inputs = Mapping[str, tuple[Tensor, ...]]
Embed = Callable[[Inputs], Mapping[str, Tensor]]
"""Function from tower inputs to {modality: [B, D], or tokens [B, T, D]}, in evaluation mode."""
SAMPLE_COLUMN = "sample"
"""Column of `Embedded` with the index of each sample in its set."""


@dataclass(frozen=True)
class Embedded:
    """This rank's rows of an embedded set.

    Attributes:
        outputs: Modality -> float32 vectors [n, D], or tokens [n, T, D].
        columns: JSON field -> int64 [n] codes of its values; `sample` -> sample indices.
        masks: Modality -> bool [n, T], true at real tokens; only for modalities with tokens.
    """

    outputs: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, modality: str) -> Rows:
        """Return the vectors or tokens of one modality."""
        return Rows(self.outputs[modality], self.masks.get(modality))


@dataclass(frozen=True)
class EmbedSpec:
    """Fields to read of each sample, and coordinates of its vectors to keep.

    Attributes:
        modalities: Modalities of the run.
        columns: JSON fields to read as codes.
        captions: Location of the captions; None reads the run's captions.
        width: Number of leading coordinates to keep, normalized again; None keeps all.
    """

    modalities: Sequence[str] = ("image", "text")
    columns: Sequence[str] = ()
    captions: CaptionSettings | None = None
    width: int | None = None

    def fields(self, config: Config) -> Fields:
        """Return the fields of complete samples, with the first caption of each.

        Raises:
            GigabatchError: if the run lacks a modality or `width` coordinates.
        """
        require_modalities(config, self.modalities)
        if self.width is not None and self.width > config.towers.width:
            raise GigabatchError(
                f"width={self.width}: the run's vectors have {config.towers.width} coordinates "
                f"(towers.width). Set width to at most {config.towers.width}."
            )
        fields = eval_fields(config, list(dict.fromkeys(self.columns)))
        image, text = fields.image, self.captions or fields.text
        is_field_of_run = text is None or fields.text is None or text.field == fields.text.field
        return replace(
            fields,
            ordered=fields.ordered if is_field_of_run else (),
            image=image if "image" in self.modalities else None,
            text=text if "text" in self.modalities else None,
            more={name: read for name, read in fields.more.items() if name in self.modalities},
        )


def require_modalities(config: Config, modalities: Sequence[str]) -> None:
    """Check that the run has towers for these modalities.

    Raises:
        GigabatchError: if it lacks one.
    """
    for name in modalities:
        if name not in config.modalities:
            raise GigabatchError(
                f"the run has no tower {name!r}: its objective reads "
                f"{', '.join(config.modalities)}. Name two of those for retrieval "
                "(--task retrieval between=[A,B]), or one for knn and probe (modality=A)."
            )


@torch.no_grad()
def embed_set(
    embed: Embed,
    index: Index,
    config: Config,
    run: RunFolder,
    world: World,
    spec: EmbedSpec,
    stop: Callable[[], bool] = lambda: False,
    limit: int | None = None,
) -> Embedded | None:
    """Embed this rank's share of an indexed set; every rank must call this.

    Args:
        embed: Computes the embeddings of a batch.
        index: The set.
        config: Config of the run.
        run: Folder of the run, for its tokenizer.
        world: The ranks that share the set.
        spec: Fields to read of each sample.
        stop: Called after each micro-batch; returns the same on every rank. True stops.
        limit: Largest number of samples, the first of the set; None embeds all.

    Returns:
        This rank's rows, or None if `stop` returned true.
    """
    fields = spec.fields(config)
    stream = open_stream(
        [index],
        EvalPlans(
            min(len(index), limit or len(index)), config.batch.micro_size, world.size, world.rank
        ),
        fields=fields,
        tokenizer=run.tokenizer if fields.texts_only.modalities else None,
        seed=config.run.seed,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        cache=cache_of(config),
    )
    columns = (SAMPLE_COLUMN, *fields.columns)
    outputs: dict[str, list[Tensor]] = {}
    masks: dict[str, list[Tensor]] = {}
    codes: dict[str, list[Tensor]] = {name: [] for name in columns}
    unusable: list[str] = []
    plans = -(-len(index) // (config.batch.micro_size * world.size))
    for micro in tracked(f"embedding {index.name} in micro-batches", stream, plans):
        if micro.real:
            unusable += [sample.why for sample in micro.substitutions]
        batch = micro.to(world.device)
        # Ranks with fewer samples embed padding batches, so that all ranks issue the same
        # collectives.
        kept = slice(None) if batch.real else slice(0)
        for name, vectors in embed(tower_inputs(batch, config.data, rng_key=None)).items():
            rows = vectors[kept].float()
            rows = rows if spec.width is None else first_coordinates(rows, spec.width)
            outputs.setdefault(name, []).append(rows)
            if vectors.ndim == 3:
                all_real = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
                mask = batch.tensors.get(f"{name}_mask", all_real)
                masks.setdefault(name, []).append(mask[kept])
        for name in columns:
            codes[name].append(batch.tensors[name][kept])
        if stop():
            return None
    _warn_of_unusable([why for rank in world.gather(unusable) for why in rank], index, world)
    return Embedded(
        {name: torch.cat(rows) for name, rows in outputs.items()},
        {name: torch.cat(rows) for name, rows in codes.items()},
        {name: torch.cat(rows) for name, rows in masks.items()},
    )


def _warn_of_unusable(reasons: list[str], index: Index, world: World) -> None:
    if reasons and world.is_main:
        log.warning(
            "%s: %d of %d samples are unusable; other samples were measured in their place. "
            "First: %s",
            index.source, len(reasons), len(index), reasons[0],
        )  # fmt: skip


def caption_settings(config: Config, field: str) -> CaptionSettings:
    """Return the run's caption settings, changed to a different field.

    Args:
        config: Config of the run.
        field: `txt` for that member, or a JSON field, or a path such as `names.de`.
    """
    member = "txt" if field == "txt" else "json"
    changes = {"member": member, "field": None if member == "txt" else field, "choose": "first"}
    return config.data.captions.model_copy(update=changes)


@torch.no_grad()
def embed_texts(
    embed: Embed, texts: Sequence[str], config: Config, run: RunFolder, world: World
) -> Rows:
    """Embed this rank's share of `texts`, which is contiguous; every rank passes all texts.

    Raises:
        GigabatchError: if the run has no text tower.
    """
    require_modalities(config, ["text"])
    tokenizer = load_tokenizer(run.tokenizer)
    rows, masks = [], []
    plans = EvalPlans(len(texts), config.batch.micro_size, world.size, world.rank)
    total = -(-len(texts) // (config.batch.micro_size * world.size))
    for plan in tracked("embedding texts in micro-batches", plans, total):
        tokens, mask = encode(tokenizer, [texts[index] for index in plan.samples])
        inputs = {"text": (tokens.to(world.device), mask.to(world.device))}
        kept = slice(None) if plan.real else slice(0)
        rows.append(embed(inputs)["text"][kept].float())
        masks.append(inputs["text"][1][kept])
    values = torch.cat(rows)
    return Rows(values, torch.cat(masks) if values.ndim == 3 else None)
