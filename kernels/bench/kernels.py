"""The losses by the engine, by plain torch and by other packages, on a GPU or a CPU.

    python -m gigabatch.kernels.bench.kernels --device cuda --peers --out FOLDER

All contenders of a problem are timed in one process, in turns, after each has run once and its loss
was compared with the first one's; a large matrix product is timed before each problem.
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

from gigabatch.kernels.bench.contenders import FAMILIES, ITEM, LOGITS, Contender, contenders
from gigabatch.kernels.bench.machine import environment
from gigabatch.kernels.bench.measure import DeviceLost, Measure, Problem
from gigabatch.kernels.bench.peers import PEERS, find_peers, first_line
from gigabatch.kernels.bench.report import tables, write

Say = Callable[[str], None]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# In the order they are run in: what a budget may cut off comes last.
SIZES = {
    "cpu": (1024, 2048, 4096, 8192),
    "cuda": (32768, 2**20, 8192, 65536, 16384, 131072),
}
WIDTHS = {"cpu": (256,), "cuda": (768, 512, 1024, 256)}
HUGE, HUGE_WIDTH = 2**19, 768  # from this batch on: the engine alone, once, at one width
INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """What to measure. Made by `choose`, which fills in defaults and checks."""

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
        """The command that measures the same, defaults spelled out."""
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
    """Options from words of the command line. ValueError, with what to do, for those that do not
    fit; `out` is made and tried at once, not at the end of a long run."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in SIZES:
        raise ValueError(f"--device is {device!r}; choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU, and torch sees none; use --device cpu")
    dtype = dtype or ("bf16" if device == "cuda" else "fp32")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if tune and device != "cuda":
        raise ValueError("--tune times blocks for a GPU; leave it out, or use --device cuda")
    if not minutes > 0:
        raise ValueError(f"--minutes is {minutes:g}; give a number above 0")
    sizes, widths = _numbers("--n", n, SIZES[device]), _numbers("--d", d, WIDTHS[device])
    _check_names(only, _field(torch.device(device), DTYPES[dtype], peers), peers)
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
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """All figures. `say` gets a line as each is found, `keep` all of them after each problem.

    `minutes`: after these no problem is begun; "left_out" names those. `only`: names of contenders.
    `tune`: let Triton's back end time its blocks first, for each width; "blocks" says which won.
    Ctrl-C ends it early, with what there is; "stopped" then says so.
    """
    field = _field(device, dtype, peers)
    if only:
        field = {family: [c for c in of if c.name in only] for family, of in field.items()}
    found: dict[str, Any] = {
        "environment": environment(device), "dtype": str(dtype).removeprefix("torch."),
        "device": device.type, "problems": [], "left_out": [], "stopped": None, "blocks": {},
        "missing": {
            family: {c.name: c.missing for c in of if c.missing} for family, of in field.items()
        },
    }  # fmt: skip
    measure = Measure(device, dtype, time.monotonic() + 60 * minutes, say)
    try:
        for problem in _problems(device.type, sizes, widths):
            if tune and problem.d not in found["blocks"]:
                found["blocks"][problem.d] = _tuned(problem.d, dtype)
            able = [c for c in field[problem.family] if not c.missing]
            able = [c for c in able if c.ours] if problem.once else able
            if not able:
                continue
            if measure.left() <= 0:
                found["left_out"].append(str(problem))
                continue
            measure.run(problem, able, found["problems"])
            keep(found)
    except KeyboardInterrupt:
        found["stopped"] = "interrupted"
    except DeviceLost as lost:
        found["stopped"] = f"the device failed and every later figure would: {lost}"
    return found


def run(options: Options, say: Say) -> int:
    """Measure, say the tables, write the files; returns the exit code."""
    # A process that a script started in the background has Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def keep(found: dict[str, Any]) -> None:
        found["command"] = options.command()
        if options.out is not None:
            (options.out / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")

    found = bench(
        options.device, options.sizes, options.widths, DTYPES[options.dtype], options.peers,
        options.minutes, say, options.only, options.tune, keep,
    )  # fmt: skip
    keep(found)
    if options.out is not None:
        write(found, options.out)
    say("\n" + tables(found))
    if options.out is not None:
        say(f"written: {options.out}/kernels.json, kernels.md, kernels.png")
    if found["stopped"]:
        print(f"stopped early: {found['stopped']}", file=sys.stderr)
    return {None: 0, "interrupted": INTERRUPTED}.get(found["stopped"], 1)


def _problems(device: str, sizes: Sequence[int], widths: Sequence[int]) -> Iterator[Problem]:
    """Token vectors are narrow: MaxSim is measured at the least width alone."""
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
    from gigabatch.kernels.fused import tune  # where there is no GPU, there may be no Triton

    try:
        return {which: str(config) for which, config in tune(d, dtype).items()}
    except Exception as error:  # the first choice remains
        return {"failed": first_line(error)}


def _field(device: torch.device, dtype: torch.dtype, peers: bool) -> dict[str, list[Contender]]:
    field = {family: contenders(family, device, dtype) for family in FAMILIES}
    if peers:
        field["softmax"] += find_peers(device, dtype.itemsize)
    return field


def _check_names(only: Sequence[str], field: dict[str, list[Contender]], peers: bool) -> None:
    missing = {c.name: c.missing for of in field.values() for c in of}
    for name in only:
        if name in PEERS and not peers:
            raise ValueError(f"--only {name} is another package: add --peers")
        if name not in missing:
            raise ValueError(f"--only {name!r} is unknown; choose of {', '.join(missing)}")
    if only and all(missing[name] for name in only):
        reasons = "; ".join(f"{name} {missing[name]}" for name in only)
        raise ValueError(f"--only leaves nothing that can run here: {reasons}")


def _numbers(option: str, words: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    if words is None:
        return default
    try:
        numbers = tuple(int(word) for word in words.split(","))
    except ValueError:
        numbers = ()
    least = ITEM if option == "--n" else 1
    if not numbers or min(numbers) < least:
        raise ValueError(f"{option} is {words!r}; give numbers of at least {least} between commas, "
                         "such as 1024,2048")  # fmt: skip
    return tuple(dict.fromkeys(numbers))


def main() -> int:
    parser = argparse.ArgumentParser(prog="kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--n", help="batches, such as 1024,2048")
    parser.add_argument("--d", help="widths, such as 256,512")
    parser.add_argument("--dtype", help="bf16, fp16 or fp32; default: bf16, on a CPU fp32")
    parser.add_argument("--peers", action="store_true", help="other packages too")
    parser.add_argument("--minutes", type=float, default=8, help="begin nothing after these")
    parser.add_argument("--only", action="append", default=[], help="a contender; may be repeated")
    parser.add_argument("--tune", action="store_true", help="let Triton choose its blocks first")
    parser.add_argument("--out", type=Path, help="folder for kernels.json, .md and .png")
    given = parser.parse_args()
    try:
        options = choose(**vars(given))
    except ValueError as error:
        parser.error(str(error))
    return run(options, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
