"""GPU check of the kernels, from a plain checkout:

    python kernels/bench/check.py OUT [--minutes 8]

It runs the GPU tests, compute-sanitizer if it is installed, and the benchmark. Each is a separate
process with a time limit; all output is written to OUT. gigabatch need not be installed: torch,
triton, pytest, hypothesis, numpy and matplotlib are enough.

Exit codes: 0 passed; 1 a test failed, the sanitizer found an error or the benchmark stopped early;
2 no GPU, or invalid arguments.
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
GRACE_S = 10  # seconds between the request to stop and the kill
Verdict = tuple[str, bool]  # line of the summary, and whether it reports a failure
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
    """Yield environment variables that make this checkout's kernels `gigabatch.kernels`."""
    with tempfile.TemporaryDirectory(prefix="gigabatch-") as folder:
        package = Path(folder, "gigabatch")
        package.mkdir()
        (package / "kernels").symlink_to(REPOSITORY / "kernels", target_is_directory=True)
        path = os.pathsep.join(filter(None, [folder, str(TESTS), os.environ.get("PYTHONPATH")]))
        # CI disables hypothesis's deadline, which a kernel's compilation would exceed.
        variables = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1",
                "CI": "1", "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis"}  # fmt: skip
        yield {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables


def run(command: list[str], log: Path, limit_s: float, env: dict[str, str]) -> int | None:
    """Run a command; return its exit code, or None if it was stopped at the time limit.

    Output goes to the screen and is appended to `log`.
    """
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
            _signal(process, signal.SIGINT)  # the command then writes its results
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            file.write(f"\nstopped after {limit_s:.0f} s\n".encode())
            return None
        finally:
            _signal(process, signal.SIGKILL)  # the complete process group
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
    """Run all checks and write the summary. Returns the exit code."""
    total = 60 * minutes
    deadline, summary = time.monotonic() + total, [f"GPU: {gpu}"]
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
    summary += [line for line, _ in verdicts]
    failed = any(is_failure for _, is_failure in verdicts)
    summary.append("FAIL" if failed else "PASS")
    (out / "summary.txt").write_text("\n".join(summary) + "\n")
    print("\n" + "\n".join(summary))
    return int(failed)


def check_tests(log: Path, limit_s: float, env: dict[str, str]) -> Verdict:
    """Run the GPU tests."""
    code = run(
        [sys.executable, "-m", "pytest", "-m", "gpu", str(TESTS), f"--confcutdir={TESTS}", "-q",
         "-o", "addopts=", "-o", f"pythonpath={TESTS}", "-p", "no:cacheprovider",
         *(["-n", "6"] if find_spec("xdist") else [])],  # most of the time is compilation
        log, limit_s, env,
    )  # fmt: skip
    status = "STOPPED at the time limit" if code is None else "passed" if code == 0 else "FAILED"
    return f"tests: {status}: {last_line(log)}", code != 0


def check_memory(log: Path, limit_s: float, env: dict[str, str]) -> Verdict:
    """Run the smoke run alone, which compiles its kernels, and then under compute-sanitizer."""
    began = time.monotonic()
    smoke = [sys.executable, "-m", "gigabatch.kernels.bench.check", "--smoke"]
    code = run(smoke, log, limit_s, env)
    if code != 0:
        status = "STOPPED at the time limit" if code is None else "FAILED"
        return f"smoke run: {status}: {last_line(log)}", True
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "smoke run: passed; compute-sanitizer is not on the PATH", False
    # Torch's allocator splits large blocks, and memcheck does not see an overrun inside a block.
    env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *smoke]
    code = run(command, log, limit_s - (time.monotonic() - began), env)
    return judge_sanitizer(log.read_text(errors="replace"), code)


def judge_sanitizer(text: str, code: int | None) -> Verdict:
    """Return the verdict on compute-sanitizer's output and exit code."""
    errors = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    if any(errors):
        return f"compute-sanitizer: FOUND {max(errors)} ERRORS", True
    if errors and code == 0:
        return "compute-sanitizer: 0 errors", False
    reason = "time limit" if code is None else f"exit code {code}"
    return f"compute-sanitizer: did not finish ({reason})", False


def measure(out: Path, limit_s: float, env: dict[str, str]) -> Verdict:
    """Run the benchmark. It starts no problem near the time limit, so that it can finish."""
    minutes = f"{max(1.0, limit_s - min(60, limit_s / 4)) / 60:.2f}"
    command = [sys.executable, "-m", "gigabatch.kernels.bench.kernels", "--device", "cuda"]
    command += ["--peers", "--minutes", minutes, "--out", str(out)]
    code = run(command, out / "kernels.txt", limit_s, env)
    try:
        results = json.loads((out / "kernels.json").read_text())
    except (OSError, ValueError):
        return f"benchmark: no results: {last_line(out / 'kernels.txt')}", True
    return judge_bench(results, code)


def judge_bench(results: dict[str, Any], code: int | None) -> Verdict:
    """Return the verdict on the benchmark. A wrong result of another package is not a failure."""
    wrong, failed = [], False
    for problem in results["problems"]:
        for record in problem["contenders"]:
            is_gigabatch = record["name"].startswith(("tiled", "triton"))
            exact = record.get("gradient_agrees", True) or not is_gigabatch
            if not (record.get("agrees", True) and exact):
                wrong.append(f"{record['name']} at {problem['family']} N {problem['n']:,}")
                failed |= is_gigabatch
    line = f"benchmark: {len(results['problems'])} problems, {len(results['left_out'])} not started"
    line += ", stopped at the time limit" if code is None else f", exit code {code}" if code else ""
    return f"{line}; DISAGREE: {', '.join(wrong) if wrong else 'none'}", failed or bool(code)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder for the results")
    parser.add_argument(
        "--minutes",
        type=float,
        default=8,
        help="time limit for all checks, in minutes (default: 8)",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="run only one small step of each kernel"
    )
    arguments = parser.parse_args()
    if arguments.smoke:
        from gigabatch.kernels.bench.smoke import smoke

        smoke()
        return 0
    if arguments.out is None or not arguments.minutes > 0:
        parser.error("give a folder, OUT, and --minutes above 0")
    gpu = subprocess.run([sys.executable, "-c", FIND_GPU], capture_output=True, text=True)
    if gpu.returncode != 0:
        reason = (gpu.stderr.strip() or "torch gave no reason").splitlines()[-1]
        print(f"no GPU to check: {reason}", file=sys.stderr)
        return 2
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "summary.txt").write_text("not finished\n")
    except OSError as error:
        parser.error(f"{arguments.out} cannot be written: {error.strerror}")
    return check(arguments.out.resolve(), arguments.minutes, gpu.stdout.strip())


if __name__ == "__main__":
    sys.exit(main())
