"""The contract's promises that are not about accuracy: empty rows, masked slots, determinism, untouched inputs, zero
sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.functional import attention
from tests.cases import Case, Inputs, make_inputs
from tests.kernels.attention.eager import assert_results_within_contract, eager_attention, fused, results
from tests.lanes import every_backend, every_feature
from tests.tolerances import assert_equal_bits

INF = float("inf")
EVERYTHING = Case(
    "everything", batch=1, heads=4, heads_kv=2, len_q=17, len_k=33, value_dim=40, is_causal=True, window=(20, None),
    causal_alignment="bottom_right", softcap=2.0, alibi="H", sinks=True, mask="float B1LS", key_mask="float",
    dropout_p=0.3,
)  # fmt: skip


def row(size: int, *without: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """A mask of ``size`` slots that leaves all in but ``without``."""
    keep = torch.ones(size, dtype=torch.bool)
    keep[list(without)] = False
    return keep if dtype == torch.bool else torch.zeros(size, dtype=dtype).masked_fill(~keep, -INF)


def rows_without_keys(len_q: int, len_k: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """(L, S): rows 2 and L - 1 see nothing, the others all."""
    return row(len_q, 2, len_q - 1, dtype=dtype)[:, None].expand(len_q, len_k).contiguous()


EMPTY_ROWS: dict[str, tuple[Case, dict[str, Any]]] = {
    "key mask bool": (Case(""), {"key_mask": torch.stack((row(17, *range(17)), row(17)))}),
    "key mask float": (Case(""), {"key_mask": torch.stack((torch.full((17,), -INF), torch.zeros(17)))}),
    "mask of one row": (Case(""), {"attn_mask": torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 17)}),
    "mask bool": (Case("", len_k=33), {"attn_mask": rows_without_keys(17, 33)}),
    "mask float": (Case("", len_k=33), {"attn_mask": rows_without_keys(17, 33, torch.float32)}),
    "masks together": (
        Case("", len_q=5, len_k=17),
        {
            "key_mask": (torch.arange(17) > 7).expand(2, 17),
            "attn_mask": torch.arange(17) <= torch.arange(7, 17, 2)[:, None],
        },
    ),
    "causal bottom right": (Case("", len_q=33, len_k=17), {"is_causal": True, "causal_alignment": "bottom_right"}),
    "window past the keys": (Case("", len_q=33, len_k=17), {"window": (3, 0)}),
    "window before the keys": (Case("", len_q=33, len_k=5), {"window": (0, 3), "causal_alignment": "bottom_right"}),
    "causal and padding": (Case(""), {"is_causal": True, "key_mask": row(17, 0, 1, 2)[None].expand(2, 17)}),
}  # fmt: skip


def problem_with(case: Case, options: dict[str, Any], device: str, seed: int) -> Inputs:
    inputs = make_inputs(case, torch.float32, device, seed)
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    return replace(inputs, options=inputs.options | moved)


@every_backend
@pytest.mark.parametrize("cause", EMPTY_ROWS)
def test_empty_rows(cause: str, backend: str, device: str, seed: int) -> None:
    inputs = problem_with(*EMPTY_ROWS[cause], device, seed)
    actual = results(fused(backend), inputs, with_lse=backend != "torch")
    _, lse, _ = eager_attention(inputs.query, inputs.key, inputs.value, **inputs.options)
    empty = lse == -INF
    assert empty.any()
    assert not empty.all(), "the other rows are there to show that nothing spreads"
    assert (actual["out"][empty] == 0).all()
    assert (actual["grad query"][empty] == 0).all()
    if "lse" in actual:
        assert torch.equal(actual["lse"] == -INF, empty)
    assert_results_within_contract(actual, inputs)


@every_feature
@pytest.mark.parametrize("cause", EMPTY_ROWS)
def test_empty_rows_with_a_sink(cause: str, backend: str, device: str, seed: int) -> None:
    case, options = EMPTY_ROWS[cause]
    sinks = torch.randn(case.heads)
    inputs = problem_with(case, {**options, "sinks": sinks}, device, seed)
    _, without, _ = eager_attention(inputs.query, inputs.key, inputs.value, **{**inputs.options, "sinks": None})
    empty = without == -INF
    actual = results(fused(backend), inputs)
    assert (actual["out"][empty] == 0).all()
    torch.testing.assert_close(actual["lse"][empty], inputs.options["sinks"][:, None].expand_as(empty)[empty])
    assert_results_within_contract(actual, inputs)


@every_backend
@pytest.mark.parametrize("kind", ["key_mask bool", "key_mask float", "attn_mask bool", "attn_mask float"])
def test_nothing_takes_part_anywhere(kind: str, backend: str, device: str, seed: int) -> None:
    name, dtype = kind.split()
    mask = row(33, *range(33), dtype=torch.bool if dtype == "bool" else torch.float32)
    shape = (2, 33) if name == "key_mask" else (1, 2, 17, 33)
    inputs = problem_with(Case("", len_k=33), {name: mask.expand(shape)}, device, seed)
    actual = results(fused(backend), inputs, with_lse=backend != "torch")
    for result, x in actual.items():
        assert (x == (-INF if result == "lse" else 0)).all(), result


@every_backend
@pytest.mark.parametrize("where", ["key_mask bool", "key_mask float", "attn_mask bool"])
@pytest.mark.parametrize("poison", [float("nan"), INF], ids=str)
def test_slots_that_every_query_excludes_are_not_read(
    poison: float, where: str, backend: str, device: str, seed: int
) -> None:
    name, dtype = where.split()
    mask = row(33, 0, 15, 16, 17, 32, dtype=torch.bool if dtype == "bool" else torch.float32)
    shape = (2, 33) if name == "key_mask" else (2, 1, 1, 33)
    inputs = problem_with(Case("", batch=2, len_k=33), {name: mask.expand(shape)}, device, seed)
    excluded = (~mask if dtype == "bool" else mask == -INF).to(device)
    poisoned = replace(inputs, key=inputs.key.clone(), value=inputs.value.masked_fill(excluded[:, None], poison))
    poisoned.key[:, :, excluded, 3] = poison
    clean, actual = (results(fused(backend), x, with_lse=backend != "torch") for x in (inputs, poisoned))
    for result, x in actual.items():
        assert_equal_bits(x, clean[result], result)
    for result in ("grad key", "grad value"):
        assert (actual[result][:, :, excluded] == 0).all()


@every_feature
def test_a_slot_that_one_head_excludes_is_not_read_by_that_head(backend: str, device: str, seed: int) -> None:
    mask = torch.stack((row(33, 5), row(33)))[None, :, None]  # head 0 excludes slot 5, head 1 reads it
    inputs = problem_with(Case("", heads=2, heads_kv=1, len_k=33), {"attn_mask": mask}, device, seed)
    poisoned = replace(inputs, value=inputs.value.clone())
    poisoned.value[:, :, 5] = float("nan")
    out, expected = (results(fused(backend), x)["out"] for x in (poisoned, inputs))
    assert_equal_bits(out[:, 0], expected[:, 0])
    assert out[:, 1].isnan().all()


HIDDEN_SLOT: dict[str, dict[str, Any]] = {  # the last of 33 queries alone sees the last of 33 slots
    "causal": {"is_causal": True},
    "window": {"window": (None, 0)},
    "mask bool": {"attn_mask": torch.ones(33, 33).tril().bool()},
    "mask float": {"attn_mask": torch.full((33, 33), -INF).triu(1)},
}


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("how", HIDDEN_SLOT)
def test_what_a_query_excludes_does_not_change_its_row(
    how: str, dtype: torch.dtype, backend: str, device: str, seed: int
) -> None:
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in HIDDEN_SLOT[how].items()}
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    inputs = replace(make_inputs(Case("", batch=1, len_q=33), dtype, device, seed), options=options)
    inputs.grad_out[:, :, -1] = 0.0
    inputs.grad_lse[:, :, -1] = 0.0
    changed = replace(inputs, key=inputs.key.clone(), value=inputs.value.clone())
    # Large, and no product with it overflows float32: torch's own backward multiplies it by the weight 0.
    changed.key[:, :, -1] = changed.value[:, :, -1] = 6e4 if dtype == torch.float16 else 1e30
    before, after = (results(fused(backend), x, with_lse=backend != "torch") for x in (inputs, changed))
    for result, x in after.items():
        assert_equal_bits(
            x[:, :, :-1] if x.dim() > 2 else x, before[result][:, :, :-1] if x.dim() > 2 else before[result]
        )
        assert x.isfinite().all() or result == "lse"


@every_feature
@pytest.mark.parametrize("how", HIDDEN_SLOT)
def test_what_a_query_excludes_may_be_the_largest_number(how: str, backend: str, device: str, seed: int) -> None:
    inputs = problem_with(Case("", batch=1, len_q=33), HIDDEN_SLOT[how], device, seed)
    inputs.grad_out[:, :, -1] = 0.0
    largest = replace(inputs, value=inputs.value.clone())
    largest.value[:, :, -1] = torch.finfo(torch.float32).max  # its product with the gradient overflows
    before, after = (results(fused(backend), x) for x in (inputs, largest))
    for name in ("grad query", "grad key", "grad value"):
        assert_equal_bits(after[name][:, :, :-1], before[name][:, :, :-1], name)


@every_feature
def test_same_bits_twice(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(EVERYTHING, torch.float32, device, seed)
    first, second = (results(fused(backend), inputs) for _ in range(2))
    for name, x in second.items():
        assert_equal_bits(x, first[name], name)


def test_same_bits_twice_on_torch(seed: int) -> None:
    inputs = make_inputs(
        Case("", heads=4, heads_kv=2, len_q=65, mask="float 1HLS", is_causal=True), torch.float32, "cpu", seed
    )
    first, second = (results(fused("torch"), inputs, with_lse=False) for _ in range(2))
    for name, x in second.items():
        assert_equal_bits(x, first[name], name)


@every_backend
def test_nothing_given_is_written_and_backward_runs_twice(backend: str, device: str, seed: int) -> None:
    case = Case("", heads=4, heads_kv=2, layout="BLHE", mask="float 1HLS", key_mask="float", is_causal=True)
    case = case if backend == "torch" else EVERYTHING
    if backend == "torch":
        case = replace(case, key_mask="")
    inputs = make_inputs(case, torch.float32, device, seed)
    leaves, named = inputs.leaves()
    given = [leaves.query, leaves.key, leaves.value, inputs.grad_out, *leaves.options.values()]
    tensors = [x for x in given if isinstance(x, Tensor)]
    before = [x.detach().clone() for x in tensors]
    versions = [x._version for x in tensors]
    out, _ = fused(backend)(leaves.query, leaves.key, leaves.value, **leaves.options)
    result = out.detach().clone()
    first = torch.autograd.grad(out, list(named.values()), inputs.grad_out, retain_graph=True)
    second = torch.autograd.grad(out, list(named.values()), inputs.grad_out)
    for name, one, two in zip(named, first, second, strict=True):
        assert_equal_bits(two, one, name)
    assert_equal_bits(out.detach(), result)
    for x, copy, version in zip(tensors, before, versions, strict=True):
        assert x._version == version
        assert torch.equal(x, copy)


@every_feature
@pytest.mark.parametrize("size", ["batch", "heads", "len_q", "len_k"])
def test_zero_sizes(size: str, backend: str, device: str, seed: int) -> None:
    shape = {"batch": 2, "heads": 2, "len_q": 17, "len_k": 17} | {size: 0}
    b, h, len_q, len_k = shape.values()
    query, key, value, grad_out = (
        torch.randn(b, h, length, dim, device=device)
        for length, dim in ((len_q, 32), (len_k, 32), (len_k, 40), (len_q, 40))
    )
    options = {"attn_mask": torch.randn(h, len_q, len_k, device=device), "sinks": torch.randn(h, device=device)}
    inputs = Inputs(query, key, value, grad_out, torch.randn(b, h, len_q, device=device), options)
    actual = results(fused(backend), inputs)
    assert actual["out"].shape == (b, h, len_q, 40)
    for name in ("query", "key", "value"):
        assert actual[f"grad {name}"].shape == getattr(inputs, name).shape
    if size == "len_k":
        assert (actual["out"] == 0).all()
        torch.testing.assert_close(actual["lse"], options["sinks"][:, None].expand(b, h, len_q))
        torch.testing.assert_close(actual["grad sinks"], inputs.grad_lse.sum((0, 2)))
    for name, x in actual.items():
        assert not x.isnan().any(), name


@every_feature
def test_no_keys_is_an_empty_row(backend: str, device: str) -> None:
    query, nothing = (
        torch.randn(2, 2, 5, 16, device=device, requires_grad=True),
        torch.randn(2, 2, 0, 16, device=device),
    )
    out, lse = attention(query, nothing, nothing, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -INF).all()
    (grad,) = torch.autograd.grad((out, lse), query, (torch.ones_like(out), torch.ones_like(lse)))
    assert (grad == 0).all()


@every_backend
def test_one_query_and_one_key(backend: str, device: str) -> None:
    query, key, value = (torch.randn(3, 2, 1, 8, device=device) for _ in range(3))
    assert_equal_bits(attention(query, key, value, backend=backend), value)


@every_feature
def test_gradient_of_the_log_sum_exp_alone(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", len_k=33, key_mask="bool", is_causal=True), torch.float32, device, seed)
    inputs = replace(inputs, grad_out=torch.zeros_like(inputs.grad_out))
    actual = results(fused(backend), inputs)
    assert (actual["grad value"] == 0).all()
    assert_results_within_contract(actual, inputs)


@every_feature
def test_result_lies_in_memory_like_the_query(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", layout="BLHE", heads=3), torch.float32, device, seed)
    if backend != "reference":
        out = fused(backend)(inputs.query, inputs.key, inputs.value)[0]
        assert out.transpose(1, 2).is_contiguous()
