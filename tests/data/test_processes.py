"""Worker processes end with the process that started them, and do not hear Ctrl-C."""

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
from gigabatch.data.processes import ctrl_c_held, worker_pool

def wait(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    pool = worker_pool(2)
    with ctrl_c_held():
        found = [pool.submit(wait, sys.argv[1]) for _ in range(2)]
        if len(sys.argv) > 2:
            os.killpg(0, signal.SIGINT)
    [each.result() for each in found]
"""


def pool_of(folder: Path, *more: str) -> subprocess.Popen[str]:
    script = folder.parent / "pool.py"
    script.write_text(SCRIPT)
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, script, folder, *more],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_parent_that_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    parent = pool_of(tmp_path / "pids")
    try:
        while len(list((tmp_path / "pids").iterdir())) < 2:
            assert parent.poll() is None
            time.sleep(0.01)
        workers = [psutil.Process(int(each.name)) for each in (tmp_path / "pids").iterdir()]
        parent.send_signal(number)
        parent.communicate(timeout=60)  # whoever holds its pipe would keep it open
        assert psutil.wait_procs(workers, timeout=60)[1] == []
    finally:
        parent.kill()


def test_ctrl_c_while_workers_start_is_the_parent_s_alone(tmp_path: Path) -> None:
    parent = pool_of(tmp_path / "pids", "interrupt")
    try:
        said = ""
        while "KeyboardInterrupt" not in said:
            assert parent.stderr is not None
            line = parent.stderr.readline()
            assert line
            said += line
        assert said.count("Traceback") == 1
        assert "spawn_main" not in said
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
