"""The attention cases, declared once: ``run``, the pytest-benchmark suite and the tests all read them from here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from tests.cases import Case, Inputs, make_inputs

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIRECTIONS = ("forward", "backward", "forward+backward")
EVERYWHERE = ("cpu", "cuda")


@dataclass(frozen=True)
class AttentionCase:
    """One workload: a problem of ``fusedformer.functional.attention``, the dtype, and what of it is timed.

    Attributes:
        dtype: a key of ``DTYPES``.
        heads_kv: None for as many as ``heads``.
        len_k: None for ``len_q``.
        direction: one of ``DIRECTIONS``; "backward" is timed alone, the forward has run before.
        key_padding: a bool key mask, each batch row of its own length.
        mask: "" for none, else as ``tests.cases.Case.mask``. A float one gets a gradient.
        devices: the device types it is meant for.
        full: it runs only when everything is asked for.
    """

    dtype: str
    batch: int
    heads: int
    len_q: int
    head_dim: int
    heads_kv: int | None = None
    len_k: int | None = None
    direction: str = "forward"
    is_causal: bool = False
    key_padding: bool = False
    mask: str = ""
    dropout_p: float = 0.0
    devices: tuple[str, ...] = EVERYWHERE
    full: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {tuple(DTYPES)}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction: got {self.direction!r}, expected one of {DIRECTIONS}")
        if self.mask and self.dropout_p:
            raise ValueError("dropout_p: got one together with a mask; the correctness gate judges them apart")

    @property
    def features(self) -> str:
        present = {
            "causal": self.is_causal,
            "padding": self.key_padding,
            f"{self.mask.replace(' ', '-')}-mask": self.mask,
            "dropout": self.dropout_p,
        }
        return "+".join(name for name, is_there in present.items() if is_there) or "dense"

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" if self.heads_kv is None else f"H{self.heads}/{self.heads_kv}"
        lengths = f"N{self.len_q}" if self.len_k is None else f"L{self.len_q}-S{self.len_k}"
        return f"{self.dtype}-{self.direction}-{self.features}-B{self.batch}-{heads}-{lengths}-D{self.head_dim}"

    @property
    def family(self) -> str:
        """What it shares with the cases of the same sweep, which differ in length alone."""
        return f"{self.dtype} {self.direction}, {self.features}, head dim {self.head_dim}"

    @property
    def problem(self) -> Case:
        """The problem as the tests declare theirs, laid out as a layer's projections leave it."""
        return Case(
            "benchmark",
            self.batch,
            self.heads,
            self.heads_kv,
            self.len_q,
            self.len_k,
            self.head_dim,
            is_causal=self.is_causal,
            key_mask="bool" if self.key_padding else "",
            mask=self.mask,
            dropout_p=self.dropout_p,
            layout="BLHE",
        )

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        return make_inputs(self.problem, DTYPES[self.dtype], device, seed)


def visible_pairs(inputs: Inputs) -> int:
    """How many (query, key) pairs a kernel must compute: those that causality and padding leave, over batch and heads.

    Pairs that a full mask excludes count, since their scores are computed to be masked.
    """
    query, key, options = inputs.query, inputs.key, inputs.options
    batch, heads, len_q, _ = query.shape
    lengths = torch.full((batch, 1), key.size(2))
    if "key_mask" in options:
        lengths = options["key_mask"].sum(dim=1, keepdim=True).cpu()  # padding is at the end
    seen = lengths.expand(batch, len_q)
    if options.get("is_causal"):
        seen = torch.minimum(seen, torch.arange(1, len_q + 1))
    return heads * int(seen.sum())


def flops(inputs: Inputs, direction: str) -> float:
    """4 E for each visible pair forward (two products), 2.5 times that backward (five products)."""
    forward = 2.0 * (inputs.query.size(-1) + inputs.value.size(-1)) * visible_pairs(inputs)
    return forward * {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[direction]


def moved_bytes(inputs: Inputs, direction: str) -> int:
    """What must cross memory at least: every operand read once, every result written once.

    Forward reads query, key, value and masks and writes the output; backward reads those, the output and its gradient,
    and writes the gradients of query, key, value and a float mask.
    """

    def size(x: Tensor) -> int:
        return x.numel() * x.element_size()

    operands = [inputs.query, inputs.key, inputs.value]
    masks = [inputs.options[name] for name in ("attn_mask", "key_mask") if name in inputs.options]
    read = sum(map(size, [*operands, *masks]))
    output = size(inputs.grad_out)
    gradients = sum(map(size, [*operands, *(mask for mask in masks if mask.is_floating_point())]))
    forward, backward = read + output, read + 2 * output + gradients
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]


