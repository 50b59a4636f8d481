"""Worker processes exit with their parent and do not receive Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from gigabatch.data.processes import ctrl_c_deferred, worker_pool

def wait(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    pool = worker_pool(2)
    with ctrl_c_deferred():
        futures = [pool.submit(wait, sys.argv[1]) for _ in range(2)]
        if len(sys.argv) > 2:
            os.killpg(0, signal.SIGINT)
    [future.result() for future in futures]
"""


def start_pool(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start a parent whose two workers write their process ids into `folder`."""
    script = folder.parent / "pool.py"
    script.write_text(SCRIPT)
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, script, folder, *more],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_exit_when_parent_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    parent = start_pool(tmp_path / "pids")
    try:
        while len(list((tmp_path / "pids").iterdir())) < 2:
            assert parent.poll() is None
            time.sleep(0.01)
        workers = [psutil.Process(int(path.name)) for path in (tmp_path / "pids").iterdir()]
        parent.send_signal(number)
        parent.communicate(timeout=60)  # waits until no process holds the pipe
        assert psutil.wait_procs(workers, timeout=60)[1] == []
    finally:
        parent.kill()


def test_ctrl_c_during_worker_start_reaches_only_parent(tmp_path: Path) -> None:
    parent = start_pool(tmp_path / "pids", "interrupt")
    try:
        output = ""
        while "KeyboardInterrupt" not in output:
            assert parent.stderr is not None
            line = parent.stderr.readline()
            assert line
            output += line
        assert output.count("Traceback") == 1
        assert "spawn_main" not in output
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
