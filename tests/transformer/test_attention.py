"""``MultiheadAttention`` against ``torch.nn.MultiheadAttention``: every argument; outputs, weights, all gradients."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedformer
from fusedformer import nn
from tests.tolerances import assert_equal_bits, assert_within_contract

INF = float("inf")


@dataclass(frozen=True)
class Problem:
    """One module and one call of it.

    Attributes:
        sources: "self", "memory" (key is value), "shared" (query is key) or "apart": which inputs are the same tensor.
        padding: dtype of ``key_padding_mask``; "" for none.
        mask: dtype and rank of ``attn_mask``; "hint" is the causal mask together with ``is_causal=True``.
    """

    heads: int
    head_dim: int
    batch: int
    len_q: int
    len_k: int
    sources: str
    own_dims: bool
    bias: bool
    add_bias_kv: bool
    add_zero_attn: bool
    batch_first: bool
    batched: bool
    need_weights: bool
    average: bool
    padding: str
    mask: str
    seed: int

    @property
    def constructor(self) -> dict[str, Any]:
        size = self.heads * self.head_dim
        dims = {"kdim": size + 2, "vdim": size + 3} if self.own_dims and self.sources == "apart" else {}
        names = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")
        return {"embed_dim": size, "num_heads": self.heads, **{name: getattr(self, name) for name in names}, **dims}

    def leaves(self) -> dict[str, Tensor]:
        """The call's tensors, float32, each once; the keys' first slot and every mask's first key stay open."""
        generator = torch.Generator().manual_seed(self.seed)
        size, batch, len_q, len_k = self.heads * self.head_dim, self.batch, self.len_q, self.len_k

        def draw(length: int, features: int) -> Tensor:
            shape = (batch, length, features) if self.batch_first else (length, batch, features)
            x = torch.randn(shape, generator=generator)
            return x if self.batched else x.squeeze(0 if self.batch_first else 1)

        dims = self.constructor
        leaves = {"query": draw(len_q, size)}
        if self.sources in ("memory", "apart"):
            leaves["key"] = draw(len_k, dims.get("kdim", size))
        if self.sources in ("shared", "apart"):
            leaves["value"] = draw(len_k, dims.get("vdim", size))
        if self.padding:
            shape = (batch, len_k) if self.batched else (len_k,)
            leaves["key_padding_mask"] = self._mask(self.padding, shape, generator)
        if self.mask.startswith("hint"):
            left_out = torch.ones(len_q, len_k, dtype=torch.bool).triu(1)
            mask = torch.zeros(len_q, len_k).masked_fill(left_out, -INF)
            leaves["attn_mask"] = left_out if "bool" in self.mask else mask
        elif self.mask:
            rows = (len_q, len_k) if "2-D" in self.mask else (batch * self.heads, len_q, len_k)
            leaves["attn_mask"] = self._mask(self.mask, rows, generator)
        return leaves

    @staticmethod
    def _mask(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        left_out = torch.rand(shape, generator=generator) < 0.4
        left_out[..., 0] = False
        if "bool" in kind:
            return left_out
        return torch.randn(shape, generator=generator).masked_fill(left_out, -INF)

    def call(self, leaves: dict[str, Tensor], may_hint: bool) -> dict[str, Any]:
        query = leaves["query"]
        key = leaves.get("key", query)
        value = leaves.get("value", key)
        masks: dict[str, Any] = {name: leaves[name] for name in ("key_padding_mask", "attn_mask") if name in leaves}
        return {
            "query": query,
            "key": key,
            "value": value,
            **masks,
            "need_weights": self.need_weights,
            "average_attn_weights": self.average,
            "is_causal": may_hint and self.mask.startswith("hint"),
        }


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    sources = draw(st.sampled_from(["self", "memory", "shared", "apart"]))
    batched, len_q = draw(st.booleans()), draw(st.integers(1, 9))
    masks = ["", "bool 2-D", "bool 3-D", "float 2-D", "float 3-D", "hint bool", "hint float"]
    chosen: dict[str, Any] = {
        "heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([1, 2, 5, 8])),
        "batch": draw(st.integers(1, 3)) if batched else 1,
        "len_q": len_q,
        "len_k": len_q if sources in ("self", "shared") else draw(st.integers(1, 9)),
        "sources": sources,
        "batched": batched,
        "padding": draw(st.sampled_from(["", "bool", "float"])),
        "mask": draw(st.sampled_from(masks)),
        "seed": draw(st.integers(0, 2**31)),
    }
    rest = [field.name for field in fields(Problem) if field.name not in chosen]
    flags: dict[str, Any] = {name: draw(st.booleans()) for name in rest}
    return Problem(**chosen, **flags)


def modules(problem: Problem) -> tuple[torch.nn.MultiheadAttention, nn.MultiheadAttention]:
    """torch's and ours, built from the same seed, with biases that are not 0."""
    torch.manual_seed(problem.seed)
    theirs = torch.nn.MultiheadAttention(**problem.constructor)
    torch.manual_seed(problem.seed)
    ours = nn.MultiheadAttention(**problem.constructor)
    with torch.no_grad():
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            if a.dim() == 1:
                b.copy_(a.normal_())
    return theirs, ours


def evaluate(module: torch.nn.Module, problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, weights and, in one vector, the gradients of every parameter, input and floating mask.

    torch's module reads the causal mask; told that it is causal, it treats appended keys now this way, now that.
    """
    module = copy.deepcopy(module).to(dtype)
    leaves = {
        name: x.to(dtype).requires_grad_() if x.is_floating_point() else x for name, x in problem.leaves().items()
    }
    out, weights = module(**problem.call(leaves, may_hint=isinstance(module, nn.MultiheadAttention)))
    results = {"output": out} if weights is None else {"output": out, "weights": weights}
    generator = torch.Generator().manual_seed(problem.seed)
    loss = torch.zeros((), dtype=dtype)
    for x in results.values():
        loss = loss + (x * torch.randn(x.shape, generator=generator).to(dtype)).sum()
    loss.backward()
    # A mask that is_causal speaks for is not read, so it has no gradient.
    hinted = "attn_mask" if problem.mask.startswith("hint") else ""
    tensors = [*module.parameters(), *(x for name, x in leaves.items() if x.is_floating_point() and name != hinted)]
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]
    return {name: x.detach() for name, x in results.items()} | {"gradients": torch.cat([x.flatten() for x in grads])}


@settings(max_examples=120, deadline=None)
@given(problems())
def test_is_torchs_function(problem: Problem) -> None:
    theirs, ours = modules(problem)
    actual = evaluate(ours, problem, torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")  # torch's, of a bool and a float mask
        expected = evaluate(theirs, problem, torch.float64)
    torch.testing.assert_close(actual, expected)


LARGER = Problem(4, 8, 3, 17, 17, "self", False, True, False, False, True, True, False, True, "", "", 0)
ACCURATE = {
    "self": {},
    "length first": {"batch_first": False},
    "unbatched": {"batched": False, "batch": 1},
    "padding": {"padding": "bool"},
    "causal and padding": {"mask": "hint bool", "padding": "bool"},
    "causal, length first": {"mask": "hint float", "batch_first": False},
    "cross attention": {"sources": "memory", "len_k": 29, "padding": "bool"},
    "own dims": {"sources": "apart", "own_dims": True, "len_k": 29, "mask": "float 3-D"},
    "no bias": {"bias": False, "mask": "bool 2-D"},
    "masks with gradients": {"mask": "float 2-D", "padding": "float"},
    "appended keys": {"add_bias_kv": True, "add_zero_attn": True, "padding": "bool", "mask": "bool 3-D"},
    "appended keys, causal": {"add_bias_kv": True, "add_zero_attn": True, "padding": "bool", "mask": "hint bool"},
}


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("changes", ACCURATE.values(), ids=ACCURATE)
def test_is_as_accurate_as_torch(changes: dict[str, Any], need_weights: bool, seed: int) -> None:
    problem = replace(LARGER, **changes, need_weights=need_weights, seed=seed)
    theirs, ours = modules(problem)
    truth, eager = (evaluate(theirs, problem, dtype) for dtype in (torch.float64, torch.float32))
    actual = evaluate(ours, problem, torch.float32)
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert_within_contract(x, truth[name], eager[name], name)


CONSTRUCTORS: list[dict[str, Any]] = [
    {},
    {"bias": False, "dropout": 0.3},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    {"kdim": 5, "vdim": 7, "add_bias_kv": True},
    {"kdim": 5, "bias": False, "dtype": torch.float64},
]


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_starts_as_torch_does_and_exchanges_state(options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    theirs = torch.nn.MultiheadAttention(12, 3, **options)
    torch.manual_seed(seed)
    ours = nn.MultiheadAttention(12, 3, **options)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in theirs.state_dict().items():
        assert_equal_bits(ours.state_dict()[name], x, name)
    other = nn.MultiheadAttention(12, 3, **options)
    theirs.load_state_dict(other.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for name, x in other.state_dict().items():
        assert_equal_bits(ours.state_dict()[name], x, name)


def test_other_names_are_torchs() -> None:
    assert nn.Linear is torch.nn.Linear
    assert nn.functional is fusedformer.functional
    assert {"MultiheadAttention", "Linear", "functional"} <= set(dir(nn))
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        _ = nn.NoSuchLayer


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_of_training_alone(need_weights: bool, seed: int) -> None:
    ours = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
    plain = nn.MultiheadAttention(16, 2, batch_first=True)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 16)
    expected = plain(x, x, x, need_weights=need_weights)[0]
    assert_equal_bits(ours.eval()(x, x, x, need_weights=need_weights)[0].detach(), expected.detach())
    ours.train()
    first, second = (ours(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.allclose(first, expected)
    assert not torch.allclose(first, second)
    torch.manual_seed(seed)
    again = ours(x, x, x, need_weights=need_weights)[0]
    torch.manual_seed(seed)
    assert_equal_bits(ours(x, x, x, need_weights=need_weights)[0].detach(), again.detach())


def test_weights_are_those_the_values_were_multiplied_with() -> None:
    module = nn.MultiheadAttention(8, 1, dropout=0.5, batch_first=True)
    x = torch.randn(3, 20, 8)
    out, weights = module(x, x, x)
    assert weights is not None
    kept = weights != 0
    assert 0.4 < kept.double().mean().item() < 0.6

    def attend(weights: Tensor) -> Tensor:
        projections = copy.deepcopy(module).to(weights.dtype)
        value = torch.nn.functional.linear(
            x.to(weights.dtype), projections.in_proj_weight[16:], projections.in_proj_bias[16:]
        )
        made: Tensor = projections.out_proj(weights @ value)
        return made.detach()

    exact = copy.deepcopy(module).double().eval()
    all_weights = exact(*[x.double()] * 3)[1]
    assert all_weights is not None
    assert_within_contract(out.detach(), attend(2 * all_weights * kept), attend(weights))


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_gives_torchs_dtypes(need_weights: bool) -> None:
    theirs, ours = torch.nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2)
    x = torch.randn(5, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (module(x, x, x, need_weights=need_weights) for module in (theirs, ours))
    assert actual[0].dtype == expected[0].dtype == torch.bfloat16
    if need_weights:
        assert actual[1].dtype == expected[1].dtype
    actual[0].sum().backward()
    assert ours.in_proj_weight.grad is not None
    assert ours.in_proj_weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 17, 32).to(dtype)
    padding = torch.arange(17) >= torch.tensor([[9], [17]])
    theirs = theirs.to(dtype)
    ours = nn.MultiheadAttention(32, 4, batch_first=True).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()(x.double(), x.double(), x.double(), padding)
    eager, actual = (module(x, x, x, padding) for module in (theirs, ours))
    for name, i in (("output", 0), ("weights", 1)):
        assert_within_contract(actual[i].detach(), truth[i].detach(), eager[i].detach(), name)
