"""The plots of a run. Needs matplotlib; ``report`` says so where it is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .ceilings import Ceilings
from .rows import FUSED, OURS, AttentionRow, ModelRow, Results

COLOURS = {
    OURS: "#d1495b",
    FUSED: "#d1495b",
    "sdpa flash": "#30638e",
    "sdpa cudnn": "#3d9970",
    "sdpa efficient": "#8e6c8a",
    "sdpa math": "#9aa5b1",
    "eager": "#c8a951",
    "compiled": "#6b8f9c",
    "stock eager": "#c8a951",
    "stock sdpa": "#30638e",
}
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "#e4e7eb",
}
SWEEP_LENGTHS = 3  # fewer lengths than this make no curve
RESOLUTION = 90


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the PNG files that the rows give rise to, and returns them."""
    import matplotlib

    matplotlib.use("Agg")
    for name, value in STYLE.items():
        matplotlib.rcParams[name] = value
    drawn = []
    for name, figure in _figures(results):
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=RESOLUTION, bbox_inches="tight")
        drawn.append(path)
    return drawn


def _figures(results: Results) -> Iterator[tuple[str, Any]]:
    attention = results.of(AttentionRow)
    ceilings = {ceiling.threads: ceiling for ceiling in results.of(Ceilings)}
    for threads in sorted({row.threads for row in attention}):
        rows = [row for row in attention if row.threads == threads]
        by_case = {row.case: [r for r in rows if r.case == row.case and r.timing is not None] for row in rows}
        compared = {case: found for case, found in by_case.items() if any(r.is_ours for r in found) and len(found) > 1}
        if compared:
            yield f"attention-threads-{threads}", _relative_times(compared, threads)
        families = {row.family: [r for r in rows if r.family == row.family and r.timing is not None] for row in rows}
        sweeps = {
            family: found for family, found in families.items() if len({r.length for r in found}) >= SWEEP_LENGTHS
        }
        if sweeps:
            yield f"sweeps-threads-{threads}", _sweeps(sweeps, ceilings.get(threads), threads)
    model = [row for row in results.of(ModelRow) if row.tokens_per_second is not None]
    if model:
        yield "main-job", _model(model)


def _relative_times(by_case: dict[str, list[AttentionRow]], threads: int) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.27 * len(by_case)))
    axes.set_xscale("log", base=2)
    peers = dict.fromkeys(row.peer for rows in by_case.values() for row in rows if not row.is_ours)
    for peer in peers:
        places, ratios = [], []
        for place, rows in enumerate(by_case.values()):
            timings = {row.peer: row.timing for row in rows}
            ours, other = timings[OURS], timings.get(peer)
            if ours is not None and other is not None:
                places.append(place)
                ratios.append(other.median / ours.median)
        axes.scatter(ratios, places, color=COLOURS.get(peer), label=peer, zorder=3, s=28)
    floors = {place: next(r.floor for r in rows if r.is_ours) for place, rows in enumerate(by_case.values())}
    promised = [(floor, place) for place, floor in floors.items() if floor is not None]
    if promised:
        at, heights = zip(*promised, strict=True)
        axes.scatter(at, heights, color="#444444", marker="|", s=60, label="at least, to SDPA")
    axes.axvline(1.0, color=COLOURS[OURS], linewidth=1.5, label=OURS)
    axes.axvspan(axes.get_xlim()[0], 1.0, color=COLOURS[OURS], alpha=0.07)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(range(len(by_case)), by_case)
    axes.set_ylim(len(by_case) - 0.5, -0.5)
    axes.set_xlabel("time over ours: left of the line a peer is faster")
    axes.set_title(f"Attention, threads: {threads}", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def _sweeps(sweeps: dict[str, list[AttentionRow]], ceiling: Ceilings | None, threads: int) -> Any:
    from matplotlib import pyplot

    columns = min(3, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(4.6 * columns, 3.2 * lines), squeeze=False)
    labels: dict[str, Any] = {}
    for axes, (family, rows) in zip(grid.flat, sweeps.items(), strict=False):
        for peer in dict.fromkeys(row.peer for row in rows):
            points = sorted((r.length, r.flops / r.timing.median / 1e9) for r in rows if r.peer == peer and r.timing)
            style = {"linewidth": 2.4 if peer == OURS else 1.2, "marker": "o", "markersize": 3.5}
            labels[peer] = axes.plot(*zip(*points, strict=True), color=COLOURS.get(peer), **style)[0]
        if ceiling is not None:
            limits = ceiling.units or {"matmul": max(ceiling.matmul[rows[0].dtype], ceiling.matmul["fp32"])}
            for name, dashes in zip(limits, ("--", ":"), strict=False):
                labels[name] = axes.axhline(limits[name] / 1e9, color="#444444", linestyle=dashes, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.set_title(family, loc="left")
        axes.set_xlabel("length")
        axes.set_ylabel("GFLOP/s")
    for axes in list(grid.flat)[len(sweeps) :]:
        axes.set_visible(False)
    figure.suptitle(f"Attention by length, threads: {threads}", x=0.01, ha="left")
    figure.legend(labels.values(), labels.keys(), loc="upper left", bbox_to_anchor=(0, 0), ncols=4, frameon=False)
    figure.tight_layout()
    return figure


def _model(rows: Sequence[ModelRow]) -> Any:
    from matplotlib import pyplot

    measures = (
        ("real tokens a second", lambda r: r.tokens_per_second),
        ("peak MB", lambda r: (r.peak_bytes or 0) / 1e6),
    )
    groups = list(dict.fromkeys((row.workload, row.dtype, row.threads) for row in rows))
    figure, grid = pyplot.subplots(len(groups), 2, figsize=(9, 1.6 * len(groups) + 0.6), squeeze=False)
    for line, group in zip(grid, groups, strict=True):
        chosen = [row for row in rows if (row.workload, row.dtype, row.threads) == group]
        for axes, (title, measure) in zip(line, measures, strict=True):
            names, values = [row.variant for row in chosen], [measure(row) for row in chosen]
            bars = axes.barh(names, values, color=[COLOURS[name] for name in names])
            axes.bar_label(bars, fmt="{:,.4g}", padding=3)
            axes.set_title(f"{group[0]}, {group[1]}, threads: {group[2]}, {title}", loc="left")
            axes.grid(visible=False, axis="y")
            axes.invert_yaxis()
            axes.margins(x=0.18)
    figure.suptitle(rows[0].model, x=0.01, ha="left")
    figure.tight_layout()
    return figure
