"""On torchrun ranks: the figures of `figures_of_ranks`."""

from __future__ import annotations

import json

from figures_of_ranks import figures

from gigabatch.trainer.distributed import join_world, leave

with join_world(1) as world:
    report = figures(world)
    if world.is_main:
        print(json.dumps(report))
leave(0)
