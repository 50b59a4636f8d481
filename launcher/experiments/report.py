"""Formats of a study's results: text for the terminal, JSON, and docs/reproductions.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from gigabatch.kernels.bench.machine import processor
from gigabatch.launcher.experiments.papers import PAPERS, Paper
from gigabatch.launcher.experiments.run import Outcome
from gigabatch.launcher.experiments.study import Check, Estimate, Study
from gigabatch.trainer.run.files import write_atomically

MAX_COLUMNS = 8
"""Maximum number of metric columns; tables with more are transposed to fit a screen."""


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Build the JSON object of a study's outcome."""
    study = outcome.study
    return {
        "study": study.name,
        "papers": list(study.papers),
        "claim": study.claim,
        "setting": study.setting,
        "results": {
            variant: {name: _estimate_json(estimate) for name, estimate in metrics.items()}
            for variant, metrics in outcome.results.items()
        },
        "checks": [_check_json(check, outcome) for check in study.checks],
        "passed": outcome.passed,
        "seeds": outcome.seeds,
        "seconds": round(outcome.seconds, 1),
        "processor": processor(),
        "date": date.today().isoformat(),
    }


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    values = {"mean": estimate.mean, "std": estimate.std, "values": list(estimate.values)}
    if estimate.low is None:
        return values
    return values | {"low": estimate.low, "high": estimate.high}


def _check_json(check: Check, outcome: Outcome) -> dict[str, Any]:
    return {
        "name": check.name,
        "value": check.value(outcome.results),
        "minimum": check.minimum,
        "maximum": check.maximum,
        "baseline": check.baseline,
        "passed": check.passes(outcome.results),
    }


def unmeasured_json(paper: Paper) -> dict[str, Any]:
    """Build the JSON object of a paper without a study."""
    return {
        "study": None, "papers": [paper.title], "claim": None, "results": {}, "passed": None,
        "status": paper.status_text, "offers": paper.offers,
    }  # fmt: skip


