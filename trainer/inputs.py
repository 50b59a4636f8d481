"""A run's data: indexes of its sources, sample order, streams, tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from gigabatch.data import glyphs
from gigabatch.data.decode.fields import Fields, captions_for_tokenizer
from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import MicroBatchPlan, TrainPlans
from gigabatch.data.order.epoch_order import ShuffledOrder
from gigabatch.data.order.groups import GroupedOrder
from gigabatch.data.order.mixture import Mixture, Phase, SampleOrder
from gigabatch.data.remote.cache import ShardCache, node_cache
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.rng import key
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import Progress, open_index
from gigabatch.data.shards.pack_hint import check_root, pack_hint
from gigabatch.data.shards.reader import Reader
from gigabatch.data.shards.sources import SOURCE_COLUMN, indexed_codes
from gigabatch.data.stages import NamedStage
from gigabatch.data.stream import MicroBatch, load_stage, open_stream
from gigabatch.data.text.tokenizer import load_tokenizer, named_tokenizer, train_bpe
from gigabatch.trainer.config import Config, column_keys
from gigabatch.trainer.required_fields import check_ids, missing_ids_of_eval

log = logging.getLogger(__name__)
MAX_FIELDS = 20
"""Json fields that an error lists."""
BPE_CAPTIONS = 1_000_000
"""Maximum number of captions on which a tokenizer is trained."""


@dataclass(frozen=True)
class TrainData:
    """The opened training sources of a run."""

    indexes: tuple[Index, ...]
    config: Config

    @property
    def names(self) -> tuple[str, ...]:
        """Path of each source, as the config writes it."""
        return tuple(source.path for source in self.config.data.train)

    def __len__(self) -> int:
        return sum(map(len, self.indexes))

    @property
    def sizes(self) -> list[int]:
        """Number of samples per source."""
        return list(map(len, self.indexes))

    @property
    def digest(self) -> str:
        """Fingerprint of all sources in their order."""
        if len(self.indexes) == 1:
            return self.indexes[0].digest
        return hashlib.sha256("\n".join(i.digest for i in self.indexes).encode()).hexdigest()

    @cached_property
    def mixture(self) -> Mixture:
        """Order of the run's samples over all sources."""
        data, seed = self.config.data, self.config.run.seed
        phases = [Phase(0, tuple(source.weight for source in data.train))]
        phases += [Phase(phase.from_sample, phase.weights) for phase in data.curriculum]
        orders = tuple(self._source_order(i, index) for i, index in enumerate(self.indexes))
        unit = self.config.batch.global_size if data.group else 1
        return Mixture(orders, tuple(phases), seed, unit)

    def _source_order(self, number: int, index: Index) -> SampleOrder:
        data, seed = self.config.data, self.config.run.seed
        source_seed = key(seed, "source", number) if number else seed
        if data.group and data.group != SOURCE_COLUMN:
            codes = indexed_codes(index, data.group, number, data.fields_version)
            check_ids(index, [data.group], self.config)
            return GroupedOrder(codes, self.config.batch.global_size, source_seed)
        return ShuffledOrder(index.shard_sizes, source_seed, data.window)


def data_root(config: Config) -> str:
    """Return the folder or URL of `data.root`; create the demo set on first use.

    Raises:
        GigabatchError: if the folder does not exist.
    """
    root = config.data.root
    if root == glyphs.NAME:
        return str(glyphs.glyphs_root())
    if root.startswith("demo:"):
        raise GigabatchError(f"data.root: there is no demo set {root!r}. Use {glyphs.NAME}.")
    check_root(root)
    return root


def open_train(config: Config, progress: Progress | None = None) -> TrainData:
    """Open the training sources of a run.

    Raises:
        GigabatchError: if a source is missing or damaged.
    """
    columns = [config.data.group] if config.data.group not in (None, SOURCE_COLUMN) else []
    opened = [
        open_index(_locate(config, source.path), progress, columns=columns, cache=cache_of(config))
        for source in config.data.train
    ]
    return TrainData(tuple(opened), config)


def open_eval(config: Config, name: str, progress: Progress | None = None) -> Index:
    """Open an evaluation set by its name inside `data.root`, or by its path."""
    inside = _locate(config, name)
    outside = Path(name).expanduser()
    use_path = not is_remote(inside) and not Path(inside).is_dir() and outside.is_dir()
    return open_index(str(outside) if use_path else inside, progress, cache=cache_of(config))


def _locate(config: Config, path: str) -> str:
    """Return a config's path or URL, relative to `data.root` unless absolute."""
    local = Path(path).expanduser()
    if is_remote(path) or local.is_absolute():
        return path if is_remote(path) else str(local)
    root = data_root(config)
    is_missing = not is_remote(root) and not os.path.exists(Path(root) / path)
    if is_missing and (hint := pack_hint(root)):
        raise GigabatchError(f"data.root: {root} contains no {path}. {hint}")
    return f"{root.rstrip('/')}/{path}" if is_remote(root) else str(Path(root) / path)


def fields_of(
    config: Config,
    columns: Sequence[str] = (),
    numbers: Sequence[str] = (),
    vectors: Mapping[str, VectorSettings] | None = None,
) -> Fields:
    """Return the fields that a training stream of this run yields.

    Args:
        config: The run.
        columns: Fields of the samples' json to yield as codes.
        numbers: Fields of the samples' json to yield as float32.
        vectors: Settings of further vectors, by name.
    """
    data, read = config.data, config.modalities
    return Fields(
        image=data.image if "image" in read else None,
        text=data.captions if "text" in read else None,
        more={name: tower.decode_settings() for name, tower in config.towers.more.items()},
        columns=tuple(columns),
        numbers=tuple(numbers),
        vectors=vectors or {},
        allow_missing=data.missing == "mask",
        flags=tuple(name for name in columns if name in config.objective.flags()),
        ordered=config.objective.ordered_texts() if data.fields_version > 1 else (),
        missing_ids=data.missing_ids,
        version=data.fields_version,
        column_keys=column_keys(config),
        missing_hint="Set data.missing=mask to train on samples that lack a modality.",
    )


