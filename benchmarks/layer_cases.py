"""The feed-forward and norm cases, declared once: ``run`` and the tests read them from here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fusedformer import functional as F
from fusedformer.kernels.common import philox
from tests.kernels.feed_forward.cases import KINK
from tests.kernels.feed_forward.eager import eager_feed_forward

from .cases import DTYPES, EVERYWHERE
from .options import Options

DIRECTIONS = ("forward", "forward+backward")
FEED_FORWARD, LAYER_NORM = "feed_forward", "dropout_add_layer_norm"
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class LayerInputs:
    """The arguments of one call by name, and the gradient to send back through its result."""

    tensors: dict[str, Tensor]
    grad_out: Tensor
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> LayerInputs:
        """The same numbers in another floating dtype."""
        return LayerInputs(
            {name: x.to(dtype) for name, x in self.tensors.items()}, self.grad_out.to(dtype), self.options
        )

    def leaves(self) -> LayerInputs:
        """The same numbers, each tensor a leaf that requires a gradient."""
        return replace(self, tensors={name: x.detach().requires_grad_() for name, x in self.tensors.items()})

    def without_seed(self) -> LayerInputs:
        return replace(self, options={name: x for name, x in self.options.items() if name != "seed"})


@dataclass(frozen=True)
class LayerCase:
    """One workload: the feed-forward network, or dropout + residual + norm, of ``tokens`` rows of ``d_model`` numbers.

    Attributes:
        operation: ``FEED_FORWARD`` or ``LAYER_NORM``, a function of ``fusedformer.functional``.
        dtype: a key of ``DTYPES``.
        d_ff, activation, gated, recompute: of the feed-forward network.
        direction: one of ``DIRECTIONS``.
        floor: the least ratio of the time of the faster of eager and compiled torch to ours; None where only reported.
        read_floor: the least share of what the machine reads of so large a working set.
        kept_most: what ours may keep for the backward, as a share of what eager keeps.
        devices: the device types it is meant for.
        full: it runs only when everything is asked for.
    """

    operation: str
    dtype: str
    tokens: int
    d_model: int
    d_ff: int = 0
    activation: str = ""
    gated: bool = False
    direction: str = "forward"
    dropout_p: float = 0.0
    recompute: bool = False
    floor: float | None = None
    read_floor: float | None = None
    kept_most: float | None = None
    devices: tuple[str, ...] = EVERYWHERE
    full: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("operation", (FEED_FORWARD, LAYER_NORM)),
            ("dtype", tuple(DTYPES)),
            ("direction", DIRECTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}")

    @property
    def width(self) -> str:
        return f"{self.d_model}/{self.d_ff}" if self.d_ff else f"{self.d_model}"

    @property
    def features(self) -> str:
        said = (self.activation, "gated" * self.gated, "dropout" * bool(self.dropout_p), "recompute" * self.recompute)
        return "+".join(filter(None, said))

    @property
    def name(self) -> str:
        sizes = f"T{self.tokens}-d{self.width}"
        return "-".join(filter(None, (self.operation, self.dtype, self.direction, self.features, sizes)))

    @property
    def family(self) -> str:
        """What it shares with the cases of the same sweep, which differ in the number of tokens alone."""
        return f"{self.operation}, {self.dtype} {self.direction}, {self.features}, d {self.width}"

    @property
    def ours(self) -> Function:
        """The function of the library, looked up when it is asked for."""
        function: Function = getattr(F, self.operation)
        return function

    @property
    def plain(self) -> Function:
        """The same in plain torch operations, with torch's own dropout."""
        return _plain_feed_forward if self.operation == FEED_FORWARD else _plain_layer_norm

    def eager(self, attempt: int = 0) -> Function:
        """The same step by step with the dropout mask of the seed, its sums in another order in another attempt."""
        if self.operation == FEED_FORWARD:
            return partial(eager_feed_forward, attempt=attempt)
        return partial(_seeded_layer_norm, attempt=attempt)

    def inputs(self, device: str, seed: int = 0) -> LayerInputs:
        """Random numbers of order 1. No pre-activation is so near to 0 that rounding decides the derivative of ReLU."""
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[self.dtype]

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        shape = (self.tokens, self.d_model)
        tensors = {"input": normal(*shape)}
        options: dict[str, Any] = {}
        if self.operation == LAYER_NORM:
            tensors |= {"residual": normal(*shape), "weight": normal(self.d_model), "bias": normal(self.d_model)}
        else:
            scale1, scale2 = self.d_model**-0.5, self.d_ff**-0.5
            tensors["weight1"] = normal(self.d_ff, self.d_model, scale=scale1)
            tensors["weight2"] = normal(self.d_model, self.d_ff, scale=scale2)
            if self.gated:
                tensors["gate_weight"] = normal(self.d_ff, self.d_model, scale=scale1)
            else:
                tensors |= {"bias1": normal(self.d_ff), "bias2": normal(self.d_model)}
            options = {"activation": self.activation} | ({"recompute": True} if self.recompute else {})
        if self.activation == "relu" and self.direction != "forward":
            weight, bias = tensors["weight1"].double().mT, tensors["bias1"].double()
            while (near := (tensors["input"].double() @ weight + bias).abs().amin(dim=1) < KINK).any():
                tensors["input"][near] = normal(int(near.sum()), self.d_model)
        if self.dropout_p:
            options |= {"dropout_p": self.dropout_p, "seed": torch.randint(0, 1 << 32, (2,), generator=generator)}
        grad_out = normal(*shape).to(device)
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
        return LayerInputs({name: x.to(device) for name, x in tensors.items()}, grad_out, options)

    @property
    def flops(self) -> float:
        """Of the products, backward twice those of forward; a norm has none: about 10 operations an element."""
        products = 2 * self.tokens * self.d_model * self.d_ff * (3 if self.gated else 2)
        forward = products or 10 * self.tokens * self.d_model
        return float(forward * (1 if self.direction == "forward" else 3))

    def moved_bytes(self, inputs: LayerInputs) -> int:
        """What must cross memory at least.

        Forward reads its inputs and writes the output; backward reads those and the output's gradient, and writes a
        gradient for each input.
        """
        read = sum(x.numel() * x.element_size() for x in inputs.tensors.values())
        out = inputs.grad_out.numel() * inputs.grad_out.element_size()
        return read + out if self.direction == "forward" else 3 * read + 2 * out


