"""On torchrun ranks: figures of 50 rows dealt unevenly; the last rank of several holds none."""

from __future__ import annotations

import json

import torch

from gigabatch.trainer.distributed import join_world, leave
from gigabatch.trainer.evaluation.embedding import Embedded
from gigabatch.trainer.evaluation.retrieval import retrieval_figures

with join_world(1) as world:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(50, 6, generator=generator) for _ in range(2))
    image[10:20], text[30:40] = image[:10], text[20:30]  # ties
    ids = torch.randint(0, 20, (50,), generator=generator)
    edges = {1: [0, 50], 2: [0, 41, 50], 4: [0, 17, 33, 50, 50]}[world.size]
    mine = slice(edges[world.rank], edges[world.rank + 1])
    found = Embedded({"image": image[mine], "text": text[mine]}, {"concept": ids[mine]})
    report = {name: v.tolist() for name, v in retrieval_figures(found, "concept", world).items()}
    if world.is_main:
        print(json.dumps(report))
leave(0)
