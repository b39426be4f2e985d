"""Encoder, decoder and transformer against torch.nn's over generated configurations: outputs and all gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedformer import nn
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

INF = float("inf")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.gelu": F.gelu,
    "F.silu": F.silu,
    "ReLU": torch.nn.ReLU(),
    "GELU of tanh": torch.nn.GELU(approximate="tanh"),
    "SiLU": torch.nn.SiLU(),
    "tanh": torch.tanh,
    "Softplus": torch.nn.Softplus(),
    "own": lambda x: x * torch.sigmoid(x),
}
MASKS = ["", "bool 2-D", "bool 3-D", "float 2-D", "float 3-D", "hint bool", "hint float", "hint alone"]
PADDINGS = ["", "bool", "float"]


@dataclass(frozen=True)
class Problem:
    """One module and one call of it.

    Attributes:
        kind: "EncoderLayer", "DecoderLayer" or "", the whole.
        masks: by what attends (src, tgt, memory), the dtype and rank of its mask; with "hint" it is the causal one and
            ours is told so, and with "hint alone" ours is told nothing else.
        paddings: likewise, the dtype of the keys' mask.
    """

    kind: str
    constructor: dict[str, Any]
    batch: int
    batched: bool
    len_src: int
    len_tgt: int
    masks: dict[str, str]
    paddings: dict[str, str]
    seed: int

    @property
    def attends(self) -> tuple[str, ...]:
        return {"EncoderLayer": ("src",), "DecoderLayer": ("tgt", "memory"), "": ("src", "tgt", "memory")}[self.kind]

    def build(self, module: Any) -> torch.nn.Module:
        """The module of ``torch.nn`` or ``fusedformer.nn``, with vectors (biases, norms) that are not 0 or 1."""
        torch.manual_seed(self.seed)
        activation = self.constructor["activation"]
        options = {**self.constructor, "activation": ACTIVATIONS.get(activation, activation)}
        built: torch.nn.Module = getattr(module, f"Transformer{self.kind}")(dropout=0.0, **options)
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.5)
        return built

    def leaves(self) -> dict[str, Tensor]:
        """The call's tensors, float32; every mask leaves the first key open."""
        generator = torch.Generator().manual_seed(self.seed)
        lengths = {"src": self.len_src, "tgt": self.len_tgt, "memory": self.len_src}
        inputs = {"EncoderLayer": ("src",), "DecoderLayer": ("tgt", "memory"), "": ("src", "tgt")}[self.kind]
        leaves = {}
        batch_dim = 0 if self.constructor["batch_first"] else 1
        for name in inputs:
            sizes = [lengths[name], self.constructor["d_model"]]
            sizes[batch_dim:batch_dim] = [self.batch] if self.batched else []
            leaves[name] = torch.randn(sizes, generator=generator)
        for name in self.attends:
            len_q, len_k = lengths["tgt" if name == "memory" else name], lengths[name]
            kind, padding = self.masks[name], self.paddings[name]
            if kind.startswith("hint"):
                left_out = torch.ones(len_q, len_k, dtype=torch.bool).triu(1)
                leaves[f"{name}_mask"] = (
                    torch.zeros(len_q, len_k).masked_fill(left_out, -INF) if "float" in kind else left_out
                )
            elif kind:
                rows = (len_q, len_k) if "2-D" in kind else (self.batch * self.constructor["nhead"], len_q, len_k)
                leaves[f"{name}_mask"] = _mask(kind, rows, generator)
            if padding:
                shape = (self.batch, len_k) if self.batched else (len_k,)
                leaves[f"{name}_key_padding_mask"] = _mask(padding, shape, generator)
        return leaves

    def hints(self) -> dict[str, Any]:
        """What ours is told besides, and the masks that it is not given."""
        hinted = {name for name in self.attends if self.masks[name].startswith("hint")}
        prefix = "" if self.kind == "EncoderLayer" else None
        told = {f"{name if prefix is None else prefix}_is_causal".lstrip("_"): True for name in hinted}
        return told | {f"{name}_mask": None for name in hinted if "alone" in self.masks[name]}


