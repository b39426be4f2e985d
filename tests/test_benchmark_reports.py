"""The benchmark stores and shows what it found; its commands run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import case_tables, report, rows, run, tables, terminal
from benchmarks.cases import selected
from benchmarks.ceilings import Ceilings
from benchmarks.cells import NONE, Cell, verdict
from benchmarks.machine import ROOT, Machine, find_machine
from benchmarks.options import Options
from benchmarks.rows import OURS, AttentionRow, ModelRow, NumericsRow, Results, Writer, read
from benchmarks.timing import Timing

CEILINGS = Ceilings("cpu", 1, 1e10, {"fp32": 1e11, "fp16": 1e9, "bf16": 2e11})
TIMING = Timing(2e-3, 1.9e-3, 2.1e-3, 7)
MACHINE = Machine("2026-01-02T03:04:05+00:00", "0123456789ab", "a card", "cpu", "AVX2", 2, 0.1, {"torch": "2.13"}, "")
NATIVE_CEILINGS = replace(CEILINGS, threads=2, level="amx", units={"AMX": 2e12, "FMA": 1e11}, read=3e10)
SLOW = AttentionRow(
    "a|case", OURS, "fp32", "forward", "fp32 forward, dense, head dim 8", 16, 1e6, 1000, "2 of 2 heads", 1,
    timing=replace(TIMING, median=4e-3, p20=3.9e-3, p80=4.1e-3), error=1e-6, eager_error=1e-6, within_contract=True,
    best_peer="sdpa flash", speedup=0.5, ratio=0.5, backend="reference", explanation="torch refuses: <why>",
    shares={"FMA": 0.25, "read": 0.004}, errors={"out": 1e-6},
)  # fmt: skip
FLASH = replace(
    SLOW, peer="sdpa flash", timing=TIMING, best_peer="", speedup=None, ratio=None, is_default=True, backend=""
)
FLASH = replace(FLASH, errors={"out": 4e-6})
WRONG = replace(SLOW, case="wrong case", status="wrong", reason="too far", timing=None, within_contract=False)
MODEL = ModelRow(
    "a model", "16 x 256", "stock sdpa", "fp32", 8, 100, 160, 1_000_000, 1e-7, 1e-7, 0.25, 1,
    timing=TIMING, tokens_per_second=5e4,
)  # fmt: skip
FUSED = replace(MODEL, variant="fused", speedup=1.5, ratio=1.5, floor=1.1, backend="cpu", level="amx")
FUSED = replace(FUSED, timing=replace(TIMING, median=1.3e-3, p20=1.2e-3, p80=1.4e-3))
NUMBERS = NumericsRow("plain-B2", "bf16", "torch", "wrong", "too far", "grad query", 0.5, 0.1)
EVERY: list[rows.Row] = [CEILINGS, NATIVE_CEILINGS, SLOW, FLASH, WRONG, MODEL, FUSED, NUMBERS]


def stored(folder: Path, entries: list[Any]) -> Results:
    writer = Writer(folder, MACHINE)
    for entry in entries:
        writer.write(entry)
    return read(folder)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    found = stored(tmp_path, EVERY)
    assert found.rows == EVERY
    assert found.machines == [MACHINE]


def test_a_row_is_complete_in_itself(tmp_path: Path) -> None:
    stored(tmp_path, [replace(SLOW, error=math.nan)])
    (line,) = (tmp_path / rows.FILE_NAME).read_text().splitlines()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert entry["error"] is None
    assert entry["timing"].keys() == {"median", "p20", "p80", "samples", "graph"}
    assert entry["run"]["commit"] == MACHINE.commit
    assert entry["run"]["versions"] == MACHINE.versions
    assert set(entry) == {"kind", "run", *rows.schema()["attention"]}


@pytest.mark.parametrize("line", ["no json", '{"kind": "nonsense", "run": {}}', '{"kind": "attention"}'])
def test_what_is_no_row_is_refused_with_its_place(line: str, tmp_path: Path) -> None:
    stored(tmp_path, [SLOW])
    path = tmp_path / rows.FILE_NAME
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=f"{rows.FILE_NAME}:2: not a row"):
        read(tmp_path)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rows.FILE_NAME):
        read(tmp_path)


def test_what_loses_or_is_wrong_is_shown_as_bad() -> None:
    (table,) = case_tables.attention_tables([SLOW, FLASH, WRONG])
    slow, wrong = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert slow["SDPA's / ours"] == Cell("0.50x slower", "bad")
    assert (slow["of FMA"].text, slow["of read"].text) == ("25%", "0.4%")
    assert slow["error / SDPA's"].text == "1.0e-06 / 4.0e-06"
    assert slow["backend"].text == "reference"
    assert slow["sdpa flash ms"].text == "2*"
    assert wrong[f"{OURS} ms"] == Cell("WRONG", "bad")
    assert wrong["GFLOP/s"].text == NONE
    (numbers,) = tables.numerics_tables([NUMBERS])
    assert numbers.rows[0][1].tone == "bad"


def cells(*given: AttentionRow) -> dict[str, Cell]:
    (table,) = case_tables.attention_tables(given)
    return dict(zip(table.columns, table.rows[0], strict=True))


def test_a_floor_is_met_or_missed_in_red() -> None:
    native = replace(SLOW, backend="cpu", level="avx2", floor=2.0)
    shown = cells(replace(native, ratio=2.0), FLASH)
    assert (shown["SDPA's / ours"], shown["at least"].text) == (Cell("2.00x met", "good"), "2x")
    assert shown["backend"].text == "cpu avx2"
    assert cells(replace(native, ratio=1.99), FLASH)["SDPA's / ours"] == Cell("1.99x MISSED", "bad")
    other = replace(native, ratio=9.0, backend="torch", level="")
    assert cells(other, FLASH)["SDPA's / ours"] == Cell("9.00x MISSED", "bad")  # no kernel of ours
    failed = replace(native, status="failed", timing=None, ratio=None)
    assert cells(failed, FLASH)["SDPA's / ours"] == Cell(f"{NONE} MISSED", "bad")


def test_a_share_of_the_reads_can_be_a_floor_too() -> None:
    decode = replace(SLOW, backend="cpu", level="avx2", floor=2.0, ratio=3.0, read_floor=0.8, shares={"read": 0.81})
    assert decode.met is True
    assert cells(decode, FLASH)["of read"] == Cell("81% of 80% met", "good")
    slow = replace(decode, shares={"read": 0.5})
    assert slow.met is False
    assert cells(slow, FLASH)["of read"] == Cell("50% of 80% MISSED", "bad")


def test_the_title_counts_the_floors() -> None:
    native = replace(SLOW, backend="cpu", level="avx2", floor=2.0)
    (table,) = case_tables.attention_tables([native, FLASH, replace(native, case="b", ratio=3.0), SLOW])
    assert table.title == "Attention, 1 thread: 1 of 2 floors met"
    (table,) = case_tables.attention_tables([SLOW, FLASH])
    assert table.title == "Attention, 1 thread"


def test_a_model_that_was_not_run_misses_its_floor() -> None:
    absent = ModelRow("a model", "16 x 256", "fused", "bf16", status="not run", reason="too slow", floor=1.1)
    table = tables.model_table([MODEL, FUSED, absent])
    assert table.title == "The main job: 1 of 2 floors met"
    shown = dict(zip(table.columns, table.rows[2], strict=True))
    assert shown["stock's time / ours"] == Cell(f"{NONE} MISSED", "bad")
    assert (shown["tokens/s"].text, shown["threads"].text) == ("NOT RUN", NONE)


def test_floors_are_summed_up_by_what_they_are_for() -> None:
    native = replace(SLOW, backend="cpu", level="avx2", floor=2.0)
    sweep = [replace(native, length=n, ratio=ratio, threads=t) for n, ratio in ((8, 1.5), (16, 2.5)) for t in (1, 2)]
    small = replace(native, floor=0.8, length=1, ratio=0.9)
    table = case_tables.floors_table([FLASH, *sweep, small, SLOW])
    assert table.columns == ("what", "lengths", "at least", "1 thread", "2 threads")
    assert [cell.text for cell in table.rows[0]] == [SLOW.family, "8 16", "2x", *["1.50 2.50 (1 MISSED)"] * 2]
    assert table.rows[0][3].tone == "bad"
    assert table.rows[1][2:4] == [Cell("0.8x"), Cell("0.90", "good")]
    assert "level here: avx2" in table.note


def test_the_report_holds_every_table_and_plot(tmp_path: Path) -> None:
    report.write(stored(tmp_path, EVERY), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    for found in (
        "a card",
        "a\\|case",
        "🔴 **0.50x slower**",
        "1.50x met",
        "AMX GFLOP/s",
        "🔴 **WRONG**",
        "plain-B2",
        "0123456789ab",
    ):
        assert found in markdown, found
    page = (tmp_path / "report.html").read_text()
    assert '<td class="bad">0.50x slower</td>' in page
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == ["attention-threads-1.png", "main-job.png"]
    assert page.count("data:image/png;base64,") == len(plots)
    assert "http" not in page
    assert "src=" not in page.replace('src="data:', "")


def test_a_sweep_over_lengths_is_a_curve(tmp_path: Path) -> None:
    sweep = [replace(row, case=f"{n}", length=n) for n in (16, 32, 64) for row in (SLOW, FLASH)]
    report.write(stored(tmp_path, [CEILINGS, *sweep]), tmp_path)
    assert (tmp_path / "sweeps-threads-1.png").stat().st_size > 10_000


def test_without_matplotlib_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = report.write(stored(tmp_path, EVERY), tmp_path)
    assert any("No plots were drawn" in line for line in said)
    assert (tmp_path / "report.html").exists()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("fancy", [True, False], ids=["rich", "plain"])
def test_the_terminal_shows_every_cell(fancy: bool, capsys: Any) -> None:
    shown = terminal.Terminal(fancy=fancy)
    for table in tables.tables(Results([MACHINE], EVERY)):
        shown.show(table)
        out = capsys.readouterr().out
        assert table.title in out
        assert all(cell.text in out for row in table.rows for cell in row)
    with shown.progress(2) as step:
        step("the first")
        step("the second")
    assert "[2/2] the second" in capsys.readouterr().err


def test_plain_text_marks_what_is_bad() -> None:
    (table,) = case_tables.attention_tables([SLOW, FLASH])
    assert "0.50x slower <--" in terminal.plain(table)


def test_the_machine_is_described() -> None:
    found = find_machine("cpu")
    assert found.device
    assert found.isa
    assert found.versions["torch"] == torch.__version__
    assert found.versions.keys() >= {"python", "triton", "transformers"}


def test_verdict_needs_a_difference_beyond_the_scatter() -> None:
    def outcome(ours: float, other: float, scatter: float) -> str:
        timings = (Timing(median, median - scatter, median + scatter, 9) for median in (ours, other))
        return verdict(other / ours, *timings)

    assert outcome(1.0, 1.5, 0.01) == "faster"
    assert outcome(1.5, 1.0, 0.01) == "slower"
    assert outcome(1.05, 1.0, 0.1) == "even"
    assert outcome(1.05, 1.0, 0.001) == "slower"
    assert outcome(2.0, 1.0, 1.5) == "slower"


# The commands


def module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m benchmarks``, from the checkout alone and on one thread: others may use the machine too."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given |= {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)


def test_the_benchmark_runs_from_the_checkout(tmp_path: Path) -> None:
    done = module("--quick", "--only", "fp32", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path)
    cases = {row.case for row in found.of(AttentionRow)}
    assert cases == {case.name for case in selected(Options("cpu", quick=True, pattern="fp32"))}
    assert {row.status for row in found.of(AttentionRow) if row.is_ours} == {"ok"}
    assert "Attention, 1 thread" in done.stdout
    assert {"report.md", "report.html", rows.FILE_NAME} <= {path.name for path in tmp_path.iterdir()}
    assert command_line.main(["report", str(tmp_path)]) == 0


def test_a_pattern_that_finds_nothing_is_an_error() -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["--only", "no such case"])
    assert stopped.value.code == 2


def gpu_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True)


def test_gpu_script_runs_dry_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    done = gpu_script(str(tmp_path), "--dry-run")
    summary = (tmp_path / "summary.md").read_text()
    assert done.returncode == 0, summary
    for stage in ("build", "tests", "sanitizer", "numerics", "bench", "cuda", "full"):
        assert f"| {stage} | 0 |" in summary
    assert read(tmp_path / "bench").of(AttentionRow)
    assert read(tmp_path / "numerics").of(NumericsRow)
    again = gpu_script(str(tmp_path), "--dry-run")
    assert again.returncode == 0
    assert again.stdout.count("passed before") == 7


def test_gpu_script_goes_on_after_a_failure_and_reports_it(tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho it broke\nexit 3\n")
    failing.chmod(0o755)
    done = gpu_script(str(tmp_path / "out"), "--dry-run", "build", "bench", PYTHON=str(failing))
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| build | 3 |" in summary
    assert "| bench | 3 |" in summary
    assert "| tests | not run |" in summary
    assert "it broke" in summary


@pytest.mark.parametrize("arguments", [[], ["--nonsense", "folder"], ["folder", "no-such-stage"]])
def test_gpu_script_refuses_bad_arguments(arguments: list[str], tmp_path: Path) -> None:
    done = gpu_script(*arguments)
    assert done.returncode == 2
    assert "gpu.sh FOLDER" in done.stderr
