"""Whole layers and models, declared once: ``run`` and the tests read them from here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .cases import EVERYWHERE
from .generation_workloads import DecodingStep, Generation
from .options import Options
from .timing import stopwatch_for
from .workloads import LayerStep, Seq2SeqStep, Workload


@dataclass(frozen=True)
class ModelCase:
    """One workload in one dtype, and what it must reach.

    Attributes:
        dtype: a key of ``DTYPES``.
        floor: the least ratio of the fastest peer's time to ours; None where it is only reported.
        read_floor: the least share of what the machine reads of so large a working set.
        peak_most: what ours may take at its peak, as a share of the stock equal's; None where memory is not measured.
        devices: the device types it is meant for.
        full: it runs only when everything is asked for.
    """

    workload: Workload
    dtype: str
    floor: float | None = None
    read_floor: float | None = None
    peak_most: float | None = None
    devices: tuple[str, ...] = EVERYWHERE
    full: bool = False

    @property
    def name(self) -> str:
        return f"{self.workload.name}-{self.dtype}"

    @property
    def asks_for_something(self) -> bool:
        return not (self.floor is self.read_floor is self.peak_most is None)

    def seconds(self, device: str) -> float:
        """How long a call of the stock equal takes, about. A CPU may lack the instructions of a half type."""
        few = self.workload.few()
        call = few.prepare(self.dtype, device).calls[few.peers[-1]]
        stopwatch = stopwatch_for(device)
        stopwatch(call, 1)  # which also pays for memory and an optimizer's state
        return stopwatch(call, 1) * self.workload.tokens / few.tokens


def selected(options: Options) -> list[ModelCase]:
    """The cases that a run measures."""
    cases = [case for case in (MINIATURES if options.quick else MODELS) if options.device_type in case.devices]
    if options.floors:
        cases = [case for case in cases if case.asks_for_something]
    elif not options.full:
        cases = [case for case in cases if not case.full]
    return [case for case in cases if re.search(options.pattern, case.name)]


def _cpu() -> Iterator[ModelCase]:
    """What must be reached on one thread; what takes the stock equal long is for a full run."""
    for kind in ("encoder", "decoder"):
        yield ModelCase(LayerStep(kind, 8, 256), "fp32", floor=1.5)
        yield ModelCase(LayerStep(kind, 8, 256), "bf16", floor=1.5, full=True)
        yield ModelCase(LayerStep(kind, 8, 512), "fp32", peak_most=0.6, full=True)
    yield ModelCase(Seq2SeqStep("base", 8, 128), "fp32", full=True)
    yield ModelCase(Seq2SeqStep("base", 8, 128), "bf16", floor=1.3, full=True)
    for dtype in ("fp32", "bf16"):
        yield ModelCase(DecodingStep("base", 1, 128), dtype, read_floor=0.7 if dtype == "bf16" else None)
        for batch in (1, 16):
            yield ModelCase(Generation("gpt2", "ours", batch, 16, 64), dtype, floor=1.3, full=True)
        yield ModelCase(Generation("smollm2", "ours", 1, 256, 128), dtype, floor=1.5, full=True)
        yield ModelCase(Generation("smollm2", "fused", 1, 256, 128), dtype, floor=1.15, full=True)


def _gpu() -> Iterator[ModelCase]:
    for size in ("base", "big"):
        yield ModelCase(Seq2SeqStep(size, 64, 128), "bf16", peak_most=0.6)
        yield ModelCase(DecodingStep(size, 1, 128), "bf16")
    for kind in ("encoder", "decoder"):
        yield ModelCase(LayerStep(kind, 32, 512), "bf16", peak_most=0.6)
    yield ModelCase(Generation("gpt2", "ours", 16, 16, 64), "bf16")


TINY = (("d_model", 16), ("nhead", 2), ("num_encoder_layers", 1), ("num_decoder_layers", 1), ("dim_feedforward", 24))
MINIATURES = (
    ModelCase(LayerStep("encoder", 2, 9, 16, 2, 24), "fp32", floor=1.0, peak_most=1.0),
    ModelCase(LayerStep("decoder", 2, 9, 16, 2, 24), "bf16"),
    ModelCase(Seq2SeqStep("base", 2, 9, 97, TINY), "fp32"),
    ModelCase(DecodingStep("base", 1, 9, 97, TINY), "fp32", read_floor=0.1),
)
MODELS = (
    *(replace(case, devices=("cpu",)) for case in _cpu()),
    *(replace(case, devices=("cuda",)) for case in _gpu()),
)
