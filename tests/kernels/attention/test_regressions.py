"""Numeric bugs that other attentions had, or have: each named by its public thread, each held here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedformer.functional import attention, scaled_dot_product_attention
from tests.cases import Case, Inputs, make_inputs
from tests.kernels.attention.eager import assert_results_within_contract, call, fused, results, sdpa
from tests.lanes import every_backend, every_feature, every_kernel
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract

INF = float("inf")


def check(backend: str, inputs: Inputs) -> dict[str, Tensor]:
    actual = results(fused(backend), inputs, with_lse=backend != "torch")
    assert_results_within_contract(actual, inputs)
    return actual


@every_backend
def test_a_padded_sample_does_not_touch_the_others_gradients(backend: str, device: str, seed: int) -> None:
    """pytorch#41508, #160064, #152028: NaN gradients of shared weights although the loss is of the other sample
    alone."""
    x = torch.randn(2, 9, 16, device=device)
    weight = torch.randn(16, 16, device=device, requires_grad=True)
    query, key, value = ((x @ weight).unflatten(-1, (2, 8)).transpose(1, 2) for _ in range(3))
    padding = torch.tensor([True, False], device=device)[:, None].expand(2, 9)
    out = attention(query, key, value, key_mask=padding, backend=backend)
    (grad,) = torch.autograd.grad(out[0].square().sum(), weight, retain_graph=True)
    alone = attention(query[:1], key[:1], value[:1], backend=backend)
    (expected,) = torch.autograd.grad(alone.square().sum(), weight)
    torch.testing.assert_close(grad, expected)
    assert (out[1] == 0).all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_finite_masks_are_not_exclusions(dtype: torch.dtype, backend: str, device: str) -> None:
    """Masks of finfo.min, as in Hugging Face's eager attention: an otherwise empty row is the mean of the values, and
    no product with log2(e) may overflow to -inf on the way."""
    lowest = torch.finfo(dtype).min
    query, key, value = torch.zeros(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    query, key, value = (x.to(device, dtype) for x in (query, key, value))
    mask = torch.zeros(5, 9, dtype=dtype, device=device)
    mask[0] = lowest
    mask[1, 3:] = lowest
    out = attention(query, key, value, mask, backend=backend)
    expected = torch.stack((value.double().mean(2), value[:, :, :3].double().mean(2)), dim=2)
    assert_no_mistake(out[:, :, :2], expected)
    everywhere = attention(
        query, key, value, key_mask=torch.full((1, 9), lowest, dtype=dtype, device=device), backend=backend
    )
    assert_no_mistake(everywhere, value.double().mean(2, keepdim=True).expand_as(out))


@every_feature
@pytest.mark.parametrize("size", [1e4, -1e4], ids=str)
def test_large_scores_do_not_overflow(size: float, backend: str, device: str) -> None:
    """exp(x) without its row's largest subtracted is inf, or 0/0, from |x| = 89. Here all scores are alike."""
    query = torch.ones(1, 2, 17, 8, device=device, requires_grad=True)
    key, value = torch.full((1, 2, 33, 8), size, device=device), torch.randn(1, 2, 33, 8, device=device)
    out, lse = attention(query, key, value, scale=0.125, backend=backend, return_lse=True)
    assert_no_mistake(out, value.double().mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, size + math.log(33)))
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), query)
    assert_no_mistake(grad, torch.full_like(grad, size / 8))


@every_backend
def test_a_masked_nan_does_not_leak(backend: str, device: str, seed: int) -> None:
    """pytorch#101967; transformers' padded caches hold whatever was there before."""
    inputs = make_inputs(Case("", len_k=9), torch.float32, device, seed)
    keep = torch.arange(9, device=device) < 6
    value, key = inputs.value.clone(), inputs.key.clone()
    value[:, :, 6:], key[:, :, 6:] = float("nan"), INF
    out = attention(inputs.query, key, value, key_mask=keep.expand(2, 9), backend=backend)
    assert_equal_bits(
        out, attention(inputs.query, inputs.key, inputs.value, key_mask=keep.expand(2, 9), backend=backend)
    )


