"""Script for torchrun ranks: prints the metrics of tasks on a run.

Arguments: the run, and a JSON list of lists: a set, a task, and its `key=value` texts.
"""

from __future__ import annotations

import json
import sys

from gigabatch.trainer.distributed import exit_now, join_world
from gigabatch.trainer.evaluation.command import open_context
from gigabatch.trainer.evaluation.registry import parse_task
from gigabatch.trainer.evaluation.task import SetTask
from gigabatch.trainer.run.create import open_run

with join_world(1) as world:
    run = open_run(sys.argv[1])
    report = []
    for on, name, *settings in json.loads(sys.argv[2]):
        task = parse_task(name, settings)
        assert isinstance(task, SetTask)
        report.append(task.measure(open_context(run, on, world)).metrics())
    if world.is_main:
        print(json.dumps(report))
exit_now(0)
