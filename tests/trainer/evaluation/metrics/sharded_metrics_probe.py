"""Script for torchrun ranks: prints `sharded_metrics` as JSON."""

from __future__ import annotations

import json

from sharded_metrics import sharded_metrics

from gigabatch.trainer.distributed import join_world, leave

with join_world(1) as world:
    report = sharded_metrics(world)
    if world.is_main:
        print(json.dumps(report))
leave(0)
