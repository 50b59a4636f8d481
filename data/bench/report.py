"""What was found, in words and tables, and the stage that holds up the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gigabatch.data.bench.arms import IN_LOADER, IN_TRAINER, OURS
from gigabatch.data.bench.measure import Record

HEAD = ("stage", "contender", "samples/s", "MB/s", "of webdataset")


def bottleneck(rates: Mapping[str, float], workers: int, cores: int) -> str:
    """`rates`: samples/s of each stage by itself, in one process.

    A loader worker does its stages one after another, and so does the training process with those
    that are left to it: all, where there are no workers.
    """
    loader = {stage: 1 / rates[stage] for stage in IN_LOADER if stage in rates}
    trainer = {stage: 1 / rates[stage] for stage in IN_TRAINER if stage in rates}
    if workers == 0:
        loader, trainer = {}, loader | trainer
    at_once = max(1, min(workers, cores))
    in_loader = sum(loader.values()) / at_once >= sum(trainer.values())
    slow, other = (loader, trainer) if in_loader else (trainer, loader)
    stage = max(slow, key=lambda stage: slow[stage])
    words = f"{_per_s(1 / slow[stage])}{' a worker' if in_loader else ''}"
    rest = sum(slow.values()) - slow[stage]
    if rest:
        where = "a worker's other stages" if in_loader else "the process's other stages"
        words += f"; {where} keep up at {1 / rest:,.0f}"
    if other:
        where = "training process" if in_loader else f"{at_once} loaders"
        pace = (1 if in_loader else at_once) / sum(other.values())
        words += f", the {where} at {pace:,.0f}"
    hint = ""
    if in_loader and workers < cores:
        hint = f". More data.workers would help: there are {cores} cores"
    return f"bottleneck: {stage} ({words}){hint}"


def alone(stages: list[Record]) -> dict[str, float]:
    """samples/s of our single stages."""
    return {
        record["stage"]: found["samples_per_s"]
        for record in stages
        for found in record["arms"]
        if found["name"] == OURS and "samples_per_s" in found
    }


def line(record: Record) -> str:
    """A stage."""
    words = [
        f"{found['name']} {found.get('failed') or _per_s(found['samples_per_s'])}"
        for found in record["arms"]
        if "failed" in found or "samples_per_s" in found
    ]
    ratio = f" ({record['ratio']:.2f}x)" if "ratio" in record else ""
    return f"{record['stage']}: {'; '.join(words)}{ratio}"


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    around = ", ".join(f"{name} {value}" for name, value in found["machine"].items() if value)
    yield f"{around}"
    yield ""
    if found["command"]:
        yield f"`{found['command']}`"
        yield ""
    for name, value in found["config"].items():
        yield f"- {name}: {value}"
    for name, how in found["contenders"].items():
        yield f"- `{name}`: {how}"
    yield ""
    yield _row(HEAD)
    yield _row(["---", "---", "---:", "---:", "---:"])
    for record in found["stages"]:
        for arm in record["arms"]:
            yield _row(_cells(record, arm))
    yield ""
    for what in found["left_out"]:
        yield f"- not begun, for want of time: {what}"
    if found["stopped"]:
        yield f"- **stopped early: {found['stopped']}**"
    if found["bottleneck"]:
        yield found["bottleneck"]


def write(found: dict[str, Any], folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "data.md").write_text(tables(found))


def _cells(record: Record, arm: dict[str, Any]) -> list[str]:
    if "samples_per_s" not in arm:
        return [record["stage"], arm["name"], arm.get("failed", "not reached"), "", ""]
    return [
        record["stage"],
        arm["name"],
        f"{arm['samples_per_s']:,.0f}",
        f"{arm['bytes_per_s'] / 1e6:,.0f}",
        f"{record['ratio']:.2f}x" if arm["name"] == OURS and "ratio" in record else "",
    ]


def _per_s(rate: float) -> str:
    return f"{rate:,.0f} samples/s"


def _row(cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
