"""Script for torchrun ranks: prints `sharded_metrics` as JSON."""

from __future__ import annotations

import json

from sharded_metrics import sharded_metrics

from gigabatch.trainer.distributed import exit_now, join_world

with join_world(1) as world:
    report = sharded_metrics(world)
    if world.is_main:
        print(json.dumps(report))
exit_now(0)
