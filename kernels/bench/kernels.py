"""Benchmark of the losses: the engine, plain torch and other packages, on a GPU or a CPU.

    python -m gigabatch.kernels.bench.kernels --device cuda --peers --out FOLDER

All implementations of a problem are timed in turns in one process. Before that, each runs once, and
its loss and gradient are compared with those of the first one. A large matrix product is timed
before each problem.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gigabatch.kernels.bench.implementations import (
    FAMILIES,
    ITEM,
    LOGITS,
    Implementation,
    implementations,
)
from gigabatch.kernels.bench.machine import environment
from gigabatch.kernels.bench.measure import DeviceLost, Measure, Problem
from gigabatch.kernels.bench.peers import PEERS, find_peers, first_line
from gigabatch.kernels.bench.report import tables, write

Say = Callable[[str], None]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# In the order of the runs: the least important come last, where the time budget may end.
SIZES = {
    "cpu": (1024, 2048, 4096, 8192),
    "cuda": (32768, 2**20, 8192, 65536, 16384, 131072),
}
WIDTHS = {"cpu": (256,), "cuda": (768, 512, 1024, 256)}
HUGE, HUGE_WIDTH = 2**19, 768  # from this batch on only the engine runs, once, at one width
INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """Options of the benchmark; `choose` sets defaults and checks them."""

    device: torch.device
    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    dtype: str
    peers: bool
    minutes: float
    only: tuple[str, ...]
    tune: bool
    out: Path | None

    def command(self) -> str:
        """Return the command that measures the same, with all defaults."""
        n, d = (",".join(map(str, values)) for values in (self.sizes, self.widths))
        words = f"gigabatch bench kernels --device {self.device.type} --n {n} --d {d}"
        words += f" --dtype {self.dtype} --minutes {self.minutes:g}" + " --peers" * self.peers
        words += " --tune" * self.tune
        return words + "".join(f" --only {name}" for name in self.only)


def choose(
    device: str | None = None, n: str | None = None, d: str | None = None,
    dtype: str | None = None, peers: bool = False, minutes: float = 8, only: Sequence[str] = (),
    tune: bool = False, out: Path | None = None,
) -> Options:  # fmt: skip
    """Create options from command-line arguments.

    `out` is created and tested here, not at the end of a long run.

    Raises:
        ValueError: if an option is invalid; the message says how to fix it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in SIZES:
        raise ValueError(f"--device is {device!r}; choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU, and torch sees none; use --device cpu")
    dtype = dtype or ("bf16" if device == "cuda" else "fp32")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if tune and device != "cuda":
        raise ValueError("--tune times block shapes on a GPU; leave it out, or use --device cuda")
    if not minutes > 0:
        raise ValueError(f"--minutes is {minutes:g}; give a number above 0")
    sizes, widths = _numbers("--n", n, SIZES[device]), _numbers("--d", d, WIDTHS[device])
    _check_names(only, _implementations(torch.device(device), DTYPES[dtype], peers), peers)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "kernels.json").open("a").close()
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
    return Options(
        torch.device(device), sizes, widths, dtype, peers, minutes, tuple(only), tune, out
    )


