"""The memory a call needs beyond what was there before it, and what it leaves for the backward."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .timing import Call


def peak_bytes(call: Call, device_type: str) -> int:
    """The most bytes that torch's allocator held at one moment of ``call``, above what it held before.

    On a GPU from the allocator's own high-water mark; on the CPU from every allocation and release that torch's
    profiler saw. Scratch memory that a library takes past torch's allocator is in neither.
    """
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: float(e["ts"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def kept_bytes(call: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """What autograd keeps for the backward of ``call``'s result beyond what is ``given``, which is there anyway."""
    there = {x.untyped_storage().data_ptr() for x in given}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = call()
    del out
    return sum(kept.values())
