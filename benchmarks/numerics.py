"""``python -m benchmarks numerics``: every backend's error against float64, next to torch eager's."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import fusedformer
from fusedformer import BackendRefused
from fusedformer.kernels.common.backend import ORDER
from tests.cases import CASES, Case, make_inputs
from tests.kernels.attention.eager import expected, fused
from tests.kernels.attention.eager import results as evaluated

from .cases import DTYPES
from .gate import judge
from .machine import default_folder, find_machine
from .peers import Results, failures
from .report import write
from .rows import NumericsRow, Writer, read
from .tables import numerics_tables
from .terminal import Terminal

# Lengths and head dims of real models, beside the tests' small odd ones.
LONG = (
    Case("long", batch=1, len_q=512, head_dim=64),
    Case("long causal", batch=1, len_q=512, head_dim=64, is_causal=True),
    Case("long causal", batch=1, len_q=512, head_dim=128, is_causal=True),
    Case("long padding", len_q=512, head_dim=64, key_mask="bool"),
)


def main(arguments: Sequence[str]) -> int:
    """Writes and shows the report; 1 if a backend breaks the contract on a problem that it takes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks numerics", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few problems that show only that it works")
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="the problems whose name this regular expression finds"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="for results.jsonl and the report")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    cases = [
        case for case in ((*CASES, *LONG)[::20] if given.quick else (*CASES, *LONG)) if re.search(given.only, str(case))
    ]
    if not cases:
        parser.error(f"--only {given.only}: no problem has such a name")

    terminal = Terminal()
    machine = find_machine(given.device)
    folder = given.out or default_folder(machine, "-numerics")
    writer = Writer(folder, machine)
    terminal.say(str(fusedformer.backends()))
    rows: list[NumericsRow] = []
    with terminal.progress(len(cases) * len(DTYPES)) as step:
        for dtype in DTYPES:
            for case in cases:
                step(f"{dtype} {case}")
                rows += writer.write_all(numerics_rows(case, dtype, given.device))
    for table in numerics_tables(rows):
        terminal.show(table)
    bad = [row for row in rows if row.status in ("wrong", "failed")]
    for row in bad:
        terminal.say(f"{row.status.upper()} {row.backend} on {row.dtype} {row.case}: {row.reason}", "bad")
    for line in write(read(folder), folder):
        terminal.say(line)
    return int(bool(bad))


def numerics_rows(case: Case, dtype: str, device: str) -> Iterator[NumericsRow]:
    """A row for each backend, the output and every gradient judged."""
    inputs = make_inputs(case, DTYPES[dtype], device, seed=0)
    truths: dict[bool, tuple[Results, list[Results]]] = {}
    for backend in ORDER:
        row = NumericsRow(str(case), dtype, backend)
        try:
            found = evaluated(fused(backend), inputs, with_lse=backend != "torch")
        except BackendRefused as refusal:
            yield replace(row, status="refused", reason=str(refusal))
        except failures() as failure:
            yield replace(row, status="failed", reason=str(failure))
        else:
            with_lse = "lse" in found
            truths[with_lse] = truths.get(with_lse) or expected(inputs, with_lse)
            verdict = judge(found, *truths[with_lse])
            yield replace(
                row,
                status="wrong" if verdict.wrong else "ok",
                reason=verdict.wrong or "",
                tensor=verdict.tensor,
                error=verdict.error,
                eager_error=verdict.eager_error,
            )