def table_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """Format the `results` of `as_json` as a table: one row per variant, or per metric if there
    are many."""
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    rows = [["", *names]]
    for variant, metrics in results.items():
        rows.append([variant, *(_cell(metrics[n]) if n in metrics else "" for n in names)])
    if len(names) > MAX_COLUMNS:
        rows = list(map(list, zip(*rows, strict=True)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _cell(estimate: dict[str, Any]) -> str:
    text = f"{estimate['mean']:.3f} ± {estimate['std']:.3f}"
    if "low" not in estimate:
        return text
    return f"{text} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def check_lines(outcome: dict[str, Any]) -> Iterator[str]:
    """Format a verdict line for every check of `as_json`'s object."""
    for check in outcome["checks"]:
        kind = "baseline threshold" if check["baseline"] else "threshold"
        threshold = _threshold(check["minimum"], check["maximum"])
        yield f"{verdict(check)}  {check['name']}: {check['value']:.3f} ({kind} {threshold})"


def _threshold(minimum: float | None, maximum: float | None) -> str:
    if maximum is None:
        assert minimum is not None
        return _number(minimum)
    if minimum is None:
        return f"at most {_number(maximum)}"
    return f"{_number(minimum)} to {_number(maximum)}"


def _number(value: float) -> str:
    """Format with two decimals, or with more if two would round the value."""
    short = f"{value:.2f}"
    return short if float(short) == value else f"{value:g}"


def verdict(item: dict[str, Any]) -> str:
    """Return PASS or FAIL for an outcome or a check."""
    return "PASS" if item["passed"] else "FAIL"


def results_file(out: Path, study: Study) -> Path:
    return out / f"{study.name}.json"


def save(out: Path, study: Study, outcome: dict[str, Any]) -> dict[str, Any]:
    """Write the outcome to `out` and return it.

    If every number equals the stored outcome's, nothing was trained or measured this time; then
    the stored duration, processor and date are kept.
    """
    path = results_file(out, study)
    if path.exists():
        stored = load(path)
        if all(stored.get(part) == outcome[part] for part in ("results", "checks", "seeds")):
            outcome = outcome | {part: stored[part] for part in ("seconds", "processor", "date")}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(outcome, indent=1, ensure_ascii=False) + "\n")
    return outcome


def load(path: Path) -> dict[str, Any]:
    """Read an outcome that `save` wrote, in this version or in 0.1."""
    stored: dict[str, Any] = json.loads(path.read_text())
    return _from_0_1(stored, path.stem) if "figures" in stored else stored


def _from_0_1(stored: dict[str, Any], study: str) -> dict[str, Any]:
    """Convert the outcome format of version 0.1."""
    aliases = {paper.alias: paper.title for paper in PAPERS}
    papers = stored["paper"] if isinstance(stored["paper"], list) else [stored["paper"]]
    results = {
        variant: {
            name: {"std" if key == "spread" else key: value for key, value in estimate.items()}
            for name, estimate in metrics.items()
        }
        for variant, metrics in stored["figures"].items()
    }
    checks = []
    for old in stored["bars"]:
        bounds = dict(re.findall(r"([<>])= (\S+)", old["bound"]))
        minimum, maximum = (float(bounds[s]) if s in bounds else None for s in "><")
        checks.append(
            {"name": old["what"], "value": old["value"], "minimum": minimum, "maximum": maximum,
             "baseline": old["baseline"], "passed": old["holds"]}
        )  # fmt: skip
    kept = {part: stored[part] for part in ("claim", "setting", "seconds", "processor", "date")}
    return kept | {
        "study": study, "papers": [aliases[number] for number in papers], "results": results,
        "checks": checks, "passed": stored["holds"], "seeds": stored["starts"],
    }  # fmt: skip


def write_report(path: Path, out: Path, studies: Sequence[Study]) -> None:
    """Write the verdict of every paper, from the outcomes stored in `out`, as Markdown."""
    outcomes = {
        study.name: load(file) for study in studies if (file := results_file(out, study)).exists()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(_document(outcomes, studies)) + "\n")


def _document(outcomes: dict[str, Any], studies: Sequence[Study]) -> Iterator[str]:
    yield from (
        "# Reproductions",
        "",
        "Small experiments that test whether the effect a paper claims appears. Written by",
        "`gigabatch reproduce all --report docs/reproductions.md`; do not edit this page.",
        "",
        "Each experiment trains a baseline and the paper's method with the real trainer, in",
        "minutes on two CPU cores, mostly on synthetic data. A PASS says that the effect appears;",
        "it says nothing about the effect's size at scale. Metrics are means over seeds ± their",
        "standard deviation; a seed sets the initial weights and the synthetic data. Run one with",
        "`gigabatch reproduce NAME`. The experiments named `emoji-...` use real drawings",
        "(`--data FOLDER`) and take an hour.",
        "",
        "## Measured papers",
        "",
        "| Paper | Verdict | What gigabatch offers |",
        "|---|---|---|",
    )
    # A paper's verdict is that of its first study; studies on real data come later in the order.
    first_study = {title: study for study in reversed(studies) for title in study.papers}
    measured = [paper for paper in PAPERS if paper.title in first_study]
    for paper in measured:
        study = first_study[paper.title]
        text = "not run"
        if study.name in outcomes:
            text = f"[{verdict(outcomes[study.name])}](#{study.name})"
        yield f"| {paper.title} | {text} | {paper.offers} |"
    yield from ("", "## Other papers", "", "| Paper | Status | What gigabatch offers |")
    yield "|---|---|---|"
    for paper in PAPERS:
        if paper not in measured:
            yield f"| {paper.title} | {paper.status_text} | {paper.offers} |"
    for study in studies:
        if study.name in outcomes:
            yield from _section(study, outcomes[study.name])


def _section(study: Study, outcome: dict[str, Any]) -> Iterator[str]:
    yield from ("", f"## {study.name}", "", f"**{'; '.join(study.papers)}.** {outcome['claim']}")
    yield from ("", outcome["setting"], "", "```", *table_lines(outcome["results"]), "")
    yield from check_lines(outcome)
    yield from ("```", "")
    yield (
        f"**{verdict(outcome)}**: {outcome['seeds']} seeds, {outcome['seconds']:.0f} s, "
        f"{outcome['processor']}, {outcome['date']}."
    )