def _mask(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    left_out = torch.rand(shape, generator=generator) < 0.4
    left_out[..., 0] = False
    if "bool" in kind:
        return left_out
    return torch.randn(shape, generator=generator).masked_fill(left_out, -INF)


@st.composite
def problems(draw: st.DrawFn, kind: str) -> Problem:
    def choose(values: Any) -> Any:
        return draw(st.sampled_from(values))

    nhead, batched = draw(st.integers(1, 3)), draw(st.booleans())
    constructor: dict[str, Any] = {
        "d_model": nhead * choose([4, 5, 8]),
        "nhead": nhead,
        "dim_feedforward": draw(st.integers(1, 20)),
        "activation": choose(["relu", "gelu", *ACTIVATIONS]),
        "layer_norm_eps": choose([1e-5, 1e-3]),
        **{name: draw(st.booleans()) for name in ("batch_first", "norm_first", "bias")},
    }
    if not kind:
        constructor |= {f"num_{which}_layers": draw(st.integers(1, 2)) for which in ("encoder", "decoder")}
    attends = ("src", "tgt", "memory")
    return Problem(
        kind,
        constructor,
        draw(st.integers(1, 3)) if batched else 1,
        batched,
        draw(st.integers(1, 7)),
        draw(st.integers(1, 7)),
        {name: choose(MASKS) for name in attends},
        {name: choose(PADDINGS) for name in attends},
        draw(st.integers(0, 2**31)),
    )


def evaluate(module: torch.nn.Module, problem: Problem, dtype: torch.dtype, hints: bool) -> dict[str, Tensor]:
    """The output and the gradients of every parameter, input and floating mask that is read."""
    module = copy.deepcopy(module).to(dtype)
    leaves = {
        name: x.to(dtype).requires_grad_() if x.is_floating_point() else x for name, x in problem.leaves().items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")  # torch's, of a bool and a float mask
        out = module(**{**leaves, **(problem.hints() if hints else {})})
    generator = torch.Generator().manual_seed(problem.seed)
    (out * torch.randn(out.shape, generator=generator).to(dtype)).sum().backward()
    unread = {f"{name}_mask" for name in problem.attends if problem.masks[name].startswith("hint")}
    read = {name: x for name, x in leaves.items() if x.is_floating_point() and name not in unread}
    tensors = dict(module.named_parameters()) | read
    results = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in tensors.items()}
    return {"output": out.detach(), **results}


def check(problem: Problem) -> None:
    theirs, ours = problem.build(torch.nn), problem.build(nn)
    for name, x in theirs.state_dict().items():
        assert_equal_bits(ours.state_dict()[name], x, name)
    truth = evaluate(theirs, problem, torch.float64, hints=False)
    torch.testing.assert_close(evaluate(ours, problem, torch.float64, hints=True), truth)
    actual = evaluate(ours, problem, torch.float32, hints=True)
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert_no_mistake(x, truth[name], name)


@settings(max_examples=120, deadline=None)
@given(problems("EncoderLayer"))
def test_encoder_layer_is_torchs(problem: Problem) -> None:
    check(problem)


@settings(max_examples=120, deadline=None)
@given(problems("DecoderLayer"))
def test_decoder_layer_is_torchs(problem: Problem) -> None:
    check(problem)


@settings(max_examples=60, deadline=None)
@given(problems(""))
def test_transformer_is_torchs(problem: Problem) -> None:
    check(problem)


BASE: dict[str, Any] = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "activation": "relu", "bias": True}
ACCURATE: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, str]]] = {
    "post-norm": ({}, {}, {}),
    "pre-norm, gelu": ({"norm_first": True, "activation": "gelu"}, {}, {}),
    "length first": ({"batch_first": False}, {"src": "hint float", "tgt": "hint bool"}, {}),
    "padding": ({}, {"tgt": "hint alone"}, {"src": "bool", "tgt": "bool", "memory": "bool"}),
    "no bias": ({"bias": False, "norm_first": True}, {"memory": "bool 2-D"}, {"memory": "bool"}),
    "masks with gradients": (
        {},
        {"src": "float 2-D", "tgt": "float 3-D", "memory": "float 3-D"},
        {"src": "float", "tgt": "float"},
    ),
    "own activation": ({"activation": "own"}, {}, {"src": "bool"}),
}


@pytest.mark.parametrize("kind", ["EncoderLayer", "DecoderLayer", ""], ids=["encoder", "decoder", "transformer"])
@pytest.mark.parametrize(("options", "masks", "paddings"), ACCURATE.values(), ids=ACCURATE)
def test_is_as_accurate_as_torch(
    kind: str, options: dict[str, Any], masks: dict[str, str], paddings: dict[str, str], seed: int
) -> None:
    constructor = {"batch_first": True, "norm_first": False, **BASE, **options}
    if not kind:
        constructor |= {"num_encoder_layers": 2, "num_decoder_layers": 2}
    none = {"src": "", "tgt": "", "memory": ""}
    problem = Problem(kind, constructor, 3, True, 17, 13, none | masks, none | paddings, seed)
    theirs, ours = problem.build(torch.nn), problem.build(nn)
    truth, eager = (evaluate(theirs, problem, dtype, hints=False) for dtype in (torch.float64, torch.float32))
    actual = evaluate(ours, problem, torch.float32, hints=True)
    flat = [
        torch.cat([x.flatten() for name, x in sorted(of.items()) if name != "output"]) for of in (actual, truth, eager)
    ]
    assert_within_contract(actual["output"], truth["output"], eager["output"], "output")
    assert_within_contract(flat[0], flat[1], flat[2], "gradients")
