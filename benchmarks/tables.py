"""The tables of a run, made from its rows once: the terminal, the Markdown and the HTML page only lay them out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .ceilings import Ceilings
from .machine import Machine
from .rows import OURS, STOCK_SDPA, AttentionRow, CaseRow, LayerRow, ModelRow, NumericsRow, Results, reaches
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
        floors_table(results.of(AttentionRow)),
        *attention_tables(results.of(AttentionRow)),
        floors_table(results.of(LayerRow)),
        *layer_tables(results.of(LayerRow)),
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
    units, dtypes = (list(dict.fromkeys(name for c in ceilings for name in found(c))) for found in (_units, _dtypes))
    rows = [
        [
            Cell(c.device_type),
            Cell(str(c.threads)),
            Cell(c.level or NONE),
            *(_billions(c.units.get(unit)) for unit in units),
            _billions(c.read),
            _billions(c.bandwidth),
            *(_billions(c.matmul.get(dtype)) for dtype in dtypes),
        ]
        for c in ceilings
    ]
    columns = (
        "device",
        "threads",
        "level",
        *(f"{unit} GFLOP/s" for unit in units),
        "read GB/s",
        "copy GB/s (read + write)",
        *(f"matmul {dtype} GFLOP/s" for dtype in dtypes),
    )
    note = "Level: the native kernels' instruction set, whose units and reads these are; a case's reads are measured "
    return Table("Ceilings, measured in this run", columns, rows, note + "at its own working set.")


def _units(ceilings: Ceilings) -> Iterable[str]:
    return ceilings.units


def _dtypes(ceilings: Ceilings) -> Iterable[str]:
    return ceilings.matmul


def _billions(rate: float | None) -> Cell:
    return Cell(NONE, "quiet") if rate is None else Cell(f"{rate / 1e9:,.4g}")


def verdict(ratio: float, ours: Timing, other: Timing) -> str:
    """At this ratio of the other's time to ours, ours is "faster", "slower" or "even"."""
    overlap = ours.p20 <= other.p80 and other.p20 <= ours.p80
    if abs(ratio - 1.0) < (EVEN_OVERLAPPING_WITHIN if overlap else EVEN_WITHIN):
        return "even"
    return "faster" if ratio > 1.0 else "slower"


def attention_tables(rows: Sequence[AttentionRow]) -> list[Table]:
    """One for each number of threads, a row for each case."""
    made = []
    for threads in sorted({row.threads for row in rows}):
        chosen = [row for row in rows if row.threads == threads]
        others = list(dict.fromkeys(row.peer for row in chosen if row.peer != OURS))
        ceilings = list(dict.fromkeys(name for row in chosen if row.is_ours for name in row.shares))
        cases = [list(group) for _, group in groupby(chosen, key=lambda row: row.case)]
        columns = (
            "case",
            f"{OURS} ms",
            "backend",
            *(f"{name} ms" for name in others),
            "SDPA's / ours",
            "at least",
            *(["fastest peer's / ours"] if len(others) > 1 else []),
            "GFLOP/s",
            *(f"of {name}" for name in ceilings),
            "peak MB",
            "error / SDPA's",
        )
        made.append(
            Table(
                f"Attention, {threads} thread{'s' * (threads > 1)}{floors_met(chosen)}",
                columns,
                [_attention_cells(case, others, ceilings) for case in cases],
                "Times are medians, the ratio to SDPA as plain scaled_dot_product_attention chooses it (*) the median "
                "over interleaved rounds. At least: what the native kernels must reach on one thread of a machine with "
                "AMX. Of ...: the share of this run's ceilings. Error: the largest to float64, in the tensor where it "
                "is largest next to SDPA's. ! marks an error beyond our contract, "
                f"{NONE} what did not run or was not timed (results.jsonl says why).",
            )
        )
    return made


def layer_tables(rows: Sequence[LayerRow]) -> list[Table]:
    """One for each number of threads, a row for each case."""
    made = []
    for threads in sorted({row.threads for row in rows}):
        chosen = [row for row in rows if row.threads == threads]
        others = list(dict.fromkeys(row.peer for row in chosen if row.peer != OURS))
        ceilings = list(dict.fromkeys(name for row in chosen if row.is_ours for name in row.shares))
        columns = (
            "case",
            f"{OURS} ms",
            "backend",
            *(f"{name} ms" for name in others),
            "faster peer's / ours",
            "at least",
            "GFLOP/s",
            *(f"of {name}" for name in ceilings),
            "kept MB (of eager's)",
            "peak MB (eager's)",
            "error / eager's",
        )
        made.append(
            Table(
                f"Feed-forward and norm, {threads} thread{'s' * (threads > 1)}{floors_met(chosen)}",
                columns,
                [_layer_cells(list(group), others, ceilings) for _, group in groupby(chosen, key=lambda row: row.case)],
                "Times are medians, the ratio to the faster of plain and compiled torch the median over interleaved "
                "rounds. At least: what the native kernels must reach on one thread of a machine with AMX. Kept: what "
                "autograd keeps for the backward, inputs and parameters aside. Error: the largest to float64, in the "
                f"tensor where it is largest next to eager's. ! marks an error beyond our contract, {NONE} what did "
                "not run or was not timed (results.jsonl says why).",
            )
        )
    return made


