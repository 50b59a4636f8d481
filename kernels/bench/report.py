"""Tables and plots of the results of `bench kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

MIB = 2**20
Record = dict[str, Any]  # an implementation's results at one problem
FAMILIES = {
    "softmax": "Softmax loss (InfoNCE, both directions)",
    "sigmoid": "Sigmoid loss",
    "maxsim": "MaxSim, N / 32 items per side, 32 tokens each (on a GPU 196 and 77)",
}
# Line, color and marker of each implementation; the engine is bold, plain torch gray.
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
HEAD = ("N", "logits", "implementation", "forward, ms", "forward + backward, ms", "TFLOP/s",
        "share of matmul", "peak, MiB")  # fmt: skip


def summarize(record: Record, flops: int, rate: float) -> None:
    """Add median times, and the step's FLOP/s, also as a share of the matmul's `rate`."""
    if "step_s" not in record:
        record["reason"] = record["reason"] or "not reached"
        return
    step = median(record["step_s"])
    record["step_ms"] = 1e3 * step
    record["forward_ms"] = 1e3 * median(record["forward_s"]) if "forward_s" in record else None
    record["flops_per_s"] = flops / step
    record["share_of_matmul"] = record["flops_per_s"] / rate


def result_line(record: Record) -> str:
    """Return a record's times and memory as one line."""
    if "step_ms" not in record:
        return str(record["reason"])
    forward = record["forward_ms"]
    words = [] if forward is None else [f"forward {forward:.4g} ms"]
    words += [f"with backward {record['step_ms']:.4g} ms"]
    words += [f"{record['share_of_matmul']:.0%} of matmul"]
    if record["peak_bytes"] is not None:
        words += [f"peak {record['peak_bytes'] / MIB:,.0f} MiB"]
    return ", ".join(words) + (f"; then {record['reason']}" if record["reason"] else "")


def title(results: dict[str, Any]) -> str:
    """Return the device, dtype and torch version as one line."""
    environment = results["environment"]
    threads = f", {environment['threads']} threads" if environment["threads"] else ""
    return f"{environment['device']}{threads}, {results['dtype']}, torch {environment['torch']}"


def tables(results: dict[str, Any]) -> str:
    """Return Markdown with one table for each family and width."""
    lines = [f"{title(results)}, {results['environment']['date']}", ""]
    lines += [f"`{results['command']}`", ""] if "command" in results else []
    for family, d, problems in _panels(results):
        lines += [f"### {FAMILIES[family]}, D = {d}", "", _row(HEAD), _row(["---"] * len(HEAD))]
        for problem in problems:
            start = [f"{problem['n']:,}", problem["logits"]]
            lines += [_row([*start, *_cells(record)]) for record in problem["contenders"]]
        notes = [*_disagreements(problems)]
        notes += [f"- `{name}`: {reason}" for name, reason in results["missing"][family].items()]
        lines += ["", *notes, ""] if notes else [""]
    lines += [f"- not started, out of time: {problem}" for problem in results["left_out"]]
    lines += [f"- **stopped early: {results['stopped']}**"] if results["stopped"] else []
    return "\n".join(lines).rstrip() + "\n"


def write(results: dict[str, Any], folder: Path) -> None:
    """Write kernels.md and kernels.png."""
    (folder / "kernels.md").write_text(tables(results))
    draw(results, folder / "kernels.png")


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot time over N for each family and width and, on a GPU, peak memory.

    If there are early logits, only they are shown; the tables have both kinds.
    """
    from matplotlib.figure import Figure

    metrics = ["step_ms", "peak_bytes"] if results["device"] == "cuda" else ["step_ms"]
    cells = [(panel, metric) for panel in _panels(results) for metric in metrics]
    rows = max(1, (len(cells) + 1) // 2)
    figure = Figure(figsize=(10, 1.4 + 3.2 * rows), dpi=110, layout="constrained")
    figure.suptitle(title(results), fontsize=12)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for ((family, d, problems), metric), axes in zip(cells, grid, strict=False):
        logits = "early" if any(p["logits"] == "early" for p in problems) else "late"
        problems = [problem for problem in problems if problem["logits"] == logits]
        unit = MIB if metric == "peak_bytes" else 1
        handles |= _plot_lines(axes, problems, metric, unit)
        handles |= _plot_floor(axes, problems) if metric == "step_ms" else {}
        _label_axes(axes, f"{FAMILIES[family]}\nD = {d}, {logits} logits", metric, problems)
    for axes in grid[len(cells) :]:
        axes.set_axis_off()
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def _panels(results: dict[str, Any]) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Yield (family, width, problems by size) for each table or plot."""
    for family in FAMILIES:
        problems = [problem for problem in results["problems"] if problem["family"] == family]
        for d in sorted({problem["d"] for problem in problems}):
            of_width = [problem for problem in problems if problem["d"] == d]
            yield family, d, sorted(of_width, key=lambda problem: (problem["n"], problem["logits"]))


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


def _disagreements(problems: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a note for each implementation whose loss or gradient differs."""
    for problem in problems:
        for record in problem["contenders"]:
            if not record.get("agrees", True):
                error = record["difference"]
                text = "is not finite" if error is None else f"differs by {error:.2%}"
                yield (f"- **(!) `{record['name']}` computes a different loss: at N "
                       f"{problem['n']:,}, {problem['logits']} logits, it {text}**")  # fmt: skip
            elif not record.get("gradient_agrees", True):
                error = record["gradient_difference"]
                text = "is not finite" if error is None else f"differs by {error:.0%}"
                yield (f"- `{record['name']}`, N {problem['n']:,}, {problem['logits']} logits: its "
                       f"gradient {text}")  # fmt: skip


def _row(cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _plot_lines(
    axes: Any, problems: list[dict[str, Any]], metric: str, unit: int
) -> dict[str, Any]:
    """Plot a metric of all implementations; return their legend handles."""
    points: dict[str, list[tuple[int, float]]] = {}
    for problem in problems:
        for record in problem["contenders"]:
            if record.get(metric):
                points.setdefault(record["name"], []).append((problem["n"], record[metric] / unit))
    handles = {}
    for name, xy in points.items():
        line, color, marker = STYLES[name]
        width = 2.2 if line == "-" else 1.4
        handles[name], *_ = axes.plot(*zip(*xy, strict=True), line, color=color, marker=marker,
                                      linewidth=width, markersize=5)  # fmt: skip
    return handles


def _plot_floor(axes: Any, problems: list[dict[str, Any]]) -> dict[str, Any]:
    """Plot the time of the matrix passes at the matmul's rate."""
    times = [1e3 * problem["flops"] / problem["gemm_flops_per_s"] for problem in problems]
    sizes = [problem["n"] for problem in problems]
    line, *_ = axes.plot(sizes, times, color="black", linewidth=0.9, dashes=(1, 2))
    return {"matrix passes at the matmul's rate": line}


def _short(n: int) -> str:
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if n % unit == 0:
            return f"{n // unit}{letter}"
    return str(n)


def _label_axes(axes: Any, heading: str, metric: str, problems: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(heading, fontsize=10)
    axes.set_xlabel("32 x items per side" if heading.startswith("MaxSim") else "N, batch size")
    axes.set_ylabel({"step_ms": "forward + backward, ms"}.get(metric, "peak above inputs, MiB"))
    sizes = sorted({problem["n"] for problem in problems})
    axes.set_xticks(sizes, [_short(n) for n in sizes])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
