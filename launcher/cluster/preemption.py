"""Nodes that Ray is about to lose, and says so beforehand: preempted by a cloud, or drained.

Ray Train's own word for it (`ray.train.get_preemption_info`) is a barrier of all workers at each
step. The driver asks Ray instead, as Ray Train's watcher does, and workers hear through the run
folder: a checkpoint now, and on; when the node is gone, Ray starts the group anew without it.
"""

from __future__ import annotations

import logging
import os
import signal
import time

from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
EVERY_S = 2.0


class Drains:
    """Asks, at most every EVERY_S seconds, for nodes about to be lost. For a new one the run's
    workers are asked for a checkpoint; where it is this process's own node, for a stop."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.known, self.asked_at, self.failed = run, set[str](), 0.0, False

    def look(self) -> None:
        if time.monotonic() - self.asked_at < EVERY_S:
            return
        self.asked_at = time.monotonic()
        try:
            drained = draining_nodes()
        except Exception as error:  # Ray is busy, or another version: no reason to end a run
            if not self.failed:
                log.warning("Ray does not say which nodes it is about to lose: %s", error)
            self.failed = True
            return
        for node, deadline_ms in drained.items():
            if node not in self.known:
                self.known.add(node)
                self._answer(node, deadline_ms)

    def _answer(self, node: str, deadline_ms: int) -> None:
        import ray

        left = f"in {deadline_ms / 1000 - time.time():.0f} s" if deadline_ms else "soon"
        host = next(
            (n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] == node), node[:8]
        )
        if node == ray.get_runtime_context().get_node_id():
            log.warning("this node, %s, will be taken away %s: stopping", host, left)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            log.warning("node %s will be taken away %s: saving a checkpoint", host, left)
            self.run.request_save()


def draining_nodes() -> dict[str, int]:
    """Node id -> when it will be taken away, in ms since 1970, or 0 where that is not known."""
    from ray._private.state import state

    return state.get_draining_nodes() or {}