def _layer_cells(rows: Sequence[LayerRow], others: Sequence[str], ceilings: Iterable[str]) -> list[Cell]:
    by_peer = {row.peer: row for row in rows}
    ours, eager = by_peer[OURS], by_peer.get("eager")
    best = by_peer.get(ours.best_peer)
    ratio = _ratio_to(ours, best, ours.ratio) if ours.floor is None else _floor_cell(ours)
    peaks = [_megabytes(None if row is None else row.peak_bytes) for row in (ours, eager)]
    is_known = ours.error is not None and ours.eager_error is not None
    return [
        Cell(ours.case),
        _timing_cell(ours) if ours.status == "ok" else Cell(ours.status.upper(), "bad"),
        Cell(f"{ours.backend} {ours.level}".strip()),
        *(_timing_cell(by_peer[name]) if name in by_peer else Cell(NONE, "quiet") for name in others),
        ratio,
        Cell(NONE, "quiet") if ours.floor is None else Cell(f"{ours.floor:g}x"),
        Cell(f"{ours.flops / ours.timing.median / 1e9:,.4g}" if ours.timing else NONE),
        *(_share_cell(ours, name) for name in ceilings),
        _kept_cell(ours),
        Cell(f"{peaks[0]} ({peaks[1]})"),
        Cell(f"{ours.error:.1e} / {ours.eager_error:.1e}", "bad" if ours.within_contract is False else "")
        if is_known
        else Cell(NONE, "quiet"),
    ]


def _kept_cell(ours: LayerRow) -> Cell:
    if ours.kept_bytes is None or ours.kept_share is None:
        return Cell(NONE, "quiet")
    text = f"{_megabytes(ours.kept_bytes)} ({ours.kept_share:.0%})"
    if ours.kept_most is None:
        return Cell(text)
    verdict = "met" if ours.keeps_little else "MISSED"
    return Cell(f"{text}, at most {ours.kept_most:.0%} {verdict}", _tone(ours.keeps_little))


def floors_table(rows: Sequence[AttentionRow] | Sequence[LayerRow]) -> Table:
    """One row for each family of cases and its floor: the ratios by length, with each number of threads."""
    promised = [row for row in rows if row.is_ours and row.floor is not None]
    threads = sorted({row.threads for row in promised})
    families = dict.fromkeys((row.family, row.floor) for row in promised)
    cells = []
    for family, floor in families:
        found = [row for row in promised if (row.family, row.floor) == (family, floor)]
        ratios = [_ratios_cell([row for row in found if row.threads == count]) for count in threads]
        lengths = dict.fromkeys(str(row.length) for row in found)
        cells.append([Cell(family), Cell(" ".join(lengths)), Cell(f"{floor:g}x"), *ratios])
    columns = ("what", "lengths", "at least", *(f"{count} thread{'s' * (count > 1)}" for count in threads))
    levels = ", ".join(sorted({row.level or "none" for row in promised}))
    note = (
        "The peer's time over ours, length by length; red where one of them misses its floor. Floors are for one "
        f"thread of a machine with AMX; the native kernels' level here: {levels}."
    )
    is_attention = any(isinstance(row, AttentionRow) for row in rows)
    return Table("Floors of attention" if is_attention else "Floors of feed-forward and norm", columns, cells, note)


def _ratios_cell(rows: Sequence[CaseRow]) -> Cell:
    texts = [NONE if row.ratio is None else f"{row.ratio:.2f}" for row in rows]
    missed = sum(not row.met for row in rows)
    return Cell(" ".join(texts) + (f" ({missed} MISSED)" if missed else ""), _tone(not missed))


def floors_met(rows: Iterable[CaseRow | ModelRow]) -> str:
    """How many of the floors are reached, for a title; "" where there is none."""
    met = [row.met for row in rows if row.met is not None]
    return f": {sum(met)} of {len(met)} floors met" if met else ""


def _attention_cells(rows: Sequence[AttentionRow], others: Sequence[str], ceilings: Iterable[str]) -> list[Cell]:
    by_peer = {row.peer: row for row in rows}
    ours = by_peer[OURS]
    default = next((row for row in rows if row.is_default), None)
    return [
        Cell(ours.case),
        _timing_cell(ours) if ours.status == "ok" else Cell(ours.status.upper(), "bad"),
        Cell(f"{ours.backend} {ours.level}".strip()),
        *(_timing_cell(by_peer[name]) if name in by_peer else Cell(NONE, "quiet") for name in others),
        _ratio_cell(ours, default),
        Cell(NONE, "quiet") if ours.floor is None else Cell(f"{ours.floor:g}x"),
        *([_ratio_to(ours, by_peer.get(ours.best_peer), ours.speedup)] if len(others) > 1 else []),
        Cell(f"{ours.flops / ours.timing.median / 1e9:,.4g}" if ours.timing else NONE),
        *(_share_cell(ours, name) for name in ceilings),
        Cell(_megabytes(ours.peak_bytes)),
        _error_cell(ours, default),
    ]


