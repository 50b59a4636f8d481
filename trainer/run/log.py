"""The log file of a run, train.log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from gigabatch.trainer.distributed import World
from gigabatch.trainer.run.folder import RunFolder


@contextmanager
def log_to(run: RunFolder, world: World) -> Iterator[None]:
    """Write rank 0's log messages to train.log only.

    The process that started the run reads that file and prints it.
    """
    logger = logging.getLogger("gigabatch")
    handler = logging.FileHandler(run.log) if world.is_main else logging.NullHandler()
    line = "%(asctime)s %(levelname).1s %(message)s"
    handler.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S"))
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()
