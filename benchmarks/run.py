"""The benchmark: what it found, the machine's ceilings, then every case - right first, then fast - and the main job."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

import fusedformer
from fusedformer.kernels.common import native
from fusedformer.kernels.common.backend import AUTO

from . import cases, layer_cases, minilm, model_cases, report
from .attention import attention_rows
from .case_tables import attention_tables, floors_table, layer_tables, transformer_tables
from .ceilings import measure_ceilings
from .layers import layer_rows
from .machine import default_folder, find_machine
from .models import transformer_rows
from .options import Options
from .rows import AttentionRow, LayerRow, ModelRow, OurRow, TransformerRow, Writer, read
from .tables import ceilings_table, machine_table, model_table
from .terminal import Terminal
from .timing import threads_set_to


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; 1 if a result of ours was wrong or failed to come. What loses is shown, no error."""
    others = "other commands, each with --help: python -m benchmarks numerics | report | inspect | features"
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog=others)
    parser.add_argument("--full", action="store_true", help="every case, more samples, compiled peers")
    parser.add_argument("--quick", action="store_true", help="a miniature of everything that shows only that it works")
    parser.add_argument("--floors", action="store_true", help="every case that has a ratio to reach, and no other")
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="the cases whose name this regular expression finds"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="for results.jsonl and the report")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default=AUTO, help="that ours runs on; the one that auto picks where not given")
    parser.add_argument("--level", default="", help="the instruction set that the native CPU kernels use")
    given = parser.parse_args(arguments)
    level = native.use_level(given.level) if given.level else nullcontext()
    with fusedformer.use_backend(given.backend), level:
        return _run(parser, given)


def _run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    options = Options(given.device, given.full, given.quick, given.floors, given.only)
    attention_cases, of_layers, of_models = (each.selected(options) for each in (cases, layer_cases, model_cases))
    wants_model = re.search(options.pattern, minilm.MODEL) is not None
    if not attention_cases and not of_layers and not of_models and not wants_model:
        parser.error(f"--only {given.only}: no case has such a name")

    terminal = Terminal()
    machine = find_machine(options.device_type)
    folder = given.out or default_folder(machine)
    writer = Writer(folder, machine)
    terminal.show(machine_table(machine))
    terminal.say(str(fusedformer.backends()))
    missing = minilm.missing()
    runs_model = wants_model and missing is None

    count = len(attention_cases) + len(of_layers) + len(of_models)
    steps = len(options.threads) + count + (minilm.steps(options) if runs_model else 0)
    with terminal.progress(steps) as step:
        ceilings = []
        for threads in options.threads:
            step(f"ceilings, threads: {threads}")
            with threads_set_to(threads):
                ceilings.append(measure_ceilings(options.device_type, options.quick))
            writer.write(ceilings[-1])
        terminal.show(ceilings_table(ceilings))
        attention: list[AttentionRow] = []
        for case in attention_cases:
            step(case.name)
            attention += writer.write_all(attention_rows(case, options, ceilings))
        for table in (*attention_tables(attention), floors_table(attention)):
            if table.rows:
                terminal.show(table)
        layers: list[LayerRow] = []
        for layer_case in of_layers:
            step(layer_case.name)
            layers += writer.write_all(layer_rows(layer_case, options, ceilings))
        for table in (*layer_tables(layers), floors_table(layers)):
            if table.rows:
                terminal.show(table)
        transformers: list[TransformerRow] = []
        for model_case in of_models:
            step(model_case.name)
            transformers += writer.write_all(transformer_rows(model_case, options, ceilings))
        for table in transformer_tables(transformers):
            terminal.show(table)
        model: list[ModelRow] = []
        if runs_model:
            model += writer.write_all(minilm.model_rows(options, ceilings, step))
            terminal.show(model_table(model))

    if wants_model and missing is not None:
        terminal.say(f"The main job was not run: {missing}", "bad")
    everything: list[OurRow] = [*attention, *layers, *transformers, *model]
    absent = [row for row in everything if row.is_ours and row.status != "ok"]
    for row in absent:
        terminal.say(f"{row.status.upper()} {row.title}: {row.reason}", "bad")
    for line in report.write(read(folder), folder):
        terminal.say(line)
    return int(any(row.status != "not run" for row in absent))
