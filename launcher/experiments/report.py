"""What a study found: for the terminal, as JSON, and docs/reproductions.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from gigabatch.kernels.bench.machine import processor
from gigabatch.launcher.experiments.papers import PAPERS, Paper
from gigabatch.launcher.experiments.run import Outcome
from gigabatch.launcher.experiments.study import Bar, Figure, Study
from gigabatch.trainer.run.files import write_atomically

MANY = 8
"""Figures: more make lines that no screen holds."""
HOLDS, FAILS = "holds", "does not hold at this scale"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """One object: `paper` (a list where there are several), `claim`, `figures`, `holds`."""
    study, numbers = outcome.study, list(outcome.study.papers)
    return {
        "paper": numbers[0] if len(numbers) == 1 else numbers,
        "name": study.name,
        "claim": study.claim,
        "setting": study.setting,
        "figures": {
            arm: {name: _figure(figure) for name, figure in of.items()}
            for arm, of in outcome.figures.items()
        },
        "bars": [_bar(bar, outcome) for bar in study.bars],
        "holds": outcome.holds,
        "starts": outcome.starts,
        "seconds": round(outcome.seconds, 1),
        "processor": processor(),
        "date": date.today().isoformat(),
    }


def _figure(figure: Figure) -> dict[str, Any]:
    found = {"mean": figure.mean, "spread": figure.spread, "values": list(figure.values)}
    if figure.low is None:
        return found
    return found | {"low": figure.low, "high": figure.high}


def _bar(bar: Bar, outcome: Outcome) -> dict[str, Any]:
    return {
        "what": bar.what,
        "value": bar.value(outcome.figures),
        "bound": bar.bound,
        "baseline": bar.baseline,
        "holds": bar.holds(outcome.figures),
    }


def unmeasured(paper: Paper) -> dict[str, Any]:
    """The object of a paper without a study."""
    return {
        "paper": paper.number, "name": paper.title, "claim": None, "figures": {}, "holds": None,
        "verdict": paper.verdict, "gives": paper.gives,
    }  # fmt: skip


def table(found: dict[str, Any]) -> list[str]:
    """The figures, an arm a line; of many figures, a figure a line."""
    arms: dict[str, dict[str, Any]] = found["figures"]
    names = list(dict.fromkeys(name for of in arms.values() for name in of))
    rows = [["", *names]]
    for arm, of in arms.items():
        rows.append([arm, *(_cell(of[name]) if name in of else "" for name in names)])
    if len(names) > MANY:
        rows = list(map(list, zip(*rows, strict=True)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _cell(figure: dict[str, Any]) -> str:
    told = f"{figure['mean']:.3f} ± {figure['spread']:.3f}"
    if "low" not in figure:
        return told
    return f"{told} [{figure['low']:.3f}, {figure['high']:.3f}]"


def checks(found: dict[str, Any]) -> Iterator[str]:
    """A line for each thing that must hold."""
    for bar in found["bars"]:
        mark = "yes" if bar["holds"] else "NO "
        about = ", the baseline" if bar["baseline"] else ""
        yield f"{mark}  {bar['what']}{about}: {bar['value']:.3f} (asked: {bar['bound']})"


def verdict(found: dict[str, Any]) -> str:
    return HOLDS if found["holds"] else FAILS


def kept(out: Path, study: Study) -> Path:
    return out / f"{study.name}.json"


def keep(out: Path, study: Study, found: dict[str, Any]) -> dict[str, Any]:
    """Write down what was found, and return it. Where it was only read again, of runs that were
    there, what it cost to find and when stays as it was."""
    place = kept(out, study)
    if place.exists():
        before: dict[str, Any] = json.loads(place.read_text())
        if all(before.get(part) == found[part] for part in ("figures", "bars", "starts")):
            found = found | {part: before[part] for part in ("seconds", "processor", "date")}
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def write_report(path: Path, out: Path, studies: Sequence[Study]) -> None:
    """A verdict for each paper, from what `out` has of the studies."""
    found = {
        study.name: json.loads(place.read_text())
        for study in studies
        if (place := kept(out, study)).exists()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(_document(found, studies)) + "\n")


def _document(found: dict[str, Any], studies: Sequence[Study]) -> Iterator[str]:
    yield from (
        "# What of the papers was reproduced",
        "",
        "Written by `gigabatch reproduce all --report docs/reproductions.md`; do not edit. Each",
        "experiment is small: made-up data, minutes on two CPU cores, the real trainer. It asks",
        "whether the effect that a paper claims shows at all, and proves nothing about its size at",
        "scale. Figures are means over random starts, which also draw the data, ± their standard",
        "deviation. `gigabatch reproduce NUMBER` repeats one; its runs are ordinary run folders.",
        "Those called emoji-... are of real drawings instead (`--data FOLDER`), and take an hour.",
        "",
        "| # | paper | verdict | what gigabatch has of it |",
        "|---|---|---|---|",
    )
    # The first of a paper's experiments has its verdict: those on real data follow.
    by_paper = {number: study for study in reversed(studies) for number in study.papers}
    for paper in PAPERS:
        told = paper.verdict
        if study := by_paper.get(paper.number):
            told = f"[{verdict(found[study.name])}](#{study.name})" if study.name in found else (
                "not measured here"
            )  # fmt: skip
        yield f"| {paper.number} | {paper.title} | {told} | {paper.gives} |"
    for study in studies:
        if study.name in found:
            yield from _section(study, found[study.name])


def _section(study: Study, found: dict[str, Any]) -> Iterator[str]:
    numbers = ", ".join(map(str, study.papers))
    yield from ("", f"## {study.name}", "", f"Paper {numbers}. {found['claim']}", "")
    yield from (found["setting"], "", "```", *table(found), "")
    yield from checks(found)
    yield from ("```", "")
    yield (
        f"**{verdict(found).capitalize()}**: {found['starts']} starts, {found['seconds']:.0f} s, "
        f"{found['processor']}, {found['date']}."
    )
