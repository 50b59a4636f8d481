"""All rows of a table in memory, for shuffling."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.tables import Row, Table

STORE_BYTES = 4 << 30
"""Maximum memory of a `RowStore`."""


class RowStore:
    """All rows of a table in memory, for reading in any order.

    Uncompressed Arrow files stay on disk, memory-mapped.
    """

    def __init__(self, table: Table) -> None:
        """Read the table.

        Raises:
            GigabatchError: if its rows take more than `STORE_BYTES`.
        """
        self._batches: list[Any] = []
        before, json_bytes, starts = pa.total_allocated_bytes(), 0, [0]
        for batch in table.batches():
            if isinstance(batch, list):  # Dictionaries would take several times as much as JSON.
                batch = [json.dumps(row).encode() for row in batch]
                json_bytes += sum(map(len, batch)) + 41 * len(batch)
            self._batches.append(batch)
            starts.append(starts[-1] + len(batch))
            if pa.total_allocated_bytes() - before + json_bytes > STORE_BYTES:
                raise GigabatchError(
                    f"{table.source}: the table cannot be shuffled: its rows take more than "
                    f"{STORE_BYTES >> 30} GiB of memory. Pack it without --shuffle-seed, then pack "
                    "the resulting shards with --shuffle-seed; shards can be read in any order."
                )
        self._starts = np.array(starts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, number: int) -> Row:
        """Return row `number`."""
        index = int(np.searchsorted(self._starts, number, side="right")) - 1
        batch, offset = self._batches[index], number - int(self._starts[index])
        if isinstance(batch, list):
            row: Row = json.loads(batch[offset])
            return row
        return dict(batch.slice(offset, 1).to_pylist()[0])
