"""`gigabatch bench ...`: what this machine does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gigabatch.data.errors import GigabatchError

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.command()
def memory(
    problem: Annotated[str, typer.Argument(help="What to measure; `list` shows them.")] = (
        "contrastive"
    ),
    n: Annotated[int, typer.Option(help="Rows: the global batch.", min=1)] = 32768,
    d: Annotated[int, typer.Option(help="Width of the embeddings.", min=1)] = 256,
) -> None:
    """Peak memory of one loss, forward and backward, above its inputs and their gradients."""
    from gigabatch.kernels.bench.memory import NAMES, measure_afresh

    if problem not in NAMES:
        print("\n".join(NAMES))
        if problem != "list":
            raise GigabatchError(f"there is no problem {problem!r}; choose one of those above")
        return
    found = measure_afresh(problem, n, d)
    print(
        f"{problem}: n {n:,}  d {d}  float32, forward and backward: {found['peak_mib']:.0f} MiB "
        f"above inputs and gradients, {found['seconds']:.1f} s"
    )


@bench.command()
def engine(
    n: Annotated[int, typer.Option(help="Rows of the timed comparison.", min=256)] = 16384,
    d: Annotated[int, typer.Option(help="Width of the embeddings.", min=1)] = 512,
    sizes: Annotated[str, typer.Option(help="Batches over which memory is fitted.")] = (
        "8192,16384,32768,65536"
    ),
    out: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """The engine beside plain torch on this CPU: time, share of the GEMM rate, memory."""
    from gigabatch.kernels.bench.engine import bench as run

    try:
        batches = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise GigabatchError(f"--sizes is {sizes!r}; give numbers between commas") from None
    found = run(n, d, batches, say=lambda line: print(line, flush=True))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


@bench.command()
def kernels(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Other packages too.")] = False,
    n: Annotated[str | None, typer.Option(help="Batches, such as 1024,2048.")] = None,
    d: Annotated[str | None, typer.Option(help="Widths, such as 256,512.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; default: bf16, on a CPU fp32.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Begin nothing after these.")] = 8,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A contender; may be repeated.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Let Triton time its list of blocks first.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for kernels.json, kernels.md and kernels.png.")
    ] = None,
) -> int:
    """The losses beside plain torch and other packages, on a GPU or this CPU: time and memory.

    Ctrl-C ends it early, with what was found so far.
    """
    from gigabatch.kernels.bench.kernels import choose, run

    try:
        options = choose(device, n, d, dtype, peers, minutes, only or [], tune, out)
    except ValueError as error:
        raise GigabatchError(str(error)) from None
    return run(options, say=lambda line: print(line, flush=True))


@bench.command()
def objectives(
    size: Annotated[int, typer.Option(help="Rows: the global batch.", min=64)] = 8192,
    width: Annotated[int, typer.Option(help="Width of the embeddings.", min=1)] = 256,
    rounds: Annotated[int, typer.Option(help="Steps of each that are timed.", min=1)] = 5,
    threads: Annotated[
        int | None, typer.Option(help="Of torch; default: what it takes.", min=1)
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An objective; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The step of each objective beside InfoNCE's, over the matrix passes that it declares.

    A quotient of 1 is InfoNCE's own efficiency.
    """
    import torch

    from gigabatch.launcher.bench.objectives import bench as run

    if threads is not None:
        torch.set_num_threads(threads)
    say = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    found = run(size, width, rounds, only or [], say)
    if as_json:
        print(json.dumps(found))


@bench.command()
def faults(
    kills: Annotated[int, typer.Option(help="How often processes are killed.", min=1)] = 30,
    seed: Annotated[int, typer.Option(help="Keys the moments and the victims.")] = 0,
    zero: Annotated[int, typer.Option(help="DeepSpeed ZeRO stage.", min=0, max=3)] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for faults.json and faults.md.")] = None,
) -> int:
    """Kill a run's processes at random moments and compare it with one that nobody disturbed.

    A third of the kills hit a rank, a third everything, a third come in the middle of a save. The
    two runs must agree in every loss to the last bit, and in every sample. The exit code says so.
    """
    from gigabatch.launcher.bench.faults import bench_faults

    return bench_faults(kills, seed, zero, out, say=lambda line: print(line, flush=True))


@bench.command()
def data(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Set keys.")
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(metavar="8k|200k", help="JPEGs made for it in place of the run's data."),
    ] = None,
    workers: Annotated[str, typer.Option(help="Numbers of loader processes to try.")] = "0,2",
    minutes: Annotated[float, typer.Option(help="Take about these.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder for data.json and data.md.")] = None,
) -> int:
    """Reading, decoding, tokenising, augmenting, collating and transfer, each alone and together.

    Plain webdataset with PIL runs beside it, on the same shards, sizes and worker counts; the
    bottleneck is named. Ctrl-C ends it early, with what was found so far.
    """
    from gigabatch.launcher.bench.data import bench_data

    return bench_data(config, overrides or [], synthetic, workers, minutes, out)
