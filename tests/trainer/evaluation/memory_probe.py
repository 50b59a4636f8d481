"""Print the peak of memory, in bytes, that a ranking of N queries among N keys, vectors or tokens,
needs on top of the embeddings and of what it gives."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gigabatch.trainer.evaluation import score_rows as scores
from gigabatch.trainer.evaluation.ranking import Relevance, rank_queries
from gigabatch.trainer.evaluation.score_rows import Rows, score_rows


def peak() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def rank(rows: int, tokens: int) -> None:
    z = Rows(torch.randn(rows, 8))
    if tokens:  # each score takes longer: let fewer of them be a block
        scores.BUDGET = 1 << 20
        z = Rows(torch.randn(rows, tokens, 8), torch.ones(rows, tokens, dtype=torch.bool))
    ids = torch.arange(rows) // 3
    rank_queries(score_rows(z, z), Relevance.by_id(ids, ids), rows, (1, 10))


torch.set_num_threads(1)
asked, tokens = map(int, sys.argv[1:])
rank(100, tokens)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
rank(asked, tokens)
print(peak() - before)
