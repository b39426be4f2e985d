"""The tables of a run, made from its rows once: the terminal, the Markdown and the HTML page only lay them out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .ceilings import Ceilings
from .machine import Machine
from .rows import OURS, AttentionRow, ModelRow, NumericsRow, Results
from .timing import Timing

# Two timings this close are even; so are less close ones that overlap between their 20th and 80th percentiles.
EVEN_WITHIN, EVEN_OVERLAPPING_WITHIN = 0.02, 0.05
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """Text, and how it is meant: "good", "bad", "quiet" or "" for plain."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, one for each column; ``note`` says how to read them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def tables(results: Results) -> list[Table]:
    """Every table that has a row."""
    made = [
        *map(machine_table, results.machines),
        ceilings_table(results.of(Ceilings)),
        *attention_tables(results.of(AttentionRow)),
        model_table(results.of(ModelRow)),
        *numerics_tables(results.of(NumericsRow)),
    ]
    return [table for table in made if table.rows]


def machine_table(machine: Machine) -> Table:
    is_busy = machine.load > machine.threads / 2
    facts = {
        "device": machine.device,
        "CPU instructions": machine.isa,
        "threads": str(machine.threads),
        "load before": f"{machine.load}{' (busy: timings on several threads mean little)' * is_busy}",
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "driver and clocks": machine.driver.replace("\n", " | "),
        "commit": machine.commit,
        "date": machine.date,
    }
    return Table("Machine", ("what", "found"), [[Cell(k), Cell(v)] for k, v in facts.items() if v])


def ceilings_table(ceilings: Sequence[Ceilings]) -> Table:
    rows = [
        [
            Cell(c.device_type),
            Cell(str(c.threads)),
            Cell(f"{c.bandwidth / 1e9:.4g}"),
            *(Cell(f"{rate / 1e9:,.4g}") for rate in c.matmul.values()),
        ]
        for c in ceilings
    ]
    dtypes = ceilings[0].matmul if ceilings else {}
    columns = ("device", "threads", "copy GB/s (read + write)", *(f"matmul {dtype} GFLOP/s" for dtype in dtypes))
    return Table("Ceilings, measured in this run", columns, rows)


def verdict(ours: Timing, other: Timing) -> str:
    """Ours is "faster", "slower" or "even"."""
    overlap = ours.p20 <= other.p80 and other.p20 <= ours.p80
    ratio = other.median / ours.median
    if abs(ratio - 1.0) < (EVEN_OVERLAPPING_WITHIN if overlap else EVEN_WITHIN):
        return "even"
    return "faster" if ratio > 1.0 else "slower"


def attention_tables(rows: Sequence[AttentionRow]) -> list[Table]:
    """One for each number of threads, a row for each case."""
    made = []
    for threads in sorted({row.threads for row in rows}):
        chosen = [row for row in rows if row.threads == threads]
        others = list(dict.fromkeys(row.peer for row in chosen if row.peer != OURS))
        cases = [list(group) for _, group in groupby(chosen, key=lambda row: row.case)]
        columns = (
            "case",
            f"{OURS} ms",
            "backend",
            *(f"{name} ms" for name in others),
            "speed-up",
            "GFLOP/s",
            "of ceiling",
        )
        made.append(
            Table(
                f"Attention, {threads} thread{'s' * (threads > 1)}",
                (*columns, "peak MB", "error / eager's"),
                [_attention_cells(case, others) for case in cases],
                "Medians. Speed-up: the fastest peer's time over ours. Of ceiling: the least time that this run's "
                "ceilings allow, over ours. * marks the backend that plain scaled_dot_product_attention picks, ! an "
                f"error beyond our contract, {NONE} what did not run or was not timed (results.jsonl says why).",
            )
        )
    return made


def _attention_cells(rows: Sequence[AttentionRow], others: Iterable[str]) -> list[Cell]:
    by_peer = {row.peer: row for row in rows}
    ours = by_peer[OURS]
    best = by_peer.get(ours.best_peer)
    speedup = Cell(NONE)
    if ours.speedup is not None and ours.timing is not None and best is not None and best.timing is not None:
        speedup = _speedup_cell(ours.speedup, verdict(ours.timing, best.timing))
    return [
        Cell(ours.case),
        _timing_cell(ours) if ours.status == "ok" else Cell(ours.status.upper(), "bad"),
        Cell(ours.backend),
        *(_timing_cell(by_peer[name]) if name in by_peer else Cell(NONE) for name in others),
        speedup,
        Cell(f"{ours.flops / ours.timing.median / 1e9:,.4g}" if ours.timing else NONE),
        Cell(f"{ours.ceiling_share:.0%}" if ours.ceiling_share is not None else NONE),
        Cell(_megabytes(ours.peak_bytes)),
        _error_cell(ours),
    ]


