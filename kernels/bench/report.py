"""The figures of `bench kernels` as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

MIB = 2**20
Record = dict[str, Any]  # of a contender at a problem
FAMILIES = {
    "softmax": "Softmax loss (InfoNCE, both directions)",
    "sigmoid": "Sigmoid loss",
    "maxsim": "MaxSim, N / 32 items a side of 32 tokens (on a GPU of 196 and 77)",
}
# Line, colour and marker by contender: ours bold, plain torch grey.
STYLES = {
    "tiled": ("-", "#1f77b4", "o"),
    "triton": ("-", "#d62728", "o"),
    "triton-cached": ("-", "#ff7f0e", "s"),
    "dense": ("--", "#555555", "^"),
    "dense-one-matrix": ("--", "#8c8c8c", "v"),
    "dense-compiled": ("--", "#b5b5b5", "D"),
    "chunked": ("--", "#555555", "^"),
    "open_clip": (":", "#2ca02c", "x"),
    "inf_cl": (":", "#9467bd", "x"),
    "liger": (":", "#8c564b", "x"),
    "cut_cross_entropy": (":", "#17becf", "x"),
}
HEAD = ("N", "logits", "contender", "forward, ms", "forward + backward, ms", "TFLOP/s",
        "share of matmul", "peak, MiB")  # fmt: skip


def summarise(record: Record, flops: int, rate: float) -> None:
    """From the times: medians, and the step's FLOP/s beside the matmul's `rate`."""
    if "step_s" not in record:
        record["reason"] = record["reason"] or "not reached"
        return
    step = median(record["step_s"])
    record["step_ms"] = 1e3 * step
    record["forward_ms"] = 1e3 * median(record["forward_s"]) if "forward_s" in record else None
    record["flops_per_s"] = flops / step
    record["share_of_matmul"] = record["flops_per_s"] / rate


def figures(record: Record) -> str:
    """One line."""
    if "step_ms" not in record:
        return str(record["reason"])
    forward = record["forward_ms"]
    words = [] if forward is None else [f"forward {forward:.4g} ms"]
    words += [f"with backward {record['step_ms']:.4g} ms"]
    words += [f"{record['share_of_matmul']:.0%} of matmul"]
    if record["peak_bytes"] is not None:
        words += [f"peak {record['peak_bytes'] / MIB:,.0f} MiB"]
    return ", ".join(words) + (f"; then {record['reason']}" if record["reason"] else "")


def title(found: dict[str, Any]) -> str:
    around = found["environment"]
    threads = f", {around['threads']} threads" if around["threads"] else ""
    return f"{around['device']}{threads}, {found['dtype']}, torch {around['torch']}"


def tables(found: dict[str, Any]) -> str:
    """Markdown: a table for each family and width."""
    lines = [f"{title(found)}, {found['environment']['date']}", ""]
    lines += [f"`{found['command']}`", ""] if "command" in found else []
    for family, d, problems in _panels(found):
        lines += [f"### {FAMILIES[family]}, D = {d}", "", _row(HEAD), _row(["---"] * len(HEAD))]
        for problem in problems:
            start = [f"{problem['n']:,}", problem["logits"]]
            lines += [_row([*start, *_cells(record)]) for record in problem["contenders"]]
        notes = [*_wrong(problems)]
        notes += [f"- `{name}`: {why}" for name, why in found["missing"][family].items()]
        lines += ["", *notes, ""] if notes else [""]
    lines += [f"- not begun, for want of time: {what}" for what in found["left_out"]]
    lines += [f"- **stopped early: {found['stopped']}**"] if found["stopped"] else []
    return "\n".join(lines).rstrip() + "\n"


def write(found: dict[str, Any], folder: Path) -> None:
    (folder / "kernels.md").write_text(tables(found))
    draw(found, folder / "kernels.png")


def draw(found: dict[str, Any], path: Path) -> None:
    """For each family and width time over N and, on a GPU, peak memory. Early logits alone
    where there are any: the tables have both."""
    from matplotlib.figure import Figure

    kinds = ["step_ms", "peak_bytes"] if found["device"] == "cuda" else ["step_ms"]
    cells = [(panel, what) for panel in _panels(found) for what in kinds]
    rows = max(1, (len(cells) + 1) // 2)
    figure = Figure(figsize=(10, 1.4 + 3.2 * rows), dpi=110, layout="constrained")
    figure.suptitle(title(found), fontsize=12)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for ((family, d, problems), what), axes in zip(cells, grid, strict=False):
        logits = "early" if any(p["logits"] == "early" for p in problems) else "late"
        problems = [problem for problem in problems if problem["logits"] == logits]
        unit = MIB if what == "peak_bytes" else 1
        handles |= _lines(axes, problems, what, unit)
        handles |= _floor(axes, problems) if what == "step_ms" else {}
        _dress(axes, f"{FAMILIES[family]}\nD = {d}, {logits} logits", what, problems)
    for axes in grid[len(cells) :]:
        axes.set_axis_off()
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def _panels(found: dict[str, Any]) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    for family in FAMILIES:
        of = [problem for problem in found["problems"] if problem["family"] == family]
        for d in sorted({problem["d"] for problem in of}):
            here = [problem for problem in of if problem["d"] == d]
            yield family, d, sorted(here, key=lambda problem: (problem["n"], problem["logits"]))


def _cells(record: Record) -> list[str]:
    name = f"`{record['name']}`" if record.get("agrees", True) else f"**`{record['name']}` (!)**"
    if "step_ms" not in record:
        return [name, record["reason"], "", "", "", ""]
    forward, peak = record["forward_ms"], record["peak_bytes"]
    return [
        name if not record["reason"] else f"{name} ({record['reason']})",
        "" if forward is None else f"{forward:.4g}",
        f"{record['step_ms']:.4g}",
        f"{record['flops_per_s'] / 1e12:.3g}",
        f"{record['share_of_matmul']:.0%}",
        "" if peak is None else f"{peak / MIB:,.0f}",
    ]


def _wrong(problems: list[dict[str, Any]]) -> Iterator[str]:
    for problem in problems:
        for record in problem["contenders"]:
            if not record.get("agrees", True):
                off = record["difference"]
                how = "is not finite" if off is None else f"is {off:.2%} off the first one's"
                yield (f"- **(!) `{record['name']}` computes another loss: at N {problem['n']:,}, "
                       f"{problem['logits']} logits, it {how}**")  # fmt: skip
            elif not record.get("gradient_agrees", True):
                off = record["gradient_difference"]
                how = "not finite" if off is None else f"{off:.0%} off the first one's"
                yield (f"- `{record['name']}`, N {problem['n']:,}, {problem['logits']} logits: its "
                       f"gradient is {how}")  # fmt: skip


def _row(cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _lines(axes: Any, problems: list[dict[str, Any]], what: str, unit: int) -> dict[str, Any]:
    points: dict[str, list[tuple[int, float]]] = {}
    for problem in problems:
        for record in problem["contenders"]:
            if record.get(what):
                points.setdefault(record["name"], []).append((problem["n"], record[what] / unit))
    handles = {}
    for name, at in points.items():
        line, colour, marker = STYLES[name]
        width = 2.2 if line == "-" else 1.4
        handles[name], *_ = axes.plot(*zip(*at, strict=True), line, color=colour, marker=marker,
                                      linewidth=width, markersize=5)  # fmt: skip
    return handles


def _floor(axes: Any, problems: list[dict[str, Any]]) -> dict[str, Any]:
    """What the matrix passes alone would take at the matmul's rate."""
    least = [1e3 * problem["flops"] / problem["gemm_flops_per_s"] for problem in problems]
    sizes = [problem["n"] for problem in problems]
    line, *_ = axes.plot(sizes, least, color="black", linewidth=0.9, dashes=(1, 2))
    return {"matrix passes at the matmul's rate": line}


def _short(n: int) -> str:
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if n % unit == 0:
            return f"{n // unit}{letter}"
    return str(n)


def _dress(axes: Any, heading: str, what: str, problems: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(heading, fontsize=10)
    axes.set_xlabel("32 x items a side" if heading.startswith("MaxSim") else "N, the batch")
    axes.set_ylabel({"step_ms": "forward + backward, ms"}.get(what, "peak beyond inputs, MiB"))
    sizes = sorted({problem["n"] for problem in problems})
    axes.set_xticks(sizes, [_short(n) for n in sizes])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