def _plain_feed_forward(
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    activation: str,
    gate_weight: Tensor | None = None,
    dropout_p: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    linear, act = torch.nn.functional.linear, _ACTIVATIONS[activation]
    hidden = linear(input, weight1, bias1)
    hidden = act(hidden) if gate_weight is None else act(linear(input, gate_weight)) * hidden
    return linear(torch.dropout(hidden, dropout_p, train=dropout_p > 0.0), weight2, bias2)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def _plain_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    total = residual + torch.dropout(input, dropout_p, train=dropout_p > 0.0)
    return torch.nn.functional.layer_norm(total, (input.size(-1),), weight, bias)


def _seeded_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    attempt: int = 0,
) -> Tensor:
    if seed is not None:
        keep = philox.keep_mask(seed, 1, input.size(0), input.size(1), dropout_p, philox.STREAM_RESIDUAL)[0]
        input = input * keep * philox.keep_scale(dropout_p)
    size = input.size(-1)
    order = torch.randperm(size, device=input.device) if attempt else torch.arange(size, device=input.device)
    total = (residual + input)[:, order]
    return torch.nn.functional.layer_norm(total, (size,), weight[order], bias[order])[:, order.argsort()]


def selected(options: Options) -> list[LayerCase]:
    """The cases that a run measures."""
    cases = [case for case in (MINIATURES if options.quick else LAYERS) if options.device_type in case.devices]
    if options.floors:
        cases = [case for case in cases if case.floor is not None]
    elif not options.full:
        cases = [case for case in cases if not case.full]
    return [case for case in cases if re.search(options.pattern, case.name)]