@every_backend
@pytest.mark.parametrize("length", [64, 192])
def test_lengths_of_64_modulo_128_with_a_mask(length: int, backend: str, device: str, seed: int) -> None:
    """pytorch#196678, trl#7181: NaN in the gradient of the query."""
    case = Case("", batch=1, heads=1, len_q=length, head_dim=16, mask="bool LS")
    actual = check(backend, make_inputs(case, torch.float32, device, seed))
    assert actual["grad query"].isfinite().all()


@every_backend
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_few_key_heads(heads_kv: int, backend: str, device: str, seed: int) -> None:
    """pytorch#193893: silently wrong with fewer than eight key heads. Grouped heads are repeated ones."""
    inputs = make_inputs(
        Case("", batch=1, heads=8, heads_kv=heads_kv, len_q=1, len_k=33, head_dim=16), torch.float32, device, seed
    )
    check(backend, inputs)
    group = 8 // heads_kv
    repeated = replace(
        inputs, key=inputs.key.repeat_interleave(group, 1), value=inputs.value.repeat_interleave(group, 1), options={}
    )
    grouped, expected = (fused(backend)(x.query, x.key, x.value, **x.options)[0] for x in (inputs, repeated))
    torch.testing.assert_close(grouped, expected)


VIEWS = {
    "slots of stride 0": lambda x: x[:, :, :1].expand_as(x),
    "heads of stride 0": lambda x: x[:, :1].expand_as(x),
    "batch of stride 0": lambda x: x[:1].expand_as(x),
    "everything of stride 0": lambda x: x[:1, :1, :1].expand_as(x),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "reversed memory": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other slot": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "unaligned": lambda x: torch.cat((x.new_zeros(3), x.flatten()))[3:].view_as(x),
    "last dim of stride 2": lambda x: torch.stack((x, x * float("nan")), dim=-1)[..., 0],
}


@every_backend
@pytest.mark.parametrize(("view", "len_k"), [*((view, 33) for view in VIEWS), ("slots of stride 0", 32)])
def test_strides_change_no_bit(view: str, len_k: int, backend: str, device: str, seed: int) -> None:
    """pytorch#191937 (stride-0 key and value, len % 32 == 1), #112577, ROCm/pytorch#3230 (non-contiguous value)."""
    inputs = make_inputs(Case("", len_k=len_k), torch.float32, device, seed)
    seen = replace(
        inputs, key=VIEWS[view](inputs.key), value=VIEWS[view](inputs.value), query=VIEWS[view](inputs.query)
    )
    plain = replace(seen, key=seen.key.contiguous(), value=seen.value.contiguous(), query=seen.query.contiguous())
    found, expected = (results(fused(backend), x, with_lse=backend != "torch") for x in (seen, plain))
    for name, x in found.items():
        if backend != "triton":  # BLAS sums in an order that depends on the strides
            assert_no_mistake(x, expected[name].double(), name)
        else:
            assert_equal_bits(x, expected[name], name)


@every_backend
@pytest.mark.parametrize(
    "shape", [(2, 2, 9, 17), (1, 2, 9, 17), (2, 1, 9, 17), (1, 1, 9, 17), (9, 17), (2, 2, 1, 17), (1, 2, 9, 1)]
)
def test_gradient_of_a_broadcast_bias_in_its_own_shape(
    shape: tuple[int, ...], backend: str, device: str, seed: int
) -> None:
    """xformers#783, flash-attention#1219, pytorch#148476: refused, absent, or an illegal access when it alone has a
    gradient."""
    inputs = make_inputs(Case("", len_q=9, len_k=17), torch.float32, device, seed)
    leaf = torch.randn(shape, device=device, requires_grad=True)
    out = attention(inputs.query, inputs.key, inputs.value, leaf, backend=backend)
    (grad,) = torch.autograd.grad(out, leaf, inputs.grad_out)
    assert grad.shape == shape
    expanded = leaf.detach().expand(2, 2, 9, 17).clone().requires_grad_()
    out = sdpa(inputs.query.double(), inputs.key.double(), inputs.value.double(), expanded.double())[0]
    (full,) = torch.autograd.grad(out, expanded, inputs.grad_out.double())
    assert_no_mistake(grad, full.double().sum_to_size(shape))


