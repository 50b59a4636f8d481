"""Checks that samples have the json fields that a run or an evaluation reads, with counts."""

from __future__ import annotations

from collections.abc import Sequence

from gigabatch.data.decode.ids import MissingIds
from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.cache import node_cache
from gigabatch.data.shards.field_check import Use, check_fields
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.sources import SOURCE_COLUMN
from gigabatch.trainer.config import Config, column_keys


def check_columns(config: Config, indexes: Sequence[Index]) -> None:
    """Check that the samples' json has what the objective reads of it.

    A run that began with version 1 of the fields resumes without the check.

    Raises:
        GigabatchError: if samples lack a field; the message counts them and names the key.
    """
    objective, keys = config.objective, column_keys(config)
    if config.data.fields_version == 1:
        return
    for name in {"sample", *config.modalities} & {*objective.columns(), config.data.group}:
        raise GigabatchError(
            f"{keys[name]}: {name!r} is what a run calls a part of every sample, not only a json "
            "field. Rewrite the shards with the field under a different name."
        )
    uses: dict[str, Use] = dict.fromkeys(objective.numbers(), "number")
    uses |= dict.fromkeys(objective.flags(), "flag")
    for index in indexes:
        check_fields(index, uses, keys, cache=node_cache(config.data.cache_gib))
        check_ids(index, [name for name in objective.columns() if name not in uses], config)


def check_ids(index: Index, names: Sequence[str], config: Config) -> None:
    """Check that the samples of a training set have the ids in these json fields.

    Raises:
        GigabatchError: if samples lack an id that `data.missing_ids` requires, or if all do.
    """
    check_fields(
        index,
        _uses(names),
        column_keys(config),
        remedy="set data.missing_ids=unique: each of them then equals only itself",
        allow_missing=config.data.missing_ids == "unique" or config.data.fields_version == 1,
        cache=node_cache(config.data.cache_gib),
    )


def check_eval_columns(config: Config, index: Index, columns: Sequence[str]) -> None:
    """Check that the samples of an evaluation set have the ids in these json fields.

    Raises:
        GigabatchError: if samples lack them; the message counts them.
    """
    check_fields(
        index,
        _uses(columns),
        dict.fromkeys(columns, "positives") | column_keys(config),
        remedy="measure pairs only (`gigabatch eval`: positives=none)",
        allow_missing=missing_ids_of_eval(config) == "unique",
        cache=node_cache(config.data.cache_gib),
    )


def missing_ids_of_eval(config: Config) -> MissingIds:
    """Return the treatment of samples without an id in evaluations.

    A run that began with version 1 could have them, so that an evaluation must not end it.
    """
    return config.data.missing_ids if config.data.fields_version > 1 else "unique"


def _uses(names: Sequence[str]) -> dict[str, Use]:
    return dict.fromkeys((name for name in names if name != SOURCE_COLUMN), "id")
