"""`gigabatch bench ...`: benchmarks of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cli.arguments import JSON_HELP, ConfigPath, Overrides

bench = typer.Typer(help="Benchmark this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.command()
def memory(
    problem: Annotated[
        str, typer.Argument(help="Loss to measure; `list` prints their names.")
    ] = "contrastive",
    n: Annotated[int, typer.Option(help="Global batch size: rows.", min=1)] = 32768,
    d: Annotated[int, typer.Option(help="Embedding dimension.", min=1)] = 256,
) -> None:
    """Measure the peak memory of one loss.

    Forward and backward pass in float32 on this CPU; inputs and their gradients are not counted.

    \b
    Examples:
      gigabatch bench memory siglip --n 65536
    """
    from gigabatch.kernels.bench.memory import NAMES, measure_afresh

    if problem not in NAMES:
        print("\n".join(NAMES))
        if problem != "list":
            raise GigabatchError(f"there is no problem {problem!r}; choose one of those above")
        return
    peak = measure_afresh(problem, n, d)
    print(
        f"{problem}: n {n:,}  d {d}  float32, forward and backward: {peak['peak_mib']:.0f} MiB "
        f"above inputs and gradients, {peak['seconds']:.1f} s"
    )


@bench.command()
def engine(
    n: Annotated[int, typer.Option(help="Global batch size of the timings: rows.", min=256)] = (
        16384
    ),
    d: Annotated[int, typer.Option(help="Embedding dimension.", min=1)] = 512,
    sizes: Annotated[
        str, typer.Option(help="Global batch sizes for the memory curve, comma-separated.")
    ] = "8192,16384,32768,65536",
    out: Annotated[Path | None, typer.Option(help="Write all results to this JSON file.")] = None,
) -> None:
    """Compare the losses with plain PyTorch on this CPU.

    Reports time, share of the machine's matrix-product rate, and peak memory.
    """
    from gigabatch.kernels.bench.engine import bench as run

    try:
        batches = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise GigabatchError(f"--sizes is {sizes!r}; give integers, such as 8192,16384.") from None
    results = run(n, d, batches, say=lambda line: print(line, flush=True))
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


@bench.command()
def kernels(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cuda if there is a GPU.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also measure the installed losses of other packages.")
    ] = False,
    n: Annotated[
        str | None, typer.Option(help="Global batch sizes, comma-separated, such as 1024,2048.")
    ] = None,
    d: Annotated[
        str | None, typer.Option(help="Embedding dimensions, comma-separated, such as 256,512.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32. Default: bf16, on a CPU fp32.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Time budget in minutes; no benchmark starts later.")
    ] = 8,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Measure only this implementation. Repeatable."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="First let Triton choose block sizes (GPU only).")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for kernels.json, kernels.md and kernels.png.")
    ] = None,
) -> int:
    """Compare the losses with plain PyTorch and other packages.

    Time and memory by batch size and embedding dimension, on a GPU or this CPU. Ctrl-C ends early
    and keeps the results so far.

    \b
    Examples:
      gigabatch bench kernels --n 4096,8192 --d 512 --minutes 5 --out bench
    """
    from gigabatch.kernels.bench.kernels import choose, run

    try:
        options = choose(device, n, d, dtype, peers, minutes, only or [], tune, out)
    except ValueError as error:
        raise GigabatchError(str(error)) from None
    return run(options, say=lambda line: print(line, flush=True))


@bench.command()
def objectives(
    size: Annotated[int, typer.Option(help="Global batch size: rows.", min=64)] = 8192,
    width: Annotated[int, typer.Option(help="Embedding dimension.", min=1)] = 256,
    rounds: Annotated[int, typer.Option(help="Timed steps of each objective.", min=1)] = 5,
    threads: Annotated[
        int | None, typer.Option(help="PyTorch CPU threads. Default: PyTorch's own.", min=1)
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Measure only this objective. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Time each objective against InfoNCE.

    Prints the time relative to InfoNCE divided by the declared matrix products relative to InfoNCE:
    1 means that the objective is as efficient as InfoNCE.
    """
    import torch

    from gigabatch.launcher.bench.objectives import bench as run

    if threads is not None:
        torch.set_num_threads(threads)
    say = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    results = run(size, width, rounds, only or [], say)
    if as_json:
        print(json.dumps(results))


@bench.command()
def faults(
    kills: Annotated[int, typer.Option(help="Number of kills.", min=1)] = 30,
    seed: Annotated[int, typer.Option(help="Seed for kill times and target processes.")] = 0,
    zero: Annotated[int, typer.Option(help="DeepSpeed ZeRO stage.", min=0, max=3)] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for faults.json and faults.md.")] = None,
) -> int:
    """Kill a run at random moments and compare it with an undisturbed one.

    A third of the kills hit one rank, a third all processes, a third a checkpoint in progress. Both
    runs must agree in every sample and, to the last bit, in every loss. Exit codes: 0 equal, 1 not.
    """
    from gigabatch.launcher.bench.faults import bench_faults

    return bench_faults(kills, seed, zero, out, say=lambda line: print(line, flush=True))


@bench.command()
def data(
    config: ConfigPath,
    overrides: Overrides = None,
    synthetic: Annotated[
        str | None,
        typer.Option(metavar="8k|200k", help="Read synthetic JPEGs instead of the run's data."),
    ] = None,
    workers: Annotated[
        str, typer.Option(help="Numbers of loader processes to try, comma-separated.")
    ] = "0,2",
    minutes: Annotated[float, typer.Option(help="Approximate duration in minutes.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder for data.json and data.md.")] = None,
) -> int:
    """Measure each stage of data loading and name the bottleneck.

    Stages: read, decode, tokenize, augment, collate, transfer; each by itself and all together,
    compared with plain webdataset and PIL on the same shards, sizes and worker counts. Ctrl-C ends
    early and keeps the results so far.

    \b
    Examples:
      gigabatch bench data my.yaml --workers 0,4,8
      gigabatch bench data quickstart --synthetic 8k
    """
    from gigabatch.launcher.bench.data import bench_data

    return bench_data(config, overrides or [], synthetic, workers, minutes, out)
