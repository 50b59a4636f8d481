"""Script for torchrun ranks: run evaluation tasks and print their metrics as JSON.

Arguments: the run, and a JSON list of [set, task, option, ...] lists.
"""

from __future__ import annotations

import json
import sys

from gigabatch.trainer.distributed import join_world, leave
from gigabatch.trainer.evaluation.settings import task_settings
from gigabatch.trainer.evaluation.task import Subject
from gigabatch.trainer.evaluation.tasks import measure
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.run.create import open_run

with join_world(1) as world:
    run = open_run(sys.argv[1])
    step, towers = load_newest_towers(run, world)
    report = []
    for on, task, *options in json.loads(sys.argv[2]):
        subject = Subject(run, run.config(), towers, world, on, step)
        report.append(measure(task, subject, task_settings(task, options)).metrics())
    if world.is_main:
        print(json.dumps(report))
leave(0)
