"""Opening a run's data: sources from the config, their indexes, their mixture, the tokeniser."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from gigabatch.data import glyphs
from gigabatch.data.decode.fields import Fields, captions_for_tokenizer
from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import TrainPlans
from gigabatch.data.order.epoch_order import ShuffledOrder
from gigabatch.data.order.groups import GroupedOrder
from gigabatch.data.order.mixture import Mixture, Phase, SampleOrder
from gigabatch.data.remote.cache import ShardCache, node_cache
from gigabatch.data.remote.places import is_remote
from gigabatch.data.rng import key
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import Progress, open_index
from gigabatch.data.shards.sources import SOURCE_COLUMN, UNKNOWN_CODE, indexed_codes
from gigabatch.data.stream import MicroBatch, load_stage, open_stream
from gigabatch.data.text.tokenizer import load_tokenizer, named_tokenizer, train_bpe
from gigabatch.trainer.config import Config, what_is_read

log = logging.getLogger(__name__)
BPE_CAPTIONS = 1_000_000  # at most this many captions train a tokeniser


@dataclass(frozen=True)
class TrainData:
    """The sources of a run, opened. `names`: of each source, as the config has them."""

    indexes: tuple[Index, ...]
    config: Config

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.path for source in self.config.data.train)

    def __len__(self) -> int:
        return sum(map(len, self.indexes))

    @property
    def sizes(self) -> list[int]:
        """Samples of each source."""
        return list(map(len, self.indexes))

    @property
    def digest(self) -> str:
        """The fingerprint of all sources, in their order."""
        if len(self.indexes) == 1:
            return self.indexes[0].digest
        return hashlib.sha256("\n".join(i.digest for i in self.indexes).encode()).hexdigest()

    @cached_property
    def mixture(self) -> Mixture:
        """The order of the run's samples."""
        data, seed = self.config.data, self.config.run.seed
        phases = [Phase(0, tuple(source.weight for source in data.train))]
        phases += [Phase(each.from_sample, each.weights) for each in data.curriculum]
        orders = tuple(self._walk(i, index) for i, index in enumerate(self.indexes))
        unit = self.config.batch.global_size if data.group else 1
        return Mixture(orders, tuple(phases), seed, unit)

    def _walk(self, number: int, index: Index) -> SampleOrder:
        data, seed = self.config.data, self.config.run.seed
        own = key(seed, "source", number) if number else seed
        if data.group and data.group != SOURCE_COLUMN:
            codes = indexed_codes(index, data.group)
            if (codes == UNKNOWN_CODE).all():
                raise GigabatchError(
                    f"data.group: no sample of {index.source} has a field {data.group!r} in its "
                    "json. Name one that they have, or `source`."
                )
            return GroupedOrder(codes, self.config.batch.global_size, own)
        return ShuffledOrder(index.shard_sizes, own, data.window)


def data_root(config: Config) -> str:
    """The folder or URL of `data.root`; the demo set is made if it is asked for and not there."""
    root = config.data.root
    if root == glyphs.NAME:
        return str(glyphs.glyphs_root())
    if root.startswith("demo:"):
        raise GigabatchError(f"data.root: {root!r} is not a demo set; there is {glyphs.NAME}.")
    if not is_remote(root) and not Path(root).is_dir():
        raise GigabatchError(f"data.root: {root} is not a folder. Set it to the folder of shards.")
    return root


def open_train(config: Config, progress: Progress | None = None) -> TrainData:
    """Raises GigabatchError for whatever is wrong with a source."""
    columns = [config.data.group] if config.data.group not in (None, SOURCE_COLUMN) else []
    opened = [
        open_index(_place(config, source.path), progress, columns=columns, cache=cache_of(config))
        for source in config.data.train
    ]
    return TrainData(tuple(opened), config)


def open_eval(config: Config, name: str, progress: Progress | None = None) -> Index:
    """A set of `eval.sets`, inside `data.root`, or by its path."""
    inside = _place(config, name)
    own = Path(name).expanduser()
    outside = not is_remote(inside) and not Path(inside).is_dir() and own.is_dir()
    return open_index(str(own) if outside else inside, progress, cache=cache_of(config))