WIDTHS = ((512, 2048), (1024, 4096))
TOKENS = (128, 512, 2048)


def _cpu() -> Iterator[LayerCase]:
    """What the native kernels must reach on a machine with AMX, point by point; then the rest."""
    plain = LayerCase(FEED_FORWARD, "fp32", 128, 512, 2048, "relu")
    training = replace(plain, direction="forward+backward")
    for case, of in ((plain, {"bf16": 1.3, "fp32": 1.6}), (training, {"bf16": 1.3, "fp32": 1.4})):
        for (dtype, floor), (d_model, d_ff), activation in product(of.items(), WIDTHS, ("relu", "gelu")):
            for tokens in TOKENS:
                full = d_model * tokens > 512 * 512 or (case is training and tokens > 128)
                yield replace(
                    case, dtype=dtype, tokens=tokens, d_model=d_model, d_ff=d_ff, activation=activation, floor=floor,
                    full=full,
                )  # fmt: skip
    for tokens in TOKENS:
        tanh = replace(plain, dtype="bf16", d_model=256, d_ff=1024, activation="gelu_tanh")
        yield replace(tanh, tokens=tokens, floor=2.0)
    for dtype, (d_model, d_ff) in product(("bf16", "fp32"), WIDTHS):  # one token reads every weight once
        yield replace(plain, dtype=dtype, tokens=1, d_model=d_model, d_ff=d_ff, floor=0.95, read_floor=0.8)
    for dtype in ("bf16", "fp32"):
        dropped = replace(training, dtype=dtype, tokens=512, dropout_p=0.1, activation="gelu")
        yield replace(dropped, floor=1.0, kept_most=0.5)
        yield replace(dropped, floor=1.0, kept_most=0.2, recompute=True)
        norm = LayerCase(LAYER_NORM, dtype, 2048, 512, direction="forward+backward", dropout_p=0.1)
        yield replace(norm, floor=2.0)
        yield replace(norm, d_model=1024, floor=2.0)
        yield replace(norm, dropout_p=0.0)
        yield replace(norm, direction="forward", dropout_p=0.0)
        yield replace(plain, dtype=dtype, tokens=512, activation="silu", gated=True)
        yield replace(training, dtype=dtype, tokens=512, activation="silu", gated=True, full=True)
    yield replace(plain, dtype="fp16", tokens=512, activation="gelu", full=True)


def _gpu() -> Iterator[LayerCase]:
    for (d_model, d_ff), activation in product(((1024, 4096), (4096, 16384)), ("relu", "gelu")):
        yield LayerCase(FEED_FORWARD, "bf16", 8192, d_model, d_ff, activation, direction="forward+backward")
    yield LayerCase(FEED_FORWARD, "bf16", 8192, 1024, 4096, "silu", gated=True, direction="forward+backward")
    yield LayerCase(FEED_FORWARD, "bf16", 8192, 1024, 4096, "gelu", direction="forward+backward", dropout_p=0.1)
    yield LayerCase(LAYER_NORM, "bf16", 8192, 1024, direction="forward+backward", dropout_p=0.1)


MINIATURES = (
    LayerCase(FEED_FORWARD, "fp32", 17, 16, 40, "relu", direction="forward+backward", floor=1.0),
    LayerCase(FEED_FORWARD, "bf16", 1, 16, 40, "gelu", floor=1.0, read_floor=0.1),
    LayerCase(FEED_FORWARD, "fp32", 9, 16, 24, "silu", True, "forward+backward", dropout_p=0.1, kept_most=0.5),
    LayerCase(LAYER_NORM, "fp32", 33, 16, direction="forward+backward", dropout_p=0.1),
)  # fmt: skip
LAYERS = (
    *(replace(case, devices=("cpu",)) for case in _cpu()),
    *(replace(case, devices=("cuda",)) for case in _gpu()),
)
