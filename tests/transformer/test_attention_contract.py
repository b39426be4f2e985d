"""What ``MultiheadAttention`` promises beyond torch's: empty rows, causality without a mask, errors, composing."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer import nn
from tests.tolerances import assert_equal_bits


class Recorder(TorchDispatchMode):
    """The operators that ran, and the largest tensor that one of them returned; a fused operator counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.operators.append(func.name())
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return results


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mode", ["training", "eval", "no_grad"])
@pytest.mark.parametrize("kind", ["bool", "float", "attn_mask"])
def test_a_sample_of_padding_is_no_nan(need_weights: bool, mode: str, kind: str) -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True).train(mode == "training")
    torch.nn.init.normal_(module.out_proj.bias)
    x = torch.randn(2, 5, 16, requires_grad=True)
    padding = torch.tensor([[True] * 5, [False, False, False, True, True]])
    masks: dict[str, Tensor] = {"key_padding_mask": padding}
    if kind == "float":
        masks = {"key_padding_mask": torch.zeros(2, 5).masked_fill(padding, float("-inf"))}
    elif kind == "attn_mask":
        masks = {"attn_mask": padding[:, None, None, :].expand(2, 4, 5, 5).flatten(0, 1)}
    with torch.set_grad_enabled(mode != "no_grad"):
        out, weights = module(x, x, x, **masks, need_weights=need_weights)
    assert_equal_bits(out[0].detach(), module.out_proj.bias.detach().expand(5, 16))
    alone = module(x[1:], x[1:], x[1:], key_padding_mask=padding[1:], need_weights=need_weights)[0]
    torch.testing.assert_close(out[1:], alone)
    if weights is not None:
        assert_equal_bits(weights[0].detach(), torch.zeros(5, 5))
    if mode != "no_grad":
        out.sum().backward()
        assert x.grad is not None
        assert_equal_bits(x.grad[0], torch.zeros(5, 16))
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("len_k", [3, 7, 12])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_is_causal_needs_no_mask_and_reads_none(need_weights: bool, len_k: int, options: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(16, 2, **options).double()
    query, memory = torch.randn(7, 3, 16).double(), torch.randn(len_k, 3, 16).double()
    padding = torch.arange(len_k) > torch.tensor([[len_k], [2], [0]])
    causal = torch.ones(7, len_k, dtype=torch.bool).triu(1)
    expected = module(query, memory, memory, padding, need_weights, causal)
    unread = torch.full((7, len_k), float("nan"))
    for attn_mask in (None, causal, unread, ~causal):
        actual = module(query, memory, memory, padding, need_weights, attn_mask, is_causal=True)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_causality_and_padding_make_no_mask_and_no_copies(batch_first: bool, cross: bool) -> None:
    length, batch, size = 512, 2, 16
    module = nn.MultiheadAttention(size, 2, batch_first=batch_first)
    shape = (batch, length, size) if batch_first else (length, batch, size)
    x = torch.randn(shape)
    memory = torch.randn(shape) if cross else x
    padding = torch.arange(length) > torch.tensor([[length], [100]])
    with Recorder() as recorder:
        module(x, memory, memory, key_padding_mask=padding, need_weights=False, is_causal=True)
    assert recorder.largest <= 3 * batch * length * size < length * length
    assert "fusedformer::attention_forward" in recorder.operators
    copies = {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::cat", "aten::contiguous"}
    assert copies.isdisjoint(recorder.operators)
    assert recorder.operators.count("fusedformer::linear_forward") == (3 if cross else 2)


def call(**changes: Any) -> dict[str, Any]:
    x = torch.randn(2, 5, 16)
    return {"query": x, "key": x, "value": x, **changes}


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": (call(query=[1.0]), TypeError, r"query: got list, expected a Tensor"),
    "rank": (call(query=torch.randn(16)), ValueError, "query: got 1 dimensions, expected 3, or 2 without a batch"),
    "ranks": (call(key=torch.randn(5, 16)), ValueError, "key: got 2 dimensions, expected 3 like query"),
    "features": (call(value=torch.randn(2, 5, 15)), ValueError, "value: got 15 features, expected 16"),
    "dtype": (
        call(key=torch.randn(2, 5, 16).double()),
        TypeError,
        "key: got float64, expected float32 like the weights",
    ),
    "batch": (call(key=torch.randn(3, 5, 16)), ValueError, "key: got a batch of 3, expected 2 like query"),
    "length": (call(value=torch.randn(2, 6, 16)), ValueError, r"value: got shape \(2, 6, 16\), expected \(2, 5, 16\)"),
    "padding shape": (
        call(key_padding_mask=torch.zeros(5, 2, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask: got shape \(5, 2\), expected \(2, 5\)",
    ),
    "padding dtype": (
        call(key_padding_mask=torch.zeros(2, 5, dtype=torch.int64)),
        TypeError,
        r"key_padding_mask: got int64, expected bool \(True = left out\) or a floating type",
    ),
    "mask shape": (
        call(attn_mask=torch.zeros(5, 6)),
        ValueError,
        r"attn_mask: got shape \(5, 6\), expected \(5, 5\) or \(8, 5, 5\)",
    ),
    "mask of a batch": (call(attn_mask=torch.zeros(2, 5, 5)), ValueError, r"attn_mask: got shape \(2, 5, 5\)"),
    "hint with a wrong shape": (
        call(attn_mask=torch.zeros(3, 1, dtype=torch.bool), is_causal=True, need_weights=False),
        ValueError,
        r"attn_mask: got shape \(3, 1\), expected \(5, 5\) or \(8, 5, 5\)",
    ),
    "mask dtype": (
        call(attn_mask=torch.zeros(5, 5, dtype=torch.uint8)),
        TypeError,
        "attn_mask: got uint8, expected bool",
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments_are_named(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    with pytest.raises(kind, match=message):
        module(**arguments)


def test_nested_tensors_are_refused() -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
    with torch.no_grad(), pytest.raises(TypeError, match="query: got a nested or sparse tensor, expected a dense one"):
        module(nested, nested, nested)


def test_is_copied_pickled_and_saved() -> None:
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = module(x, x, x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(other) is nn.MultiheadAttention
        for got, want in zip(other(x, x, x), expected, strict=True):
            assert_equal_bits(got.detach(), want.detach())


def test_is_built_on_meta_and_moved() -> None:
    module = nn.MultiheadAttention(16, 2, kdim=5, add_bias_kv=True, device="meta")
    assert all(p.is_meta for p in module.parameters())
    module = module.to_empty(device="cpu").to(torch.float64)
    module.load_state_dict(nn.MultiheadAttention(16, 2, kdim=5, add_bias_kv=True).state_dict())
    x = torch.randn(3, 2, 16).double()
    assert module(x, torch.randn(4, 2, 5).double(), torch.randn(4, 2, 16).double())[0].dtype == torch.float64


@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_whole_with_changing_lengths(need_weights: bool) -> None:
    module = nn.MultiheadAttention(16, 2, batch_first=True)

    def step(x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor | None]:
        return module(x, x, x, padding, need_weights, is_causal=True)  # type: ignore[no-any-return]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        x = torch.randn(2, length, 16)
        padding = torch.arange(length) >= torch.tensor([[3], [length]])
        for got, want in zip(compiled(x, padding), step(x, padding), strict=True):
            torch.testing.assert_close(got, want)
        grads = []
        for run in (compiled, step):
            module.zero_grad()
            run(x, padding)[0].square().sum().backward()
            assert module.in_proj_weight.grad is not None
            grads.append(module.in_proj_weight.grad)
        torch.testing.assert_close(*grads)


class SelfAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.attention(x, x, x, padding, need_weights=False, is_causal=True)[0]  # type: ignore[no-any-return]


def test_is_exported_with_changing_lengths() -> None:
    module = SelfAttention().eval()
    length = torch.export.Dim("length", min=2, max=64)
    example = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    shapes = {"x": {1: length}, "padding": {1: length}}
    program = torch.export.export(module, example, dynamic_shapes=shapes)
    x, padding = torch.randn(2, 11, 16), torch.arange(11) >= torch.tensor([[3], [11]])
    torch.testing.assert_close(program.module()(x, padding), module(x, padding))


def test_gives_gradients_of_each_sample() -> None:
    module = SelfAttention().double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x, padding = torch.randn(3, 5, 16).double(), torch.arange(5) >= torch.tensor([[2], [5], [4]])

    def loss(parameters: dict[str, Tensor], x: Tensor, padding: Tensor) -> Tensor:
        out = torch.func.functional_call(module, parameters, (x[None], padding[None]))
        return out.square().sum()  # type: ignore[no-any-return]

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, padding)
    for i in range(3):
        module.zero_grad()
        module(x[i : i + 1], padding[i : i + 1]).square().sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(grads[name][i], p.grad)
