"""Print the peak of memory, in bytes, that a ranking of N queries among N keys needs on top of
the embeddings and of what it gives."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gigabatch.trainer.evaluation.ranking import Relevance, rank_queries
from gigabatch.trainer.evaluation.scores import dot_rows


def peak() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def rank(rows: int) -> None:
    z = torch.randn(rows, 8)
    ids = torch.arange(rows) // 3
    rank_queries(dot_rows(z, z), Relevance.by_id(ids, ids), rows, (1, 10))


torch.set_num_threads(1)
rank(100)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
rank(int(sys.argv[1]))
print(peak() - before)
