"""The CUDA kernels through the public functions: emulated anywhere, and on a GPU that has them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import BackendRefused, use_backend
from fusedformer.functional import attention, attention_weights
from fusedformer.kernels.attention import native_cuda
from fusedformer.kernels.common import cuda, verified
from fusedformer.kernels.common.backend import record_decisions
from tests.cases import CASES, Case, make_inputs
from tests.kernels.attention import caches
from tests.kernels.attention.caches import make_cache
from tests.kernels.attention.eager import assert_results_within_contract, fused, results
from tests.lanes import emulated, every_cuda
from tests.tolerances import assert_equal_bits

DTYPES = [torch.float16, torch.bfloat16]
# Of the smallest problems that take one tile of everything the kernels tell apart.
MORE = (
    Case("one of each", batch=1, heads=1, len_q=1, len_k=1, head_dim=8),
    Case("tiles", batch=1, heads=2, len_q=200, len_k=300, head_dim=64, is_causal=True, causal_alignment="bottom_right"),
    Case("wide", batch=1, heads=2, heads_kv=1, len_q=131, len_k=257, head_dim=128, value_dim=72, window=(100, 7)),
)


def is_taken(case: Case) -> bool:
    head_dims = (case.head_dim, case.value_dim or case.head_dim)
    without = case.mask or case.key_mask or case.alibi or case.sinks or case.softcap or case.dropout_p or case.precision
    return not without and all(size % 8 == 0 and size <= 128 for size in head_dims)


def test_ci_runs_the_kernels() -> None:
    assert os.environ.get("CI") != "true" or cuda.EMULATED.path is not None, cuda.EMULATED.absence


TAKEN = [case for case in (*CASES, *MORE) if is_taken(case)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TAKEN, ids=str)
@every_cuda
def test_kernels_hold_the_contract(backend: str, device: str, case: Case, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, device, seed)
    assert_results_within_contract(results(fused(backend), inputs), inputs)


CACHES = {
    name: options
    for name, options in caches.CASES.items()
    if all(options.get(key, 8) % 8 == 0 and options.get(key, 8) <= 256 for key in ("head_dim", "head_dim_v"))
}


@pytest.mark.parametrize("page", [None, 7, 64])
@pytest.mark.parametrize("name", CACHES)
@every_cuda
def test_a_cache_holds_the_contract(backend: str, device: str, name: str, page: int | None) -> None:
    cache = make_cache(**CACHES[name], dtype=torch.bfloat16)
    used = (cache.copy() if page is None else cache.paged(page)).to(device)
    caches.assert_right(*used(backend), cache.to(device))


def everything(x: Tensor, backend: str) -> list[Tensor]:
    """Output and gradients of attention of a tensor to itself."""
    query, key, value = (x.detach().requires_grad_() for _ in range(3))
    out = attention(query, key, value, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), torch.ones_like(out))]


@every_cuda
def test_what_does_not_lie_as_the_hardware_wants_it_is_copied(backend: str, device: str, seed: int) -> None:
    """Rows at odd places, one row in many places, features apart: the bits are those of dense tensors."""
    x = torch.randn(2, 2, 33, 40, device=device).half()
    odd = torch.randn(2 * 2 * 33 * 43 + 1, device=device).half()[1:].view(2, 2, 33, 43)[..., 2:42].copy_(x)
    broadcast, apart = x[:1, :, :1].expand(2, -1, 33, -1), x.transpose(2, 3).contiguous().transpose(2, 3)
    for given in (odd, broadcast, apart):
        dense = given.contiguous()
        assert given.stride() != dense.stride()
        found, expected = (everything(layout, backend) for layout in (given, dense))
        for name, actual, right in zip(("out", "query", "key", "value"), found, expected, strict=True):
            assert_equal_bits(actual, right, name)


@pytest.mark.parametrize(("batch", "len_q", "len_k"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
@every_cuda
def test_empty_tensors(backend: str, device: str, batch: int, len_q: int, len_k: int) -> None:
    query, key = (
        torch.randn(batch, 2, length, 16, device=device, dtype=torch.half, requires_grad=True)
        for length in (len_q, len_k)
    )
    out, lse = attention(query, key, key, return_lse=True, backend=backend)
    assert out.shape == query.shape
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    out.sum().backward()
    for x in (query, key):
        assert x.grad is not None
        assert (x.grad == 0).all()


@every_cuda
def test_backward_is_differentiable_and_compiles(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", batch=1, len_q=9, len_k=17, head_dim=16, is_causal=True), torch.half, device, seed)
    expected = results(fused(backend), inputs)
    compiled = torch.compile(fused(backend), fullgraph=True, backend="eager")
    for name, x in results(compiled, inputs).items():
        assert_equal_bits(x, expected[name], name)
    query = inputs.query.detach().requires_grad_()
    second = []
    for chosen in (backend, "reference"):
        out = attention(query, inputs.key, inputs.value, backend=chosen)
        (grad,) = torch.autograd.grad(out.float().square().sum(), query, create_graph=True)
        second.append(torch.autograd.grad(grad.float().square().sum(), query)[0])
    torch.testing.assert_close(*second, rtol=2e-2, atol=2e-2)


def refuses(**given: Any) -> list[str]:
    options: dict[str, Any] = {"dtype": torch.half, "head_dim": 16} | given
    dtype, head_dim = options.pop("dtype"), options.pop("head_dim")
    x = torch.randn(1, 2, 5, head_dim, dtype=dtype)
    with use_backend("cuda"), pytest.raises(BackendRefused) as caught:
        attention(x, x, x, **options)
    (said,) = (line for line in str(caught.value).splitlines() if line.startswith("  cuda: "))
    return said.removeprefix("  cuda: ").split("; ")


@emulated
def test_says_what_it_does_not_take() -> None:
    assert refuses(dtype=torch.float32) == ["kernels are for float16 and bfloat16, not float32"]
    assert refuses(head_dim=20) == ["head dims are multiples of 8 up to 128, got E 20 and Ev 20"]
    assert refuses(head_dim=136) == ["head dims are multiples of 8 up to 128, got E 136 and Ev 136"]
    assert refuses(dropout_p=0.5, softcap=1.0) == ["kernels have no softcap", "kernels have no dropout_p"]
    assert refuses(key_mask=torch.ones(1, 5, dtype=torch.bool)) == ["kernels have no key_mask"]
    assert refuses(attn_mask=torch.ones(5, 5, dtype=torch.bool)) == ["kernels have no attn_mask"]
    extras = {"alibi_slopes": torch.ones(2), "sinks": torch.ones(2).half()}
    assert refuses(**extras) == ["kernels have no alibi_slopes", "kernels have no sinks"]
    x = torch.randn(1, 2, 5, 16).half()
    with pytest.raises(BackendRefused, match="cuda: the CUDA extension holds no kernel for it"):
        attention_weights(x, x, torch.zeros(1, 2, 5), backend="cuda")


@emulated
def test_a_cache_whose_slots_lie_at_odd_places_is_refused() -> None:
    cache = make_cache([5], head_dim=16, dtype=torch.half)
    wider = torch.zeros(*cache.key_cache.shape[:3], 20).half()
    cache.key_cache = wider[..., :16].copy_(cache.key_cache)
    with pytest.raises(BackendRefused, match=r"cuda: slots start at multiples of 8 elements, key_cache has strides"):
        cache("cuda")


@emulated
def test_auto_never_takes_the_emulator() -> None:
    x = torch.randn(1, 1, 5, 16).half()
    with record_decisions() as explanation:
        attention(x, x, x)
    (decision,) = explanation.decisions
    assert decision.chosen != "cuda"
    assert decision.refusals["cuda"] == ["the emulator runs only when asked for by name"]


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if the extension were built and there were a Hopper GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda.ON_GPU, "absence", None)
    monkeypatch.setattr(cuda, "architecture", lambda device: "sm_90")
    return monkeypatch


def on_gpu(automatic: bool, architectures: tuple[str, ...] = native_cuda.HOPPER) -> list[str]:
    return cuda.refusals("attention", torch.device("cuda"), architectures, automatic)


def test_auto_takes_no_kernel_that_no_gpu_has_verified(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setattr(verified, "VERIFIED", {})
    assert on_gpu(automatic=True) == ["not yet verified on hardware (sm_90)"]
    assert on_gpu(automatic=False) == []
    a_gpu.setattr(verified, "VERIFIED", {("attention", "cuda", "sm_90"): "results"})
    assert on_gpu(automatic=True) == []


def test_a_gpu_that_nothing_was_compiled_for_is_refused(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setattr(cuda, "architecture", lambda device: "sm_80")
    assert on_gpu(automatic=False) == ["compiled for sm_90, this is sm_80"]
    assert on_gpu(automatic=False, architectures=native_cuda.AMPERE_AND_LATER) == []


def test_without_the_extension_it_says_why(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setattr(cuda.ON_GPU, "absence", "not built (nvcc is not there)")
    assert on_gpu(automatic=False) == ["not built (nvcc is not there)"]
    a_gpu.setattr(torch.version, "cuda", None)
    assert on_gpu(automatic=False) == ["torch is built without CUDA"]


def test_the_gradient_needs_no_dense_results(seed: int) -> None:
    """``aligned`` copies only what must be."""
    x: Tensor = torch.randn(2, 3, 5, 16).half()
    assert cuda.aligned(x) is x
    assert cuda.aligned(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    assert cuda.aligned(x[:, :, :1]).data_ptr() == x.data_ptr()
    for copied in (x[..., :8].flatten()[1:].view(1, 1, 1, -1)[..., :8], x[:1].expand(2, -1, -1, -1), x[..., ::2]):
        assert cuda.aligned(copied).data_ptr() != copied.data_ptr()
        assert torch.equal(cuda.aligned(copied), copied)