@every_backend
def test_padded_cross_attention(backend: str, device: str, seed: int) -> None:
    """vllm-omni#5865, transformers#35032: wrong, once the keys have their own lengths and padding."""
    inputs = make_inputs(Case("", batch=3, len_q=5, len_k=33, key_mask="bool"), torch.float32, device, seed)
    actual = check(backend, inputs)["out"]
    lengths = inputs.options["key_mask"].sum(1).tolist()
    for number, length in enumerate(lengths):
        one = [x[number : number + 1] for x in (inputs.query, inputs.key[:, :, :length], inputs.value[:, :, :length])]
        torch.testing.assert_close(actual[number : number + 1], call(*one, backend=backend))


@every_feature
def test_padding_on_the_left(backend: str, device: str, seed: int) -> None:
    """pytorch#97111, #90866: fast paths that wanted left-aligned masks. The mask may be any."""
    inputs = make_inputs(Case("", len_q=17, is_causal=True), torch.float32, device, seed)
    keep = torch.arange(17, device=device) >= torch.tensor([[5], [0]], device=device)
    holes = torch.arange(17, device=device) % 3 != 1
    for mask in (keep, holes.expand(2, 17)):
        check(backend, replace(inputs, options={"is_causal": True, "key_mask": mask}))


@every_feature
@pytest.mark.parametrize("p", [0.02, 0.97])
def test_dropout_is_not_rounded_coarsely(p: float, backend: str, device: str) -> None:
    """pytorch#174245: a probability of 0.02 became 1/16, or 0."""
    query, key = torch.zeros(1, 1, 32, 8, device=device), torch.zeros(1, 1, 256, 8, device=device)
    value = torch.eye(256, device=device)[None, None, :, :128].contiguous()
    out = attention(query, key, value, dropout_p=p, backend=backend)
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - p) < 6 * (p * (1 - p) / out.numel()) ** 0.5


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_causality_and_a_mask_are_not_swapped_for_each_other(dropout_p: float) -> None:
    """pytorch#131254: a mask without effect once is_causal is said."""
    query, key, value = (torch.randn(1, 1, 5, 8) for _ in range(3))
    mask = torch.zeros(5, 5).index_fill(1, torch.tensor([0]), -INF)
    given = partial(attention, is_causal=True, dropout_p=dropout_p, seed=torch.tensor([1, 2]))
    out = given(query, key, value, mask)
    assert (out[:, :, 0] == 0).all()
    assert not torch.equal(out, given(query, key, value))
    with pytest.raises(ValueError, match="expected at most one"):
        scaled_dot_product_attention(query, key, value, mask, is_causal=True)


@pytest.fixture
def far_apart(tmp_path: Path) -> Iterator[Tensor]:
    """2^31 + 4096 float16 numbers in a sparse file: a few pages of disk and of memory."""
    path = tmp_path / "sparse"
    count = (1 << 31) + 4096
    with path.open("wb") as file:
        file.truncate(2 * count)
    yield torch.from_file(str(path), shared=True, size=count, dtype=torch.float16)
    path.unlink()


