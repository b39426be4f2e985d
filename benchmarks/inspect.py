"""``python -m benchmarks inspect``: what the compiler makes of every Triton kernel, for GPUs that need not be there."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path

from . import ahead_of_time as attention
from . import ahead_of_time_decode as decode
from . import ahead_of_time_gemm as gemm
from . import ahead_of_time_norm as norm
from .ahead_of_time import ARCHITECTURES, DTYPES, SPILLS, Compiled, allowed_spills, compile_all, violations
from .cells import NONE, Cell, Table
from .terminal import Terminal

OPERATIONS = (attention, decode, gemm, norm)
KERNELS = tuple(kernel for operation in OPERATIONS for kernel in operation.KERNELS)


def main(arguments: Sequence[str]) -> int:
    """Compiles, shows what came of it and holds it against the rules; 1 if one is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks inspect", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--quick", action="store_true", help="the pairwise covering ones, which the tests compile")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiling processes")
    parser.add_argument("--json", metavar="FILE", type=Path, help="everything found, a JSON line for each combination")
    parser.add_argument("--write-spills", action="store_true", help=f"put what was found into {SPILLS.name}")
    given = parser.parse_args(arguments)
    of_each = (
        operation.covering_combinations() if given.quick else operation.all_combinations() for operation in OPERATIONS
    )
    combinations = [
        c
        for c in chain.from_iterable(of_each)
        if c.architecture in given.arch and c.kernel in given.kernel and c.precision in given.precision
    ]
    terminal = Terminal()
    allowed = allowed_spills()
    results: list[Compiled] = []
    with tempfile.TemporaryDirectory() as cache, terminal.progress(len(combinations)) as step:
        results += compile_all(combinations, given.jobs, Path(cache), step)
    results.sort(key=lambda compiled: combinations.index(compiled.combination))
    results.sort(key=lambda compiled: ARCHITECTURES.index(compiled.combination.architecture))

    for architecture, group in groupby(results, key=lambda compiled: compiled.combination.architecture):
        terminal.show(table(architecture, list(group), allowed))
    if given.json:
        given.json.write_text("".join(json.dumps(record(compiled)) + "\n" for compiled in results))
    if given.write_spills:
        write_spills(results, allowed)
        allowed = allowed_spills()
    broken = [f"{compiled.combination}: {rule}" for compiled in results for rule in violations(compiled, allowed)]
    for line in broken:
        terminal.say(line, "bad")
    fallen = [str(c.combination) for c in results if c.code and c.code.spilled < allowed.get(str(c.combination), 0)]
    if fallen:
        terminal.say(f"Fewer spills than {SPILLS.name} allows, --write-spills updates it: {', '.join(fallen)}", "good")
    terminal.say(f"{len(results)} combinations, {len(broken)} broken rules", "bad" if broken else "good")
    return int(bool(broken))


def table(architecture: str, results: Sequence[Compiled], allowed: dict[str, int]) -> Table:
    """A row for each combination."""
    columns = (
        "kernel, problem",
        "tile",
        "registers",
        "spilled bytes",
        "in loops",
        "shared KiB",
        "tensor cores",
        "TMA loads",
        "exp2",
        "seconds",
    )
    note = (
        "Tile: queries x keys, or rows x columns of the result; warps, stages. "
        "In loops: instructions that spill inside an innermost loop."
    )
    rows = [_cells(compiled, bool(violations(compiled, allowed))) for compiled in results]
    return Table(architecture, columns, rows, note)


def _cells(compiled: Compiled, is_bad: bool) -> list[Cell]:
    c, tile, code = compiled.combination, compiled.tile, compiled.code
    name = f"{c.kernel} {c.precision} {c.case}"
    cut = f"{tile.block_m} x {tile.block_n}, {tile.num_warps}, {tile.num_stages}"
    if code is None:
        return [Cell(name, "bad"), Cell(cut), *[Cell(NONE)] * 7, Cell(f"{compiled.seconds:.1f}")]
    return [
        Cell(name, "bad" if is_bad else ""),
        Cell(cut),
        Cell(str(code.registers)),
        Cell(str(code.spilled or NONE)),
        Cell(str(code.spills_in_loops or NONE)),
        Cell(f"{compiled.shared / 1024:.1f}"),
        Cell(", ".join(f"{kind} {count}" for kind, count in code.tensor_cores.items()) or NONE),
        Cell(str(code.tma_loads or NONE)),
        Cell(str(code.exp2 or NONE)),
        Cell(f"{compiled.seconds:.1f}"),
    ]


def record(compiled: Compiled) -> dict[str, object]:
    """All that is known of it, for JSON."""
    return {"name": str(compiled.combination), **asdict(compiled)}


def write_spills(results: Sequence[Compiled], allowed: dict[str, int]) -> None:
    """``allowed`` with what was found in place of what it said."""
    found = {str(compiled.combination): compiled.code.spilled for compiled in results if compiled.code}
    merged = {name: spilled for name, spilled in (allowed | found).items() if spilled}
    SPILLS.write_text(json.dumps(dict(sorted(merged.items())), indent=2) + "\n")