def _ratio_cell(ours: AttentionRow | ModelRow, other: AttentionRow | ModelRow | None) -> Cell:
    """Against the floor where there is one."""
    return _ratio_to(ours, other, ours.ratio) if ours.floor is None else _floor_cell(ours)


def _floor_cell(ours: CaseRow | ModelRow) -> Cell:
    assert ours.floor is not None
    ratio = NONE if ours.ratio is None else f"{ours.ratio:.2f}x"
    if reaches(ours.ratio, ours.floor, ours.level):
        return Cell(f"{ratio} met", "good")
    return Cell(f"{ratio} MISSED", "bad")


def _ratio_to(ours: CaseRow | ModelRow, other: CaseRow | ModelRow | None, ratio: float | None) -> Cell:
    if ratio is None or ours.timing is None or other is None or other.timing is None:
        return Cell(NONE, "quiet")
    return _speedup_cell(ratio, verdict(ratio, ours.timing, other.timing))


def _share_cell(ours: CaseRow, name: str) -> Cell:
    share = ours.shares.get(name)
    text = NONE if share is None else f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"
    if name != "read" or ours.read_floor is None:
        return Cell(text, "" if share else "quiet")
    return Cell(f"{text} of {ours.read_floor:.0%} {'met' if ours.reads_enough else 'MISSED'}", _tone(ours.reads_enough))


def _tone(is_good: bool) -> str:
    return "good" if is_good else "bad"


def _speedup_cell(speedup: float, outcome: str) -> Cell:
    tone = {"faster": "good", "slower": "bad", "even": ""}[outcome]
    return Cell(f"{speedup:.2f}x {outcome}", tone)


def _timing_cell(row: CaseRow) -> Cell:
    if row.timing is None:
        return Cell(NONE, "quiet")
    graph = "" if row.timing.graph is None else f" (graph {1e3 * row.timing.graph:.3g})"
    marks = "*" * row.is_default + "!" * (row.within_contract is False)
    return Cell(f"{1e3 * row.timing.median:.3g}{graph}{marks}")


def _error_cell(ours: AttentionRow, sdpa: AttentionRow | None) -> Cell:
    """Where SDPA does not run, next to the error of torch's eager operations."""
    tone = "bad" if ours.within_contract is False else ""
    if sdpa is not None and ours.errors.keys() & sdpa.errors.keys():
        errors = {name: (error, sdpa.errors[name]) for name, error in ours.errors.items()}
        error, theirs = max(errors.values(), key=lambda pair: pair[0] / max(pair[1], 1e-30))
        return Cell(f"{error:.1e} / {theirs:.1e}", tone)
    if ours.error is None or ours.eager_error is None:
        return Cell(NONE, "quiet")
    return Cell(f"{ours.error:.1e} / eager's {ours.eager_error:.1e}", tone)


def _megabytes(count: int | None) -> str:
    return NONE if count is None else f"{count / 1e6:.3g}"


def model_table(rows: Sequence[ModelRow]) -> Table:
    columns = (
        "workload",
        "dtype",
        "threads",
        "variant",
        "tokens/s",
        "stock's time / ours",
        "at least",
        "faster stock's / ours",
        "attention's share",
        "peak MB",
        "largest difference to stock fp32",
        "error to float64",
        "backend",
    )
    note = (
        f"{rows[0].model if rows else ''}; real tokens a second, padding not counted. Stock: with torch's SDPA. "
        "Attention's share of its time bounds the gain: with attention for nothing it would be 1 / (1 - share)."
    )
    return Table(f"The main job{floors_met(rows)}", columns, [_model_cells(row, rows) for row in rows], note)


def _model_cells(row: ModelRow, rows: Sequence[ModelRow]) -> list[Cell]:
    group = [r for r in rows if (r.workload, r.dtype, r.threads) == (row.workload, row.dtype, row.threads)]
    stock = [r for r in group if not r.is_ours and r.timing is not None]
    sdpa = next((r for r in stock if r.variant == STOCK_SDPA), None)
    fastest = min(stock, key=lambda r: r.timing.median if r.timing else 0.0, default=None)
    bad = "bad" if row.status in ("wrong", "failed") else ""
    return [
        Cell(f"{row.workload} ({row.texts} texts)" if row.texts else row.workload),
        Cell(row.dtype),
        Cell(str(row.threads or NONE)),
        Cell(row.variant),
        Cell(f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else row.status.upper(), bad),
        _ratio_cell(row, sdpa) if row.is_ours else Cell(NONE, "quiet"),
        Cell(f"{row.floor:g}x") if row.is_ours and row.floor is not None else Cell(NONE, "quiet"),
        _ratio_to(row, fastest, row.speedup),
        Cell(NONE, "quiet") if row.attention_share is None else Cell(f"{row.attention_share:.0%}"),
        Cell(_megabytes(row.peak_bytes)),
        Cell(NONE if row.difference is None else f"{row.difference:.1e}"),
        Cell(NONE if row.error is None else f"{row.error:.1e}", bad),
        Cell(f"{row.backend} {row.level}".strip()),
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