def _place(config: Config, path: str) -> str:
    """A path of the config, inside `data.root` unless it says otherwise."""
    own = Path(path).expanduser()
    if is_remote(path) or own.is_absolute():
        return path if is_remote(path) else str(own)
    root = data_root(config)
    return f"{root.rstrip('/')}/{path}" if is_remote(root) else str(Path(root) / path)


def fields_of(
    config: Config,
    columns: Sequence[str] = (),
    numbers: Sequence[str] = (),
    vectors: Mapping[str, VectorSettings] | None = None,
) -> Fields:
    """What a stream of this run yields."""
    data, read = config.data, config.modalities
    return Fields(
        image=data.image if "image" in read else None,
        text=data.captions if "text" in read else None,
        more={name: what_is_read(tower) for name, tower in config.towers.more.items()},
        columns=tuple(columns),
        numbers=tuple(numbers),
        vectors=vectors or {},
        allow_missing=data.missing == "mask",
    )


def eval_fields(config: Config, columns: Sequence[str] = ()) -> Fields:
    """What an evaluation reads: whole pairs, the first caption of each."""
    whole = fields_of(config, columns)
    first = whole.text and whole.text.model_copy(update={"choose": "first"})
    return replace(whole, text=first, allow_missing=False)


def cache_of(config: Config) -> ShardCache:
    """Where this node keeps copies of remote shards."""
    return node_cache(config.data.cache_gib)


def plans_of(
    data: TrainData, world_size: int, rank: int, first_step: int, last_step: int
) -> TrainPlans:
    """A rank's micro-batches of some steps of the run."""
    batch = data.config.batch
    sizes = (batch.global_size, batch.micro_size)
    return TrainPlans(data.mixture, *sizes, world_size, rank, first_step, last_step)


def train_stream(
    data: TrainData,
    plans: TrainPlans,
    tokenizer: Path,
    columns: Sequence[str],
    pin_memory: bool = False,
    numbers: Sequence[str] = (),
    vectors: Mapping[str, VectorSettings] | None = None,
) -> Iterable[MicroBatch]:
    """The micro-batches of `plans`, read as the config says."""
    settings = data.config.data
    return open_stream(
        data.indexes,
        plans,
        fields=fields_of(data.config, columns, numbers, vectors),
        tokenizer=tokenizer,
        seed=data.config.run.seed,
        workers=settings.workers,
        prefetch=settings.prefetch,
        stages=[load_stage(path) for path in settings.stages],
        pin_memory=pin_memory,
        cache=cache_of(data.config),
    )


def make_tokenizer(config: Config, data: TrainData) -> Tokenizer:
    """The tokeniser that `data.text` asks for (a byte-pair one is trained on the captions), or
    that of the run whose text tower this one begins with: its weights know no other."""
    if not config.texts:
        return train_bpe([], config.data.text)  # of bytes alone: a run's folder always has one
    parts = {part.partition(".")[0] for part in config.train.init_parts}
    if config.train.init_from and parts & {*config.texts}:
        return _initial_tokenizer(config.train.init_from, config.data.text.length)
    if config.data.text.tokenizer != "bpe":
        return named_tokenizer(config.data.text)
    log.info("training a byte-pair tokeniser on the captions of %s", ", ".join(data.names))
    found = captions_for_tokenizer(data.indexes, fields_of(config), BPE_CAPTIONS, cache_of(config))
    first = next(found, None)
    if first is None:
        raise GigabatchError(
            f"{', '.join(data.names)}: no caption was found. Set data.captions to where they are."
        )
    return train_bpe(chain([first], found), config.data.text)


def _initial_tokenizer(source: Path, length: int) -> Tokenizer:
    """That of a run, by its folder or one of its checkpoints'."""
    places = [folder / "tokenizer.json" for folder in (source, source.parent.parent)]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise GigabatchError(
            f"train.init_from: {source}: a text tower needs its tokeniser, and {places[-1]} is not "
            "there. Restore it from that run, or set train.init_parts=[image]."
        )
    tokenizer = load_tokenizer(found)
    padding = tokenizer.padding
    if padding and padding["length"] != length:
        raise GigabatchError(
            f"train.init_from: {found} makes {padding['length']} tokens of a caption, and "
            f"data.text.length is {length}. Set it to {padding['length']}."
        )
    return tokenizer
