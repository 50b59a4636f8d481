"""Report the benchmark: lines, Markdown tables, JSON, and the bottleneck."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gigabatch.data.bench.measure import Record
from gigabatch.data.bench.stages import GIGABATCH, IN_LOADER, IN_TRAINER

HEADER = ("stage", "implementation", "samples/s", "MB/s", "ratio to webdataset")


def bottleneck(rates: Mapping[str, float], workers: int, cores: int) -> str:
    """Describe the slowest stage of the slower side, loader or training process.

    A loader worker runs its stages one after another. The training process runs the remaining
    stages, or all of them if there are no workers.

    Args:
        rates: Samples per second of each stage, run separately in one process.
        workers: Number of loader workers.
        cores: Number of available cores.
    """
    loader = {stage: 1 / rates[stage] for stage in IN_LOADER if stage in rates}
    trainer = {stage: 1 / rates[stage] for stage in IN_TRAINER if stage in rates}
    if workers == 0:
        loader, trainer = {}, loader | trainer
    parallel = max(1, min(workers, cores))
    in_loader = sum(loader.values()) / parallel >= sum(trainer.values())
    slow, other = (loader, trainer) if in_loader else (trainer, loader)
    stage = max(slow, key=lambda stage: slow[stage])
    details = [f"{_per_s(1 / slow[stage])}{' per worker' if in_loader else ''}"]
    rest = sum(slow.values()) - slow[stage]
    if rest:
        process = "a worker" if in_loader else "the training process"
        details.append(f"other stages of {process}: {1 / rest:,.0f}")
    if other:
        process = "training process" if in_loader else f"{parallel} loaders"
        rate = (1 if in_loader else parallel) / sum(other.values())
        details.append(f"{process}: {rate:,.0f}")
    hint = ""
    if in_loader and workers < cores:
        hint = f". Increase data.workers: there are {cores} cores"
    return f"bottleneck: {stage} ({'; '.join(details)}){hint}"


def stage_rates(stages: list[Record]) -> dict[str, float]:
    """Return the samples per second of gigabatch in each measured stage."""
    return {
        record["stage"]: result["samples_per_s"]
        for record in stages
        for result in record["arms"]
        if result["name"] == GIGABATCH and "samples_per_s" in result
    }


def line(record: Record) -> str:
    """Format the results of one stage in a line."""
    results = [
        f"{result['name']} {result.get('failed') or _per_s(result['samples_per_s'])}"
        for result in record["arms"]
        if "failed" in result or "samples_per_s" in result
    ]
    ratio = f" ({record['ratio']:.2f}x)" if "ratio" in record else ""
    return f"{record['stage']}: {'; '.join(results)}{ratio}"


def tables(results: dict[str, Any]) -> str:
    """Format all results as Markdown."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value)
    yield ""
    if results["command"]:
        yield f"`{results['command']}`"
        yield ""
    for name, value in results["config"].items():
        yield f"- {name}: {value}"
    for name, description in results["contenders"].items():
        yield f"- `{name}`: {description}"
    yield ""
    yield _row(HEADER)
    yield _row(["---", "---", "---:", "---:", "---:"])
    for record in results["stages"]:
        for result in record["arms"]:
            yield _row(_cells(record, result))
    yield ""
    for stage in results["left_out"]:
        yield f"- skipped, out of time: {stage}"
    if results["stopped"]:
        yield f"- **stopped early: {results['stopped']}**"
    if results["bottleneck"]:
        yield results["bottleneck"]


def write(results: dict[str, Any], folder: Path) -> None:
    """Write `data.json` and `data.md` into `folder`."""
    (folder / "data.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "data.md").write_text(tables(results))


def _cells(record: Record, result: dict[str, Any]) -> list[str]:
    if "samples_per_s" not in result:
        return [record["stage"], result["name"], result.get("failed", "not reached"), "", ""]
    has_ratio = result["name"] == GIGABATCH and "ratio" in record
    return [
        record["stage"],
        result["name"],
        f"{result['samples_per_s']:,.0f}",
        f"{result['bytes_per_s'] / 1e6:,.0f}",
        f"{record['ratio']:.2f}x" if has_ratio else "",
    ]


def _per_s(rate: float) -> str:
    return f"{rate:,.0f} samples/s"


def _row(cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
