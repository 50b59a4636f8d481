"""Script that prints the peak memory of a ranking in bytes.

Arguments: the number of queries and keys, and the tokens of each (0 for vectors). The embeddings
and the result are not counted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gigabatch.trainer.evaluation.metrics import score_rows as scores
from gigabatch.trainer.evaluation.metrics.ranking import Relevance, rank_queries
from gigabatch.trainer.evaluation.metrics.score_rows import Rows, score_rows


def peak() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def rank(rows: int, tokens: int) -> None:
    z = Rows(torch.randn(rows, 8))
    if tokens:  # late interaction is slower, so blocks are smaller
        scores.BUDGET = 1 << 20
        z = Rows(torch.randn(rows, tokens, 8), torch.ones(rows, tokens, dtype=torch.bool))
    ids = torch.arange(rows) // 3
    rank_queries(score_rows(z, z), Relevance.by_id(ids, ids), rows, (1, 10))


torch.set_num_threads(1)
rows, tokens = map(int, sys.argv[1:])
rank(100, tokens)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
rank(rows, tokens)
print(peak() - before)
