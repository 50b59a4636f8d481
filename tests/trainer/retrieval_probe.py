"""On torchrun ranks: ranks of 50 queries dealt unevenly; the last rank of three holds none."""

from __future__ import annotations

import json

import torch

from gigabatch.trainer.distributed import join_world, leave
from gigabatch.trainer.evaluation.retrieval import _ranks

with join_world(1) as world:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(50, 6, generator=generator) for _ in range(2))
    ids = torch.randint(0, 20, (50,), generator=generator)
    edges = {1: [0, 50], 3: [0, 33, 50, 50]}[world.size]
    mine = slice(edges[world.rank], edges[world.rank + 1])
    ranks = _ranks(queries[mine], keys[mine], ids[mine], world)
    if world.is_main:
        print(json.dumps(ranks.tolist()))
leave(0)
