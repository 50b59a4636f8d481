"""A set's embeddings: this rank's share of the samples through the towers, in order."""

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
from gigabatch.trainer.evaluation.score_rows import Rows
from gigabatch.trainer.inputs import cache_of, eval_fields
from gigabatch.trainer.objectives.common import first_coordinates
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.step import tower_inputs

log = logging.getLogger(__name__)
Inputs = Mapping[str, tuple[Tensor, ...]]
Embed = Callable[[Inputs], Mapping[str, Tensor]]
"""Towers' inputs to {modality: [B, D], or tokens [B, T, D]}, in evaluation mode."""
NAMED_BY_NUMBER = "sample"
"""The column that every sample has: its own number."""


@dataclass(frozen=True)
class Embedded:
    """`taps`: modality -> this rank's rows [n, D], or of tokens [n, T, D], whose `masks` (bool
    [n, T]) tell the real ones. `columns`: int64 [n] codes of fields of the samples' json, and
    `sample`."""

    taps: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, modality: str) -> Rows:
        return Rows(self.taps[modality], self.masks.get(modality))


@dataclass(frozen=True)
class Reading:
    """What is read of each sample: `modalities`, of the run's; `columns` of its json; `captions`:
    where the text is, if not where the run has it; `width`: of unit vectors so many first
    coordinates alone, of unit length again (None: all)."""

    modalities: Sequence[str] = ("image", "text")
    columns: Sequence[str] = ()
    captions: CaptionSettings | None = None
    width: int | None = None

    def fields(self, config: Config) -> Fields:
        """Whole samples, the first caption of each. Raises GigabatchError for a modality or
        coordinates that the run has not."""
        require_towers(config, self.modalities)
        if self.width is not None and self.width > config.towers.width:
            raise GigabatchError(
                f"width={self.width}: the run's vectors have {config.towers.width} coordinates "
                "(towers.width). Take as many at most."
            )
        whole = eval_fields(config, list(dict.fromkeys(self.columns)))
        image, text = whole.image, self.captions or whole.text
        return replace(
            whole,
            image=image if "image" in self.modalities else None,
            text=text if "text" in self.modalities else None,
            more={name: read for name, read in whole.more.items() if name in self.modalities},
        )


def require_towers(config: Config, modalities: Sequence[str]) -> None:
    """Raises GigabatchError for a modality that the run has not."""
    for name in modalities:
        if name not in config.modalities:
            raise GigabatchError(
                f"the run has no tower {name!r}: its objective reads "
                f"{', '.join(config.modalities)}. `gigabatch eval` measures retrieval between two "
                "of those (--task retrieval between=[A,B]), or one (--task knn or probe, "
                "modality=A)."
            )


@torch.no_grad()
def embed_set(
    embed: Embed,
    index: Index,
    config: Config,
    run: RunFolder,
    world: World,
    reading: Reading,
    stop: Callable[[], bool] = lambda: False,
) -> Embedded | None:
    """This rank's rows of an indexed set; None where `stop`, which is asked after each micro-batch
    and must answer alike on every rank, said to leave off."""
    fields = reading.fields(config)
    stream = open_stream(
        [index],
        EvalPlans(len(index), config.batch.micro_size, world.size, world.rank),
        fields=fields,
        tokenizer=run.tokenizer if fields.texts_only.modalities else None,
        seed=config.run.seed,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        cache=cache_of(config),
    )
    columns = (NAMED_BY_NUMBER, *fields.columns)
    taps: dict[str, list[Tensor]] = {}
    masks: dict[str, list[Tensor]] = {}
    codes: dict[str, list[Tensor]] = {name: [] for name in columns}
    bad: list[str] = []
    for micro in stream:
        if micro.real:
            bad += [each.why for each in micro.substitutions]
        batch = micro.to(world.device)
        kept = slice(None) if batch.real else slice(0)
        for tap, vectors in embed(tower_inputs(batch, config.data, rng_key=None)).items():
            rows = vectors[kept].float()
            rows = rows if reading.width is None else first_coordinates(rows, reading.width)
            taps.setdefault(tap, []).append(rows)
            if vectors.ndim == 3:
                whole = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
                real = batch.tensors.get(f"{tap}_mask", whole)
                masks.setdefault(tap, []).append(real[kept])
        for name in columns:
            codes[name].append(batch.tensors[name][kept])
        if stop():
            return None
    _tell_bad([why for rank in world.gather(bad) for why in rank], index, world)
    return Embedded(
        {name: torch.cat(rows) for name, rows in taps.items()},
        {name: torch.cat(rows) for name, rows in codes.items()},
        {name: torch.cat(rows) for name, rows in masks.items()},
    )


def _tell_bad(bad: list[str], index: Index, world: World) -> None:
    if bad and world.is_main:
        log.warning(
            "%s: %d of %d samples cannot be used, and others were measured in their place; the "
            "first: %s",
            index.source, len(bad), len(index), bad[0],
        )  # fmt: skip


def caption_settings(config: Config, field: str) -> CaptionSettings:
    """The run's captions, but from the member txt, or from the json field or path `field`."""
    member = "txt" if field == "txt" else "json"
    place = {"member": member, "field": None if member == "txt" else field, "choose": "first"}
    return config.data.captions.model_copy(update=place)


@torch.no_grad()
def embed_texts(
    embed: Embed, texts: Sequence[str], config: Config, run: RunFolder, world: World
) -> Rows:
    """This rank's rows of texts, which every rank has: a run of them, in their order."""
    require_towers(config, ["text"])
    tokenizer = load_tokenizer(run.tokenizer)
    rows, masks = [], []
    for plan in EvalPlans(len(texts), config.batch.micro_size, world.size, world.rank):
        tokens, mask = encode(tokenizer, [texts[number] for number in plan.samples])
        inputs = {"text": (tokens.to(world.device), mask.to(world.device))}
        kept = slice(None) if plan.real else slice(0)
        rows.append(embed(inputs)["text"][kept].float())
        masks.append(inputs["text"][1][kept])
    values = torch.cat(rows)
    return Rows(values, torch.cat(masks) if values.ndim == 3 else None)