@every_kernel
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "slot"])
def test_offsets_of_64_bits(dim: int, backend: str, device: str, seed: int, far_apart: Tensor) -> None:
    """flash-attention#767, #1311, #2611: 32-bit offsets wrap around past 2^31 elements."""
    if device == "cuda":
        far_apart = torch.zeros(far_apart.numel(), dtype=torch.float16, device=device)
    shape, strides = [1, 1, 1, 16], [0, 0, 0, 1]
    shape[dim], strides[dim] = 2, 1 << 31
    query, key, value = (torch.as_strided(far_apart, shape, strides, storage_offset=512 * i) for i in range(3))
    for x in (query, key, value):
        x.copy_(torch.randn(shape))
    inputs = Inputs(query, key, value, torch.randn(shape).to(query), torch.randn(shape[:3], device=device))
    near = replace(inputs, query=query.contiguous(), key=key.contiguous(), value=value.contiguous())
    leaves, named = near.leaves()
    far, _ = inputs.leaves()
    out, lse = fused(backend)(far.query, far.key, far.value)
    expected, expected_lse = fused(backend)(leaves.query, leaves.key, leaves.value)
    assert_equal_bits(out.detach(), expected.detach())
    assert_equal_bits(lse.detach(), expected_lse.detach())
    found = torch.autograd.grad(out, [far.query, far.key, far.value], inputs.grad_out)
    for one, other in zip(found, torch.autograd.grad(expected, list(named.values()), inputs.grad_out), strict=True):
        assert_equal_bits(one, other)


@every_kernel
def test_offsets_of_64_bits_in_a_mask(backend: str, device: str, seed: int, far_apart: Tensor) -> None:
    if device == "cuda":
        far_apart = torch.zeros(far_apart.numel(), dtype=torch.float16, device=device)
    inputs = make_inputs(Case("", batch=1, heads=1, len_q=2, len_k=17, head_dim=16), torch.float16, device, seed)
    mask = torch.as_strided(far_apart, (1, 1, 2, 17), (0, 0, 1 << 31, 1))
    mask.copy_(torch.randn(mask.shape))
    near = results(fused(backend), replace(inputs, options={"attn_mask": mask.contiguous()}))
    out, _ = fused(backend)(inputs.query, inputs.key, inputs.value, attn_mask=mask)
    assert_equal_bits(out, near["out"])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_visible_key_is_copied(dtype: torch.dtype, backend: str, device: str) -> None:
    """The first row of causal attention is the first value, exactly: 1 * v / 1."""
    query, key, value = (torch.randn(2, 2, 17, 32, device=device).to(dtype) for _ in range(3))
    out = attention(query, key, value, is_causal=True, backend=backend)
    assert_equal_bits(out[:, :, 0], value[:, :, 0])


@every_feature
def test_log_sum_exp_of_an_empty_row_is_minus_infinity(backend: str, device: str) -> None:
    """flash-attention 2 says +inf, so that merging two partial results there gives NaN."""
    query, key = torch.randn(1, 1, 3, 8, device=device), torch.randn(1, 1, 4, 8, device=device)
    mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4], device=device)
    first = attention(query, key, key, mask, return_lse=True, backend=backend)
    second = attention(query, key, key, ~mask, return_lse=True, backend=backend)
    assert first[1][0, 0, 1] == -INF
    lse = torch.logaddexp(first[1], second[1])
    merged = sum(out * (part - lse).exp()[..., None] for out, part in (first, second))
    torch.testing.assert_close(merged, attention(query, key, key, backend=backend))


@every_feature
def test_half_precision_log_sum_exp_is_single(backend: str, device: str, seed: int) -> None:
    """Rounded to half it would cost backward three digits."""
    inputs = make_inputs(Case("", len_k=65), torch.float16, device, seed)
    _, lse = fused(backend)(inputs.query, inputs.key, inputs.value)
    assert lse.dtype == torch.float32
    scores = inputs.query.double() @ inputs.key.double().mT / 32**0.5
    eager = (inputs.query.float() @ inputs.key.float().mT / 32**0.5).logsumexp(-1)
    assert_within_contract(lse, scores.logsumexp(-1), eager)


@every_backend
def test_a_window_may_be_wider_than_any_position(backend: str, device: str, seed: int) -> None:
    """Positions and such a window do not add up to 32 bits."""
    inputs = make_inputs(Case("", len_k=33), torch.float32, device, seed)
    tensors = (inputs.query, inputs.key, inputs.value)
    for wide, unbounded in (((3, 2**31 - 1), (3, None)), ((2**31 - 1, 2), (None, 2))):
        out = attention(*tensors, window=wide, backend=backend)
        assert_equal_bits(out, attention(*tensors, window=unbounded, backend=backend))