def bench(
    device: torch.device, sizes: Sequence[int], widths: Sequence[int], dtype: torch.dtype,
    peers: bool, minutes: float, say: Say, only: Sequence[str] = (), tune: bool = False,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure all problems. Ctrl-C ends it early, which the result "stopped" reports.

    Args:
        device: CPU or GPU.
        sizes: Batch sizes.
        widths: Widths of the embeddings.
        dtype: Dtype of the embeddings.
        peers: Also measure other packages.
        minutes: Time budget; no problem starts later, and "left_out" lists the rest.
        say: Function that receives one line per result.
        only: Names of implementations to measure; if empty, all.
        tune: Let the Triton back end time its block shapes first, for each width; "blocks" lists
            the chosen ones.
        keep: Function that receives all results so far, after each problem.

    Returns:
        All results, as written to kernels.json.
    """
    by_family = _implementations(device, dtype, peers)
    if only:
        by_family = {
            family: [i for i in candidates if i.name in only]
            for family, candidates in by_family.items()
        }
    results: dict[str, Any] = {
        "environment": environment(device), "dtype": str(dtype).removeprefix("torch."),
        "device": device.type, "problems": [], "left_out": [], "stopped": None, "blocks": {},
        "missing": {
            family: {i.name: i.missing for i in candidates if i.missing}
            for family, candidates in by_family.items()
        },
    }  # fmt: skip
    measure = Measure(device, dtype, time.monotonic() + 60 * minutes, say)
    try:
        for problem in _problems(device.type, sizes, widths):
            if tune and problem.d not in results["blocks"]:
                results["blocks"][problem.d] = _tuned(problem.d, dtype)
            able = [i for i in by_family[problem.family] if not i.missing]
            able = [i for i in able if i.is_engine] if problem.once else able
            if not able:
                continue
            if measure.seconds_left() <= 0:
                results["left_out"].append(str(problem))
                continue
            measure.run(problem, able, results["problems"])
            keep(results)
    except KeyboardInterrupt:
        results["stopped"] = "interrupted"
    except DeviceLost as lost:
        results["stopped"] = f"the device failed, so nothing more can be measured: {lost}"
    return results


def run(options: Options, say: Say) -> int:
    """Measure, print the tables and write the files. Returns the exit code."""
    # A shell script's background process ignores Ctrl-C unless a handler is set.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def keep(results: dict[str, Any]) -> None:
        results["command"] = options.command()
        if options.out is not None:
            (options.out / "kernels.json").write_text(json.dumps(results, indent=1) + "\n")

    results = bench(
        options.device, options.sizes, options.widths, DTYPES[options.dtype], options.peers,
        options.minutes, say, options.only, options.tune, keep,
    )  # fmt: skip
    keep(results)
    if options.out is not None:
        write(results, options.out)
    say("\n" + tables(results))
    if options.out is not None:
        say(f"written: {options.out}/kernels.json, kernels.md, kernels.png")
    if results["stopped"]:
        print(f"stopped early: {results['stopped']}", file=sys.stderr)
    return {None: 0, "interrupted": INTERRUPTED}.get(results["stopped"], 1)


def _problems(device: str, sizes: Sequence[int], widths: Sequence[int]) -> Iterator[Problem]:
    """Yield the problems. Token vectors are narrow, so MaxSim uses only the smallest width."""
    for n in sizes:
        if n >= HUGE:
            width = HUGE_WIDTH if HUGE_WIDTH in widths else widths[0]
            yield Problem("softmax", n, width, "early", device, once=True)
            continue
        for family in FAMILIES:
            for d in [min(widths)] if family == "maxsim" else widths:
                for logits in LOGITS:
                    yield Problem(family, n, d, logits, device)


def _tuned(d: int, dtype: torch.dtype) -> dict[str, str]:
    """Time Triton's block shapes for a width. Returns the chosen ones, or the failure's reason."""
    from gigabatch.kernels.fused import tune  # a machine without a GPU may lack Triton

    try:
        return {direction: str(config) for direction, config in tune(d, dtype).items()}
    except Exception as error:  # the default block remains in use
        return {"failed": first_line(error)}


def _implementations(
    device: torch.device, dtype: torch.dtype, peers: bool
) -> dict[str, list[Implementation]]:
    """Return the implementations of each family."""
    by_family = {family: implementations(family, device, dtype) for family in FAMILIES}
    if peers:
        by_family["softmax"] += find_peers(device, dtype.itemsize)
    return by_family


def _check_names(
    only: Sequence[str], by_family: dict[str, list[Implementation]], peers: bool
) -> None:
    """Raise ValueError if a name of --only is unknown or none of them can run here."""
    missing = {i.name: i.missing for candidates in by_family.values() for i in candidates}
    for name in only:
        if name in PEERS and not peers:
            raise ValueError(f"--only {name} is another package; add --peers")
        if name not in missing:
            raise ValueError(f"--only {name!r} is unknown; choose from {', '.join(missing)}")
    if only and all(missing[name] for name in only):
        reasons = "; ".join(f"{name} {missing[name]}" for name in only)
        raise ValueError(f"nothing in --only can run here: {reasons}")


def _numbers(option: str, words: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """Parse comma-separated numbers."""
    if words is None:
        return default
    try:
        numbers = tuple(int(word) for word in words.split(","))
    except ValueError:
        numbers = ()
    minimum = ITEM if option == "--n" else 1
    if not numbers or min(numbers) < minimum:
        raise ValueError(f"{option} is {words!r}; give numbers of at least {minimum}, separated by "
                         "commas, such as 1024,2048")  # fmt: skip
    return tuple(dict.fromkeys(numbers))


def main() -> int:
    parser = argparse.ArgumentParser(prog="kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--n", help="batch sizes, such as 1024,2048")
    parser.add_argument("--d", help="embedding widths, such as 256,512")
    parser.add_argument("--dtype", help="bf16, fp16 or fp32 (default: bf16; on a CPU fp32)")
    parser.add_argument("--peers", action="store_true", help="also measure other packages")
    parser.add_argument(
        "--minutes", type=float, default=8, help="time budget; no problem starts later (default: 8)"
    )
    parser.add_argument(
        "--only", action="append", default=[], help="an implementation to measure; may be repeated"
    )
    parser.add_argument("--tune", action="store_true", help="time Triton's block shapes first")
    parser.add_argument("--out", type=Path, help="folder for kernels.json, .md and .png")
    arguments = parser.parse_args()
    try:
        options = choose(**vars(arguments))
    except ValueError as error:
        parser.error(str(error))
    return run(options, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
