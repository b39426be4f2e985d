"""The attention cases, declared once: ``run``, the pytest-benchmark suite and the tests all read them from here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from tests.cases import Case, Inputs, make_inputs

from .options import Options

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIRECTIONS = ("forward", "backward", "forward+backward")
EVERYWHERE = ("cpu", "cuda")
LONG_WORK = 3e9  # multiplications; what takes more is left to a run of everything


@dataclass(frozen=True)
class AttentionCase:
    """One workload: a problem of ``fusedformer.functional.attention``, the dtype, and what of it is timed.

    Attributes:
        dtype: a key of ``DTYPES``.
        heads_kv: None for as many as ``heads``.
        len_k: None for ``len_q``.
        direction: one of ``DIRECTIONS``; "backward" is timed alone, the forward has run before.
        key_padding: a bool key mask; every second batch row is half empty.
        mask: "" for none, else as ``tests.cases.Case.mask``. A float one gets a gradient.
        is_decode: key and value are caches, read by ``attention_with_kvcache``.
        floor: the least ratio of the time of torch's SDPA to ours; None where it is only reported.
        read_floor: the least share of what the machine reads of so large a working set.
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
    is_decode: bool = False
    floor: float | None = None
    read_floor: float | None = None
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
            "decode": self.is_decode,
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
        """The problem as the tests declare theirs, less padding, laid out as a layer's projections leave it."""
        return Case(
            "benchmark",
            self.batch,
            self.heads,
            self.heads_kv,
            self.len_q,
            self.len_k,
            self.head_dim,
            is_causal=self.is_causal,
            mask=self.mask,
            dropout_p=self.dropout_p,
            layout="contiguous" if self.is_decode else "BLHE",
        )

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        inputs = make_inputs(self.problem, DTYPES[self.dtype], device, seed)
        if self.key_padding:
            len_k = inputs.key.size(2)
            lengths = torch.full((self.batch, 1), len_k)
            lengths[1::2] = len_k // 2
            inputs.options["key_mask"] = (torch.arange(len_k) < lengths).to(device)
        return inputs


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


def operand_bytes(inputs: Inputs) -> int:
    """Of query, key, value and masks: the working set of a forward."""
    return sum(map(_size, _operands(inputs)))


def moved_bytes(inputs: Inputs, direction: str) -> int:
    """What must cross memory at least: every operand read once, every result written once.

    Forward reads query, key, value and masks and writes the output; backward reads those, the output and its gradient,
    and writes the gradients of query, key, value and a float mask.
    """
    read, output = operand_bytes(inputs), _size(inputs.grad_out)
    gradients = sum(_size(x) for x in _operands(inputs) if x.is_floating_point())
    forward, backward = read + output, read + 2 * output + gradients
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]


def _operands(inputs: Inputs) -> list[Tensor]:
    masks = [inputs.options[name] for name in ("attn_mask", "key_mask") if name in inputs.options]
    return [inputs.query, inputs.key, inputs.value, *masks]


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def selected(options: Options) -> list[AttentionCase]:
    """The cases that a run measures."""
    cases = [case for case in (MINIATURES if options.quick else ATTENTION) if options.device_type in case.devices]
    if options.floors:
        cases = [case for case in cases if case.floor is not None]
    elif not options.full:
        cases = [case for case in cases if not case.full]
    return [case for case in cases if re.search(options.pattern, case.name)]


SHORT, LONG = (128, 256, 512), (1024, 2048, 4096)
ODD_HEAD_DIMS = (32, 40, 80, 96, 256)


