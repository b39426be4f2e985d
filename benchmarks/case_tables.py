"""The tables of cases and their peers: attention, feed-forward and norm, whole layers and models, and their floors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from .cells import (
    NONE,
    Cell,
    Table,
    floor_cell,
    floors_met,
    megabytes,
    ratio_cell,
    ratio_to,
    share_cell,
    timing_cell,
    tone_of,
)
from .rows import OURS, AttentionRow, CaseRow, LayerRow, TransformerRow


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


def _attention_cells(rows: Sequence[AttentionRow], others: Sequence[str], ceilings: Iterable[str]) -> list[Cell]:
    by_peer = {row.peer: row for row in rows}
    ours = by_peer[OURS]
    default = next((row for row in rows if row.is_default), None)
    return [
        Cell(ours.case),
        timing_cell(ours) if ours.status == "ok" else Cell(ours.status.upper(), "bad"),
        Cell(f"{ours.backend} {ours.level}".strip()),
        *(timing_cell(by_peer[name]) if name in by_peer else Cell(NONE, "quiet") for name in others),
        ratio_cell(ours, default),
        Cell(NONE, "quiet") if ours.floor is None else Cell(f"{ours.floor:g}x"),
        *([ratio_to(ours, by_peer.get(ours.best_peer), ours.speedup)] if len(others) > 1 else []),
        Cell(f"{ours.flops / ours.timing.median / 1e9:,.4g}" if ours.timing else NONE),
        *(share_cell(ours, name) for name in ceilings),
        Cell(megabytes(ours.peak_bytes)),
        _error_cell(ours, default),
    ]


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
    ratio = ratio_to(ours, best, ours.ratio) if ours.floor is None else floor_cell(ours)
    peaks = [megabytes(None if row is None else row.peak_bytes) for row in (ours, eager)]
    is_known = ours.error is not None and ours.eager_error is not None
    return [
        Cell(ours.case),
        timing_cell(ours) if ours.status == "ok" else Cell(ours.status.upper(), "bad"),
        Cell(f"{ours.backend} {ours.level}".strip()),
        *(timing_cell(by_peer[name]) if name in by_peer else Cell(NONE, "quiet") for name in others),
        ratio,
        Cell(NONE, "quiet") if ours.floor is None else Cell(f"{ours.floor:g}x"),
        Cell(f"{ours.flops / ours.timing.median / 1e9:,.4g}" if ours.timing else NONE),
        *(share_cell(ours, name) for name in ceilings),
        _kept_cell(ours),
        Cell(f"{peaks[0]} ({peaks[1]})"),
        Cell(f"{ours.error:.1e} / {ours.eager_error:.1e}", "bad" if ours.within_contract is False else "")
        if is_known
        else Cell(NONE, "quiet"),
    ]


def _kept_cell(ours: LayerRow) -> Cell:
    if ours.kept_bytes is None or ours.kept_share is None:
        return Cell(NONE, "quiet")
    text = f"{megabytes(ours.kept_bytes)} ({ours.kept_share:.0%})"
    if ours.kept_most is None:
        return Cell(text)
    verdict = "met" if ours.keeps_little else "MISSED"
    return Cell(f"{text}, at most {ours.kept_most:.0%} {verdict}", tone_of(ours.keeps_little))


def transformer_tables(rows: Sequence[TransformerRow]) -> list[Table]:
    """One for each number of threads, a row for each case."""
    made = []
    for threads in sorted({row.threads for row in rows}):
        chosen = [row for row in rows if row.threads == threads]
        others = list(dict.fromkeys(row.peer for row in chosen if row.peer != OURS))
        columns = (
            "case",
            f"{OURS} ms",
            "backend",
            *(f"{name} ms" for name in others),
            "faster peer's / ours",
            "at least",
            "tokens/s",
            "GFLOP/s",
            "of read",
            "peak MB (peer's)",
            "error / peer's",
        )
        made.append(
            Table(
                f"Layers and models, {threads} thread{'s' * (threads > 1)}{floors_met(chosen)}",
                columns,
                [_transformer_cells(list(group), others) for _, group in groupby(chosen, key=lambda row: row.case)],
                "Times are medians, the ratio to the faster peer the median over interleaved rounds. At least: what "
                "ours must reach on one thread. Of read: weights and cache over the time, of what this machine reads "
                "of as many bytes. Peak: of one call, above what was there before. Error: the largest to float64, of "
                "few tokens without dropout, in the tensor where it is largest next to the peer's. "
                f"{NONE}: what did not run or was not timed (results.jsonl says why).",
            )
        )
    return made


def _transformer_cells(rows: Sequence[TransformerRow], others: Sequence[str]) -> list[Cell]:
    by_peer = {row.peer: row for row in rows}
    ours, stock = by_peer[OURS], next((row for row in rows if row.peer != OURS), None)
    is_known = ours.error is not None and ours.eager_error is not None
    peaks = [megabytes(None if row is None else row.peak_bytes) for row in (ours, stock)]
    return [
        Cell(ours.case),
        timing_cell(ours) if ours.status == "ok" else Cell(ours.status.upper(), "bad"),
        Cell(f"{ours.backend} {ours.level}".strip()),
        *(timing_cell(by_peer[name]) if name in by_peer else Cell(NONE, "quiet") for name in others),
        ratio_to(ours, by_peer.get(ours.best_peer), ours.ratio) if ours.floor is None else floor_cell(ours),
        Cell(NONE, "quiet") if ours.floor is None else Cell(f"{ours.floor:g}x"),
        Cell(f"{ours.length / ours.timing.median:,.4g}" if ours.timing else NONE),
        Cell(f"{ours.flops / ours.timing.median / 1e9:,.4g}" if ours.timing else NONE),
        share_cell(ours, "read") if ours.moved_bytes else Cell(NONE, "quiet"),
        Cell(f"{peaks[0]} ({peaks[1]})") if ours.peak_most is None else _peak_cell(ours, peaks),
        Cell(f"{ours.error:.1e} / {ours.eager_error:.1e}", "bad" if ours.within_contract is False else "")
        if is_known
        else Cell(NONE, "quiet"),
    ]


def _peak_cell(ours: TransformerRow, peaks: Sequence[str]) -> Cell:
    share = NONE if ours.peak_share is None else f"{ours.peak_share:.0%}"
    verdict = "met" if ours.takes_little else "MISSED"
    text = f"{peaks[0]} ({peaks[1]}): {share}, at most {ours.peak_most:.0%} {verdict}"
    return Cell(text, tone_of(ours.takes_little))


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
    return Cell(" ".join(texts) + (f" ({missed} MISSED)" if missed else ""), tone_of(not missed))
