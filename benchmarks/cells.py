"""What tables are made of: cells, and how timings, ratios, shares and floors are written into them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .rows import AttentionRow, CaseRow, ModelRow, reaches
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


def verdict(ratio: float, ours: Timing, other: Timing) -> str:
    """At this ratio of the other's time to ours, ours is "faster", "slower" or "even"."""
    overlap = ours.p20 <= other.p80 and other.p20 <= ours.p80
    if abs(ratio - 1.0) < (EVEN_OVERLAPPING_WITHIN if overlap else EVEN_WITHIN):
        return "even"
    return "faster" if ratio > 1.0 else "slower"


def floors_met(rows: Iterable[CaseRow | ModelRow]) -> str:
    """How many of the floors are reached, for a title; "" where there is none."""
    met = [row.met for row in rows if row.met is not None]
    return f": {sum(met)} of {len(met)} floors met" if met else ""


def floor_cell(ours: CaseRow | ModelRow) -> Cell:
    assert ours.floor is not None
    ratio = NONE if ours.ratio is None else f"{ours.ratio:.2f}x"
    if reaches(ours.ratio, ours.floor, ours.level):
        return Cell(f"{ratio} met", "good")
    return Cell(f"{ratio} MISSED", "bad")


def ratio_to(ours: CaseRow | ModelRow, other: CaseRow | ModelRow | None, ratio: float | None) -> Cell:
    if ratio is None or ours.timing is None or other is None or other.timing is None:
        return Cell(NONE, "quiet")
    return _speedup_cell(ratio, verdict(ratio, ours.timing, other.timing))


def share_cell(ours: CaseRow, name: str) -> Cell:
    share = ours.shares.get(name)
    text = NONE if share is None else f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"
    if name != "read" or ours.read_floor is None:
        return Cell(text, "" if share else "quiet")
    return Cell(
        f"{text} of {ours.read_floor:.0%} {'met' if ours.reads_enough else 'MISSED'}", tone_of(ours.reads_enough)
    )


def tone_of(is_good: bool) -> str:
    return "good" if is_good else "bad"


def _speedup_cell(speedup: float, outcome: str) -> Cell:
    tone = {"faster": "good", "slower": "bad", "even": ""}[outcome]
    return Cell(f"{speedup:.2f}x {outcome}", tone)


def timing_cell(row: CaseRow) -> Cell:
    if row.timing is None:
        return Cell(NONE, "quiet")
    graph = "" if row.timing.graph is None else f" (graph {1e3 * row.timing.graph:.3g})"
    marks = "*" * row.is_default + "!" * (row.within_contract is False)
    return Cell(f"{1e3 * row.timing.median:.3g}{graph}{marks}")


def megabytes(count: int | None) -> str:
    return NONE if count is None else f"{count / 1e6:.3g}"


def ratio_cell(ours: AttentionRow | ModelRow, other: AttentionRow | ModelRow | None) -> Cell:
    """Against the floor where there is one."""
    return ratio_to(ours, other, ours.ratio) if ours.floor is None else floor_cell(ours)
