"""Preemption notices from Ray: nodes that a cloud will remove or that are being drained.

`ray.train.get_preemption_info` would need a barrier of all workers at each step. Instead, the
driver polls Ray, as Ray Train's watcher does, and requests a checkpoint through the run folder.
Training continues; once the node is gone, Ray restarts the workers without it.
"""

from __future__ import annotations

import logging
import os
import signal
import time

from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
POLL_S = 2.0


class PreemptionWatcher:
    """Poller of preemption notices, which requests a checkpoint or a stop.

    After a notice about this process's node, it requests a graceful stop; after a notice about any
    other node, a checkpoint.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.known, self.polled_at, self.failed = run, set[str](), 0.0, False

    def poll(self) -> None:
        """Handle new notices; does nothing if the last poll was less than POLL_S seconds ago."""
        if time.monotonic() - self.polled_at < POLL_S:
            return
        self.polled_at = time.monotonic()
        try:
            draining = draining_nodes()
        except (
            Exception
        ) as error:  # Ray is busy or has an incompatible version; the run can continue.
            if not self.failed:
                log.warning("cannot read preemption notices from Ray: %s", error)
            self.failed = True
            return
        for node, deadline_ms in draining.items():
            if node not in self.known:
                self.known.add(node)
                self._handle(node, deadline_ms)

    def _handle(self, node: str, deadline_ms: int) -> None:
        import ray

        when = f"in {deadline_ms / 1000 - time.time():.0f} s" if deadline_ms else "soon"
        host = next(
            (n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] == node), node[:8]
        )
        if node == ray.get_runtime_context().get_node_id():
            log.warning("this node (%s) will be removed %s; stopping", host, when)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            log.warning("node %s will be removed %s; saving a checkpoint", host, when)
            self.run.request_save()


def draining_nodes() -> dict[str, int]:
    """Return the removal time of each draining node by id, in ms since 1970; 0 if unknown."""
    from ray._private.state import state

    return state.get_draining_nodes() or {}