def _cpu() -> Iterator[AttentionCase]:
    """What the native kernels must reach against torch's SDPA on a machine with AMX, point by point; then the rest."""

    def points(case: AttentionCase, floor: dict[int, float], lengths: Iterable[int]) -> Iterator[AttentionCase]:
        """One for each head dim, which ``floor`` goes by, and length."""
        for head_dim, length in product(floor, lengths):
            yield replace(case, head_dim=head_dim, len_q=length, floor=floor[head_dim])

    bf16 = AttentionCase("bf16", 1, 8, 128, 64)
    fp32, fp16 = replace(bf16, dtype="fp32"), replace(bf16, dtype="fp16")

    def causal(case: AttentionCase) -> AttentionCase:
        return replace(case, is_causal=True)

    def training(case: AttentionCase) -> AttentionCase:
        return replace(case, is_causal=True, direction="forward+backward")

    yield from points(bf16, {64: 2.8, 128: 2.0}, (*SHORT, *LONG))
    yield from points(causal(bf16), {64: 3.5, 128: 2.5}, SHORT)
    yield from points(causal(bf16), {64: 3.2, 128: 2.3}, LONG)
    yield from points(replace(bf16, batch=4, key_padding=True), {64: 2.5, 128: 2.5}, (128, 512, 2048))
    yield from points(training(bf16), {64: 4.0, 128: 4.0}, SHORT)
    yield from points(training(bf16), {64: 2.5, 128: 2.5}, (2048,))
    yield from points(causal(fp32), {64: 2.0, 128: 2.0}, SHORT)
    yield from points(fp32, {64: 1.8, 128: 1.8}, LONG)
    yield from points(training(fp32), {64: 1.8, 128: 1.8}, (512, 2048))
    for case in (fp16, causal(fp16)):
        yield from points(case, {64: 2.5, 128: 2.5}, (512, *LONG))
    for batch in (1, 8):  # one new token over a cache
        yield AttentionCase(
            "bf16", batch, 32, 1, 128, heads_kv=8, len_k=4096, is_decode=True, floor=2.6, read_floor=0.8
        )
    odd = dict.fromkeys(ODD_HEAD_DIMS, 1.2)
    for case in (bf16, fp32, replace(fp16, full=True)):
        yield from points(case, odd, (512,))
        yield from points(causal(case), {64: 1.2}, (127, 333, 1023))
        yield from points(replace(training(case), full=True), odd, (333,))
    for case in (bf16, fp32, replace(fp16, full=True)):  # too small to compute much: what a call costs
        yield from points(case, {64: 0.8}, (1, 2, 4, 8, 16))
        for length in (2, 4, 16):  # of one key alone the gradients of query and key are 0, and any rounding is wrong
            yield replace(case, len_q=length, direction="forward+backward")

    for case in (bf16, fp32, fp16):  # only reported, and only when everything is
        case = replace(case, full=True)
        yield from (replace(case, len_q=length, is_causal=True, direction="backward") for length in (128, 512, 1024))
        yield replace(case, batch=2, len_q=256, direction="forward+backward", mask="float 1HLS")
        yield replace(case, batch=2, len_q=256, direction="forward+backward", dropout_p=0.1)
        yield replace(case, batch=16, heads=12, head_dim=32, key_padding=True)  # an encoder's batch
        yield replace(case, batch=4, len_q=256, is_causal=True, key_padding=True)  # a decoder's
        yield AttentionCase(case.dtype, 1, 32, 1, 128, heads_kv=4, len_k=1024, is_decode=True, full=True)


def _takes_long(case: AttentionCase) -> bool:
    """On a CPU, and longest where torch has only emulated instructions for the dtype."""
    forward = case.batch * case.heads * case.len_q * (case.len_k or case.len_q) * case.head_dim
    return forward * {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[case.direction] > LONG_WORK


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
    for batch in (1, 8, 64):
        yield AttentionCase("bf16", batch, 32, 1, 128, heads_kv=8, len_k=8192, is_decode=True)
    yield AttentionCase("bf16", 64, 12, 128, 32, key_padding=True)
    yield AttentionCase("bf16", 1, 8, 64, 64)


MINIATURES = (
    AttentionCase("fp32", 2, 4, 33, 16, is_causal=True, key_padding=True, floor=1.0),
    AttentionCase("bf16", 1, 4, 17, 16, heads_kv=2, direction="forward+backward"),
    AttentionCase("fp16", 1, 2, 16, 8, mask="float 1HLS", direction="backward"),
    AttentionCase("fp32", 1, 2, 16, 8, dropout_p=0.1, direction="forward+backward"),
    AttentionCase("bf16", 2, 4, 1, 16, heads_kv=2, len_k=33, is_decode=True, floor=1.0, read_floor=0.1),
)
ATTENTION = (
    *(replace(case, devices=("cpu",), full=case.full or _takes_long(case)) for case in _cpu()),
    *(replace(case, devices=("cuda",)) for case in _gpu()),
)