def _speedup_cell(speedup: float, outcome: str) -> Cell:
    tone = {"faster": "good", "slower": "bad", "even": ""}[outcome]
    return Cell(f"{speedup:.2f}x {outcome}", tone)


def _timing_cell(row: AttentionRow) -> Cell:
    if row.timing is None:
        return Cell(NONE, "quiet")
    graph = "" if row.timing.graph is None else f" (graph {1e3 * row.timing.graph:.3g})"
    marks = "*" * row.is_default + "!" * (row.within_contract is False)
    return Cell(f"{1e3 * row.timing.median:.3g}{graph}{marks}")


def _error_cell(row: AttentionRow) -> Cell:
    if row.error is None or row.eager_error is None:
        return Cell(NONE, "quiet")
    tone = "bad" if row.within_contract is False else ""
    return Cell(f"{row.error:.1e} / {row.eager_error:.1e}", tone)


def _megabytes(count: int | None) -> str:
    return NONE if count is None else f"{count / 1e6:.3g}"


def model_table(rows: Sequence[ModelRow]) -> Table:
    columns = (
        "dtype",
        "threads",
        "variant",
        "tokens/s",
        "speed-up",
        "peak MB",
        "largest difference to stock fp32",
        "error to float64",
        "backend",
    )
    shares = [f"{row.attention_share:.0%} in {row.dtype}" for row in rows if row.attention_share is not None]
    first = rows[0] if rows else None
    note = f"{first.model}, real tokens a second, padding not counted. " if first else ""
    note += "Speed-up: over the faster of the stock variants. "
    if shares:
        note += (
            f"Attention's share of the stock model's time ({', '.join(dict.fromkeys(shares))}) bounds what it can gain."
        )
    return Table("The main job", columns, [_model_cells(row, rows) for row in rows], note)


def _model_cells(row: ModelRow, rows: Sequence[ModelRow]) -> list[Cell]:
    speedup = Cell(NONE, "quiet")
    if row.speedup is not None and row.timing is not None:
        group = [r for r in rows if (r.dtype, r.threads) == (row.dtype, row.threads) and r.variant.startswith("stock")]
        best = min((r.timing for r in group if r.timing is not None), key=lambda timing: timing.median)
        speedup = _speedup_cell(row.speedup, verdict(row.timing, best))
    bad = "bad" if row.status in ("wrong", "failed") else ""
    return [
        Cell(row.dtype),
        Cell(str(row.threads)),
        Cell(row.variant),
        Cell(f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else row.status.upper(), bad),
        speedup,
        Cell(_megabytes(row.peak_bytes)),
        Cell(NONE if row.difference is None else f"{row.difference:.1e}"),
        Cell(NONE if row.error is None else f"{row.error:.1e}", bad),
        Cell(row.backend),
    ]


def numerics_tables(rows: Sequence[NumericsRow]) -> list[Table]:
    """One for each dtype: a row for each problem, a column for each backend."""
    made = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        chosen = [row for row in rows if row.dtype == dtype]
        backends = list(dict.fromkeys(row.backend for row in chosen if row.status != "refused"))
        cells = []
        for name, group in groupby(chosen, key=lambda row: row.case):
            by_backend = {row.backend: row for row in group}
            cells.append([Cell(name), *(_numerics_cell(by_backend[backend]) for backend in backends)])
        made.append(
            Table(
                f"Error against float64 in {dtype}",
                ("problem", *backends),
                cells,
                "Largest absolute error, in brackets as a multiple of torch eager's own in the same dtype, of the "
                "output or gradient where that multiple is largest. The contract allows 2, plus one rounding.",
            )
        )
    return made


def _numerics_cell(row: NumericsRow) -> Cell:
    if row.error is None or row.eager_error is None:
        return Cell(row.status, "bad" if row.status in ("wrong", "failed") else "quiet")
    ratio = f"{row.error / row.eager_error:.2f}" if row.eager_error else NONE
    return Cell(f"{row.error:.1e} ({ratio}, {row.tensor})", "bad" if row.status == "wrong" else "")
