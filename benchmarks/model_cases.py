"""Whole layers and models, declared once: ``run`` and the tests read them from here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedformer import nn

from .cases import DTYPES, EVERYWHERE
from .options import Options
from .peers import Results
from .rows import OURS
from .timing import Call, stopwatch_for

TORCH_NN = "torch.nn"
FEW = 16  # by which a workload is divided to see how long it would take


@dataclass(frozen=True)
class Prepared:
    """A workload made ready: what to call of each peer, ours first; and the bytes that one call must read."""

    calls: dict[str, Call]
    read_bytes: int = 0


class Workload(Protocol):
    """What a case computes.

    Attributes:
        name: of the workload, whatever the dtype.
        direction: "training step", "decoding step" or "generation".
        peers: ours first, then what it is compared with.
        tokens: of one call.
        flops: of the products in one call.
    """

    @property
    def name(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def peers(self) -> tuple[str, ...]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def flops(self) -> float: ...

    def missing(self) -> str | None:
        """What keeps it from running, and what to do about it."""
        ...

    def few(self) -> Workload:
        """The same of about a ``FEW``-th of the tokens."""
        ...

    def prepare(self, dtype: str, device: str) -> Prepared: ...

    def ours(self, dtype: str, device: str) -> Results:
        """What ours computes, of few tokens and without dropout."""
        ...

    def expected(self, dtype: str, device: str) -> tuple[Results, list[Results]]:
        """The same in float64, and by the stock equal in the dtype, a few times over where that varies."""
        ...


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

    def seconds(self, device: str) -> float:
        """How long a call of the stock equal takes, about. A CPU may lack the instructions of a half type."""
        few = self.workload.few()
        call = few.prepare(self.dtype, device).calls[few.peers[-1]]
        return stopwatch_for(device)(call, 1) * self.workload.tokens / few.tokens


@dataclass(frozen=True)
class LayerStep:
    """A training step of one encoder or decoder layer: forward, and the gradient of every parameter and input.

    A quarter of the batch's keys are padding, a decoder layer is causal besides, dropout is 0.1.
    """

    kind: str
    batch: int
    length: int
    d_model: int = 512
    heads: int = 8
    dim_feedforward: int = 2048
    direction: str = field(default="training step", init=False)
    peers: tuple[str, ...] = field(default=(OURS, TORCH_NN), init=False)

    @property
    def name(self) -> str:
        return f"{self.kind}_layer-{self.direction.replace(' ', '_')}-B{self.batch}-L{self.length}-d{self.d_model}"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def flops(self) -> float:
        """Backward twice forward; of the causal scores only those below the diagonal."""
        attentions, scores = (2, 1.5) if self.kind == "decoder" else (1, 1.0)
        parameters = 4 * attentions * self.d_model**2 + 2 * self.d_model * self.dim_feedforward
        return 6.0 * self.tokens * (parameters + 2 * scores * self.length * self.d_model)

    def missing(self) -> str | None:
        return None

    def few(self) -> LayerStep:
        return replace(self, batch=max(1, self.batch // FEW), length=max(1, self.length * self.batch // FEW))

    def prepare(self, dtype: str, device: str) -> Prepared:
        calls: dict[str, Call] = {}
        for peer, module in self._modules(0.1).items():
            calls[peer] = self._step(module.to(device, DTYPES[dtype]), DTYPES[dtype], device)
        return Prepared(calls)

    def ours(self, dtype: str, device: str) -> Results:
        return self._judged(OURS, DTYPES[dtype], DTYPES[dtype], device)

    def expected(self, dtype: str, device: str) -> tuple[Results, list[Results]]:
        truth = self._judged(TORCH_NN, DTYPES[dtype], torch.float64, device)
        return truth, [self._judged(TORCH_NN, DTYPES[dtype], DTYPES[dtype], device)]

    def _modules(self, dropout: float) -> dict[str, torch.nn.Module]:
        """The same weights twice."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            class_name = f"Transformer{self.kind.capitalize()}Layer"
            sizes = (self.d_model, self.heads, self.dim_feedforward, dropout)
            stock = getattr(torch.nn, class_name)(*sizes, batch_first=True)
            fused = getattr(nn, class_name)(*sizes, batch_first=True)
        fused.load_state_dict(stock.state_dict())
        return {OURS: fused, TORCH_NN: stock}

    def _inputs(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        generator = torch.Generator().manual_seed(1)
        names = ("src",) if self.kind == "encoder" else ("tgt", "memory")
        shape = (self.batch, self.length, self.d_model)
        tensors = {name: torch.randn(shape, generator=generator).to(device, dtype) for name in names}
        lengths = torch.randint(max(1, self.length // 2), self.length + 1, (self.batch,), generator=generator)
        padding = (torch.arange(self.length) >= lengths[:, None]).to(device)
        options: dict[str, Any] = {f"{name}_key_padding_mask": padding for name in names}
        if self.kind == "decoder":
            mask = torch.nn.Transformer.generate_square_subsequent_mask(self.length, torch.device(device), torch.bool)
            options |= {"tgt_mask": mask, "tgt_is_causal": True}
        return tensors, options, torch.randn(shape, generator=generator).to(device, dtype)

    def _step(self, module: torch.nn.Module, dtype: torch.dtype, device: str) -> Call:
        tensors, options, grad_out = self._inputs(dtype, device)
        tensors = {name: x.requires_grad_() for name, x in tensors.items()}

        def step() -> None:
            for x in (*module.parameters(), *tensors.values()):
                x.grad = None
            module(**tensors, **options).backward(grad_out)

        return step

    def _judged(self, peer: str, rounded: torch.dtype, dtype: torch.dtype, device: str) -> Results:
        """Output and gradients of few tokens without dropout, from weights and inputs rounded to ``rounded``."""
        few = self.few()
        module = few._modules(0.0)[peer].to(device, rounded).to(dtype)
        tensors, options, grad_out = few._inputs(rounded, device)
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        out = module(**leaves, **options)
        named = dict(module.named_parameters()) | leaves
        grads = torch.autograd.grad(out, list(named.values()), grad_out.to(dtype))
        return {"out": out.detach()} | {f"grad {name}": grad for name, grad in zip(named, grads, strict=True)}


def selected(options: Options) -> list[ModelCase]:
    """The cases that a run measures."""
    cases = [case for case in (MINIATURES if options.quick else MODELS) if options.device_type in case.devices]
    if options.floors:
        cases = [case for case in cases if case.floor is not None or case.peak_most is not None]
    elif not options.full:
        cases = [case for case in cases if not case.full]
    return [case for case in cases if re.search(options.pattern, case.name)]


def _layers() -> Iterator[ModelCase]:
    for kind in ("encoder", "decoder"):
        yield ModelCase(LayerStep(kind, 8, 256), "fp32", floor=1.5, devices=("cpu",))
        yield ModelCase(LayerStep(kind, 8, 256), "bf16", floor=1.5, devices=("cpu",), full=True)
        yield ModelCase(LayerStep(kind, 8, 512), "fp32", peak_most=0.6)


MINIATURES = (
    ModelCase(LayerStep("encoder", 2, 9, 16, 2, 24), "fp32", floor=1.0, peak_most=1.0),
    ModelCase(LayerStep("decoder", 2, 9, 16, 2, 24), "bf16"),
)
MODELS = tuple(_layers())