def selected(device_type: str, full: bool, pattern: str = "", quick: bool = False) -> list[AttentionCase]:
    """The cases for this device whose name the expression ``pattern`` finds; ``quick``: miniature ones instead."""
    cases = MINIATURES if quick else ATTENTION
    chosen = [case for case in cases if device_type in case.devices and (full or not case.full)]
    return [case for case in chosen if re.search(pattern, case.name)]


def _cpu() -> Iterator[AttentionCase]:
    sweep = product(DTYPES, (64, 128), (False, True), (128, 256, 512, 1024, 2048, 4096))
    default = {
        ("fp32", 64, False, 128),
        ("fp32", 64, False, 512),
        ("fp32", 64, True, 512),
        ("fp32", 128, True, 1024),
        ("bf16", 64, True, 128),
        ("bf16", 64, False, 512),
        ("bf16", 64, True, 512),
        ("fp16", 64, True, 512),
    }
    for dtype, head_dim, is_causal, length in sweep:
        full = (dtype, head_dim, is_causal, length) not in default
        yield AttentionCase(dtype, 1, 8, length, head_dim, is_causal=is_causal, full=full)
    for dtype, length, direction in product(DTYPES, (128, 512, 1024), ("forward+backward", "backward")):
        full = dtype == "fp16" or length != 128 or direction == "backward"
        yield AttentionCase(dtype, 1, 8, length, 64, direction=direction, is_causal=True, full=full)
    for dtype in DTYPES:
        full = dtype != "fp32"
        yield AttentionCase(dtype, 16, 12, 128, 32, key_padding=True, full=full)  # an encoder's batch
        yield AttentionCase(dtype, 4, 8, 256, 64, is_causal=True, key_padding=True, full=True)  # a decoder's
        yield AttentionCase(dtype, 1, 8, 256, 80, full=full)
        yield AttentionCase(dtype, 1, 8, 255, 40, is_causal=True, full=True)
        yield AttentionCase(dtype, 1, 2, 8, 32, full=full)  # too small to compute much: what a call costs
        yield AttentionCase(dtype, 2, 8, 256, 64, direction="forward+backward", mask="float 1HLS", full=True)
        # One new token over a cache, four query heads on each key head, and eight.
        yield AttentionCase(dtype, 1, 32, 1, 128, heads_kv=8, len_k=4096, full=dtype != "bf16")
        yield AttentionCase(dtype, 1, 32, 1, 128, heads_kv=4, len_k=1024, full=True)


def _gpu() -> Iterator[AttentionCase]:
    # 16k tokens and a width of 2048 throughout, as published figures have it: the sweep is over the length alone.
    sweep = product(("forward", "backward"), (64, 128), (False, True), (512, 1024, 2048, 4096, 8192, 16384))
    for direction, head_dim, is_causal, length in sweep:
        batch, heads, full = 16384 // length, 2048 // head_dim, length not in (512, 2048, 8192)
        yield AttentionCase("bf16", batch, heads, length, head_dim, direction=direction, is_causal=is_causal, full=full)
    for direction in ("forward", "backward"):
        plain = AttentionCase("bf16", 8, 16, 2048, 64, direction=direction)
        yield replace(plain, is_causal=True, key_padding=True, dropout_p=0.1)
        yield replace(plain, mask="float 1HLS")
        yield replace(plain, dtype="fp16", is_causal=True)
        yield replace(plain, key_padding=True, full=True)
        yield replace(plain, dtype="fp32", is_causal=True, full=True)
        yield replace(plain, heads=8, head_dim=256, is_causal=True, full=True)
        yield replace(plain, head_dim=80, is_causal=True, full=True)
    yield AttentionCase("bf16", 1, 64, 4096, 128, heads_kv=8, is_causal=True)
    yield AttentionCase("bf16", 8, 32, 1, 128, heads_kv=8, len_k=8192)
    yield AttentionCase("bf16", 64, 12, 128, 32, key_padding=True)
    yield AttentionCase("bf16", 1, 8, 64, 64)


MINIATURES = (
    AttentionCase("fp32", 2, 4, 33, 16, is_causal=True, key_padding=True),
    AttentionCase("bf16", 1, 4, 17, 16, heads_kv=2, direction="forward+backward"),
    AttentionCase("fp16", 1, 2, 16, 8, mask="float 1HLS", direction="backward"),
    AttentionCase("fp32", 1, 2, 16, 8, dropout_p=0.1, direction="forward+backward"),
)
ATTENTION = (
    *(replace(case, devices=("cpu",)) for case in _cpu()),
    *(replace(case, devices=("cuda",)) for case in _gpu()),
)
