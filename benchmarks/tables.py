"""The tables of a run, made from its rows once: the terminal, the Markdown and the HTML page only lay them out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from .case_tables import attention_tables, floors_table, layer_tables, transformer_tables
from .ceilings import Ceilings
from .cells import NONE, Cell, Table, floors_met, megabytes, ratio_cell, ratio_to
from .machine import Machine
from .rows import STOCK_SDPA, AttentionRow, LayerRow, ModelRow, NumericsRow, Results, TransformerRow


def tables(results: Results) -> list[Table]:
    """Every table that has a row."""
    made = [
        *map(machine_table, results.machines),
        ceilings_table(results.of(Ceilings)),
        floors_table(results.of(AttentionRow)),
        *attention_tables(results.of(AttentionRow)),
        floors_table(results.of(LayerRow)),
        *layer_tables(results.of(LayerRow)),
        *transformer_tables(results.of(TransformerRow)),
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
        ratio_cell(row, sdpa) if row.is_ours else Cell(NONE, "quiet"),
        Cell(f"{row.floor:g}x") if row.is_ours and row.floor is not None else Cell(NONE, "quiet"),
        ratio_to(row, fastest, row.speedup),
        Cell(NONE, "quiet") if row.attention_share is None else Cell(f"{row.attention_share:.0%}"),
        Cell(megabytes(row.peak_bytes)),
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
