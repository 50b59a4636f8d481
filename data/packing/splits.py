"""Find several splits, such as train and validation, in what would become one set."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.tables import Row
from gigabatch.data.shards.unread import count_splits, files_by_split, split_of, split_pattern

MOST_VALUES = 20
"""A column with more values than this does not hold splits."""


def reject_splits(source: str, files: Sequence[str]) -> None:
    """Raise GigabatchError if files are of several splits: evaluation data would be trained on."""
    if splits := files_by_split(files):
        folder = os.path.dirname(files[0])
        commands = [
            f"`gigabatch data pack {shlex.quote(f'{folder}/{split_pattern(split, splits)}')} "
            f"OUT/{split}`"
            for split in splits
        ]
        raise GigabatchError(
            f"{source}: its files are of several splits: {count_splits(splits)}. Pack each into a "
            f"set of its own: {', '.join(commands)}; or set --merge-splits to make one set of all."
        )


class SplitColumn:
    """Counts the values of a table's column `split`, if it has one."""

    def __init__(self, columns: Iterable[str]) -> None:
        self.name = next((name for name in columns if name.lower() == "split"), None)
        self.counts: Counter[str] = Counter()

    def observe(self, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        """Yield numbered rows unchanged and count the values."""
        for number, row in rows:
            if self.name is not None and len(self.counts) <= MOST_VALUES:
                self.counts[str(row.get(self.name))] += 1
            yield number, row

    def warning(self, source: Path, out: Path) -> str | None:
        """Return a warning that names the values and the commands that separate them, or None."""
        if len({split_of(value) for value in self.counts} - {None}) < 2:
            return None
        values = ", ".join(f"{value} ({count:,})" for value, count in self.counts.most_common())
        largest = self.counts.most_common(1)[0][0]
        folder, view = shlex.quote(str(out)), shlex.quote(f"{out}-{largest}")
        condition = shlex.quote(f'{self.name} == "{largest}"')
        return (
            f"{source}: column {self.name!r} states several splits, which one set now merges: "
            f"{values}. Make a view of each: `gigabatch data index {folder} --columns "
            f"{self.name}`, then `gigabatch data filter {folder} {condition} {view}`"
        )
