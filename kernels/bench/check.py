"""Check the kernels on a GPU, from a plain checkout:

    python kernels/bench/check.py OUT [--minutes 8]

Runs the GPU tests, compute-sanitizer where it is installed, and the benchmark, each in a process of
its own that is stopped when its share of the time is over; everything they say is in OUT. gigabatch
need not be installed: torch, triton, pytest, hypothesis, numpy and matplotlib are enough.

Exit codes: 0 all well, 1 a test failed, the sanitizer found something or the benchmark broke off,
2 no GPU, or arguments that do not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "tests" / "kernels"
FILES = ("environment.txt", "pytest.txt", "sanitizer.txt", "kernels.txt", "kernels.json",
         "kernels.md", "kernels.png", "summary.txt")  # fmt: skip
GRACE_S = 10  # from the request to stop until the kill
Verdict = tuple[str, bool]  # in words, and whether it is a failure
FIND_GPU = "import torch; torch.zeros(1).cuda(); print(torch.cuda.get_device_name())"
VERSIONS = """
import importlib.metadata, platform
print("python", platform.python_version())
for name in ("torch", "triton", "numpy", "pytest", "hypothesis", "matplotlib"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
import torch
print("cuda", torch.version.cuda, "| capability", torch.cuda.get_device_capability())
"""


@contextmanager
def checkout() -> Iterator[dict[str, str]]:
    """The environment of a process in which this checkout's kernels are `gigabatch.kernels`."""
    with tempfile.TemporaryDirectory(prefix="gigabatch-") as folder:
        package = Path(folder, "gigabatch")
        package.mkdir()
        (package / "kernels").symlink_to(REPOSITORY / "kernels", target_is_directory=True)
        path = os.pathsep.join(filter(None, [folder, str(TESTS), os.environ.get("PYTHONPATH")]))
        # CI: hypothesis then sets no deadline, which a kernel's compilation would miss.
        more = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1",
                "CI": "1", "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis"}  # fmt: skip
        yield {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more


def run(command: list[str], log: Path, limit_s: float, env: dict[str, str]) -> int | None:
    """The exit code, or None if it had to be stopped; output to the screen and to `log`, added."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=env,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        copier = Thread(target=_copy, args=(process.stdout, file), daemon=True)
        copier.start()
        try:
            return process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)  # it may still write what it has
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            file.write(f"\nstopped after {limit_s:.0f} s\n".encode())
            return None
        finally:
            _signal(process, signal.SIGKILL)  # the whole group: what it started, too
            process.wait()
            copier.join(GRACE_S)


def _copy(source: IO[bytes], file: IO[bytes]) -> None:
    for line in source:
        file.write(line)
        file.flush()
        sys.stdout.write(line.decode(errors="replace"))
        sys.stdout.flush()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def check(out: Path, minutes: float, gpu: str) -> int:
    total = 60 * minutes
    deadline, said = time.monotonic() + total, [f"GPU: {gpu}"]
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    with checkout() as env:
        for command in (["nvidia-smi"], [sys.executable, "-c", VERSIONS]):
            if shutil.which(command[0]):
                run(command, out / "environment.txt", 30, env)
        verdicts = [
            check_tests(out / "pytest.txt", min(180, total * 3 / 8), env),
            check_memory(out / "sanitizer.txt", min(60, total / 8), env),
            measure(out, deadline - time.monotonic() - 2 * GRACE_S, env),
        ]
    said += [line for line, _ in verdicts]
    failed = any(bad for _, bad in verdicts)
    said.append("FAILED" if failed else "all well")
    (out / "summary.txt").write_text("\n".join(said) + "\n")
    print("\n" + "\n".join(said))
    return int(failed)


def check_tests(log: Path, limit_s: float, env: dict[str, str]) -> Verdict:
    code = run(
        [sys.executable, "-m", "pytest", "-m", "gpu", str(TESTS), f"--confcutdir={TESTS}", "-q",
         "-o", "addopts=", "-o", f"pythonpath={TESTS}", "-p", "no:cacheprovider",
         *(["-n", "6"] if find_spec("xdist") else [])],  # most of the time kernels are compiled
        log, limit_s, env,
    )  # fmt: skip
    how = "STOPPED, out of time" if code is None else "passed" if code == 0 else "FAILED"
    return f"tests: {how}: {last_line(log)}", code != 0


def check_memory(log: Path, limit_s: float, env: dict[str, str]) -> Verdict:
    """The smoke run twice: alone, which also compiles its kernels, and under compute-sanitizer."""
    began = time.monotonic()
    smoke = [sys.executable, "-m", "gigabatch.kernels.bench.check", "--smoke"]
    code = run(smoke, log, limit_s, env)
    if code != 0:
        how = "STOPPED, out of time" if code is None else "FAILED"
        return f"smoke run: {how}: {last_line(log)}", True
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "smoke run: passed; compute-sanitizer is not on the PATH", False
    # Torch keeps large blocks and hands out parts of them, inside which nothing is out of bounds.
    env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *smoke]
    code = run(command, log, limit_s - (time.monotonic() - began), env)
    return judge_sanitizer(log.read_text(errors="replace"), code)


def judge_sanitizer(text: str, code: int | None) -> Verdict:
    errors = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    if any(errors):
        return f"compute-sanitizer: FOUND {max(errors)} ERRORS", True
    if errors and code == 0:
        return "compute-sanitizer: 0 errors", False
    why = "out of time" if code is None else f"exit code {code}"
    return f"compute-sanitizer: did not get to its end ({why})", False


def measure(out: Path, limit_s: float, env: dict[str, str]) -> Verdict:
    """The benchmark begins nothing in the last part of its time, so that it can end by itself."""
    minutes = f"{max(1.0, limit_s - min(60, limit_s / 4)) / 60:.2f}"
    command = [sys.executable, "-m", "gigabatch.kernels.bench.kernels", "--device", "cuda"]
    command += ["--peers", "--minutes", minutes, "--out", str(out)]
    code = run(command, out / "kernels.txt", limit_s, env)
    try:
        found = json.loads((out / "kernels.json").read_text())
    except (OSError, ValueError):
        return f"benchmark: no figures: {last_line(out / 'kernels.txt')}", True
    return judge_bench(found, code)


def judge_bench(found: dict[str, Any], code: int | None) -> Verdict:
    """What is wrong with another package is not our failure."""
    wrong, ours = [], False
    for problem in found["problems"]:
        for record in problem["contenders"]:
            is_ours = record["name"].startswith(("tiled", "triton"))
            exact = record.get("gradient_agrees", True) or not is_ours
            if not (record.get("agrees", True) and exact):
                wrong.append(f"{record['name']} at {problem['family']} N {problem['n']:,}")
                ours |= is_ours
    line = f"benchmark: {len(found['problems'])} problems, {len(found['left_out'])} not begun"
    line += ", stopped, out of time" if code is None else f", exit code {code}" if code else ""
    return f"{line}; DISAGREE: {', '.join(wrong) if wrong else 'none'}", ours or bool(code)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder for what is found")
    parser.add_argument("--minutes", type=float, default=8, help="for everything together")
    parser.add_argument("--smoke", action="store_true", help="one small step of each kernel, alone")
    given = parser.parse_args()
    if given.smoke:
        from gigabatch.kernels.bench.smoke import smoke

        smoke()
        return 0
    if given.out is None or not given.minutes > 0:
        parser.error("give a folder, OUT, and --minutes above 0")
    found = subprocess.run([sys.executable, "-c", FIND_GPU], capture_output=True, text=True)
    if found.returncode != 0:
        why = (found.stderr.strip() or "no reason given").splitlines()[-1]
        print(f"there is no GPU to check on: {why}", file=sys.stderr)
        return 2
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "summary.txt").write_text("not finished\n")
    except OSError as error:
        parser.error(f"{given.out} cannot be written: {error.strerror}")
    return check(given.out.resolve(), given.minutes, found.stdout.strip())


if __name__ == "__main__":
    sys.exit(main())