def eval_fields(config: Config, columns: Sequence[str] = ()) -> Fields:
    """Return the fields that an evaluation reads: complete pairs, the first caption of each."""
    fields = fields_of(config, columns)
    first_caption = fields.text and fields.text.model_copy(update={"choose": "first"})
    return replace(
        fields,
        text=first_caption,
        allow_missing=False,
        version=2,
        ordered=config.objective.ordered_texts(),
        missing_ids=missing_ids_of_eval(config),
        missing_hint="",
    )


def fields_message(indexes: Sequence[Index]) -> str:
    """Return a sentence that lists the json fields of the sets' first samples; empty without any.

    It follows an error about a field that is missing.
    """
    names: dict[str, None] = {}
    for index in indexes:
        if "json" in index.members:
            with Reader(index) as reader, suppress(GigabatchError, ValueError, RecursionError):
                record = json.loads(reader.read(0, "json"))
                names |= dict.fromkeys(record if isinstance(record, dict) else ())
    shown = ", ".join([*names][:MAX_FIELDS]) + ", ..." * (len(names) > MAX_FIELDS)
    return f" The json fields are: {shown}." if names else ""


def cache_of(config: Config) -> ShardCache:
    """Return this node's cache of remote shards."""
    return node_cache(config.data.cache_gib)


def plans_of(
    data: TrainData, world_size: int, rank: int, first_step: int, last_step: int
) -> TrainPlans:
    """Return the sample numbers of a rank's micro-batches in steps `first_step` to `last_step`."""
    batch = data.config.batch
    sizes = (batch.global_size, batch.micro_size)
    return TrainPlans(data.mixture, *sizes, world_size, rank, first_step, last_step)


def train_stream(
    data: TrainData,
    plans: Iterable[MicroBatchPlan],
    tokenizer: Path,
    columns: Sequence[str],
    pin_memory: bool = False,
    numbers: Sequence[str] = (),
    vectors: Mapping[str, VectorSettings] | None = None,
) -> Iterable[MicroBatch]:
    """Return a stream of the decoded micro-batches of `plans`.

    Args:
        data: Opened sources.
        plans: Samples of this rank's micro-batches.
        tokenizer: File of the run's tokenizer.
        columns: Fields of the samples' json to yield as codes int64 [n].
        pin_memory: Allocate pinned memory, for copies to a GPU.
        numbers: Fields of the samples' json to yield as float32 [n].
        vectors: Settings of further vectors to yield as float32 [n, size], by name.
    """
    settings = data.config.data
    stream: Iterable[MicroBatch] = open_stream(
        data.indexes,
        plans,
        fields=fields_of(data.config, columns, numbers, vectors),
        tokenizer=tokenizer,
        seed=data.config.run.seed,
        workers=settings.workers,
        prefetch=settings.prefetch,
        stages=[NamedStage(path, load_stage(path)) for path in settings.stages],
        pin_memory=pin_memory,
        cache=cache_of(data.config),
    )
    return stream


def make_tokenizer(config: Config, data: TrainData) -> Tokenizer:
    """Return the run's tokenizer; train it if necessary.

    With `train.init_from` and a text tower, it is that of the source run, because the weights
    depend on its token ids. Otherwise it is the one of `data.text`; `bpe` trains one on the
    captions.

    Raises:
        GigabatchError: if the source run has no tokenizer, or there are no captions.
    """
    if not config.texts:
        return train_bpe([], config.data.text)  # Bytes only: a run folder always has a tokenizer.
    init_towers = {part.partition(".")[0] for part in config.train.init_parts}
    if config.train.init_from and init_towers & {*config.texts}:
        return _tokenizer_of_run(config.train.init_from, config.data.text.length)
    if config.data.text.tokenizer != "bpe":
        return named_tokenizer(config.data.text)
    log.info("training a byte-pair tokenizer on the captions of %s", ", ".join(data.names))
    captions = captions_for_tokenizer(
        data.indexes, fields_of(config), BPE_CAPTIONS, cache_of(config)
    )
    first = next(captions, None)
    if first is None:
        raise GigabatchError(
            f"{', '.join(data.names)}: there are no captions. Set data.captions to their member "
            f"and field.{fields_message(data.indexes)}"
        )
    return train_bpe(chain([first], captions), config.data.text)


def _tokenizer_of_run(source: Path, length: int) -> Tokenizer:
    """Load the tokenizer of a run, by its folder or the folder of a checkpoint."""
    paths = [folder / "tokenizer.json" for folder in (source, source.parent.parent)]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise GigabatchError(
            f"train.init_from: {source}: the text tower needs its tokenizer, but {paths[-1]} is "
            "missing. Restore it from that run, or set train.init_parts=[image]."
        )
    tokenizer = load_tokenizer(path)
    padding = tokenizer.padding
    if padding and padding["length"] != length:
        raise GigabatchError(
            f"train.init_from: {path} pads captions to {padding['length']} tokens, but "
            f"data.text.length is {length}. Set data.text.length={padding['length']}."
        )
    return tokenizer
