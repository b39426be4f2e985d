"""The Hopper backward kernels, run on the host by the emulator of ``csrc/cuda/emulator``, against float64 gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref

import pytest
import torch
from torch import Tensor

from fusedformer.kernels.attention.problem import AttentionProblem
from fusedformer.kernels.common.library import gradient_like
from tests.cases import GUARD, Case, Inputs, make_inputs
from tests.kernels.attention.eager import expected
from tests.kernels.attention.emulator import (
    DTYPES,
    Forward,
    GradientsStruct,
    Tensor4,
    guarded,
    message,
    problem_of,
    problem_struct,
)
from tests.lanes import emulated
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract

pytestmark = emulated

Gradients = dict[str, Tensor]
Backward = Callable[..., Gradients]


@pytest.fixture
def backward(emulator: ctypes.CDLL, forward: Forward) -> Backward:
    """The gradients of a problem's query, key and value, as the kernels compute them from what the forward one left."""

    def run(p: AttentionProblem, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        results = forward(p)
        struct = problem_struct(p, *results)
        grads = guarded(*(gradient_like(x) for x in (p.query, p.key, p.value)))
        workspace_bytes = emulator.check_attention_backward_workspace(byref(struct))
        workspace = torch.full((workspace_bytes + 2 * GUARD,), 0xFF, dtype=torch.uint8)
        tensors = (Tensor4.of(x) for x in (grad_out, *(inner for _, inner in grads)))
        lse_pointer = None if grad_lse is None else grad_lse.data_ptr()
        given = GradientsStruct(*tensors, lse_pointer, workspace.data_ptr() + GUARD)
        assert message(emulator.check_attention_backward(byref(struct), byref(given))) == ""
        assert (workspace[:GUARD] == 0xFF).all()
        assert (workspace[-GUARD:] == 0xFF).all()
        for buffer, inner in grads:
            assert buffer.isnan().sum() == buffer.numel() - inner.numel(), "a result is NaN, or was written outside"
        return {f"grad {name}": inner for name, (_, inner) in zip(("query", "key", "value"), grads, strict=True)}

    return run


def gradients(backward: Backward, inputs: Inputs) -> Gradients:
    problem = problem_of(inputs.query, inputs.key, inputs.value, inputs.options)
    return backward(problem, inputs.grad_out, inputs.grad_lse)


# Sizes about those of tiles: 128 keys, 64 queries with features of more than 64, 128 with less.
LENGTHS = [(1, 1), (1, 200), (17, 63), (63, 17), (65, 65), (129, 127), (200, 1), (193, 260)]
FEATURES = [(40, 40), (64, 64), (72, 72), (80, 64), (128, 128), (64, 128), (128, 40), (8, 16)]
BOTTOM_RIGHT = "bottom_right"
CASES = (
    *(Case("lengths", batch=1, heads=1, len_q=q, len_k=k, head_dim=e) for q, k in LENGTHS for e in (64, 128)),
    *(Case("features", batch=1, len_q=65, len_k=150, head_dim=e, value_dim=ev) for e, ev in FEATURES),
    *(
        Case(f"causal_{alignment}", 1, 1, len_q=q, len_k=k, head_dim=e, is_causal=True, causal_alignment=alignment)
        for alignment in ("top_left", BOTTOM_RIGHT)
        for q, k, e in ((65, 65, 128), (300, 300, 64), (129, 300, 128), (300, 129, 64), (200, 63, 80), (1, 200, 128))
    ),
    Case("window left", 1, 1, len_q=300, head_dim=64, window=(70, None)),
    Case("window right", 1, 1, len_q=200, head_dim=128, window=(None, 40)),
    Case("window both", 1, 1, len_q=129, len_k=400, head_dim=64, window=(130, 50), causal_alignment=BOTTOM_RIGHT),
    Case("window narrow", 1, 1, len_q=300, len_k=400, head_dim=128, window=(10, 3)),
    Case("window of one", 1, 1, len_q=200, head_dim=72, window=(0, 0)),
    Case("window leaves rows empty", 1, 1, len_q=300, len_k=63, head_dim=64, window=(5, 3)),
    Case("window before all", 1, 1, len_q=300, len_k=65, head_dim=128, window=(None, 3), causal_alignment=BOTTOM_RIGHT),
    Case("window past all", 1, 1, len_q=400, len_k=65, head_dim=64, window=(20, None)),
    Case("window misses keys", 1, 1, len_q=65, len_k=400, head_dim=128, window=(20, 150)),
    Case("window wide", 1, 1, len_q=65, head_dim=64, window=(1 << 40, 1 << 40)),
    Case("grouped", batch=2, heads=4, heads_kv=2, len_q=65, len_k=130, head_dim=64, is_causal=True),
    Case("grouped", batch=1, heads=3, heads_kv=1, len_q=130, len_k=150, head_dim=128),
    Case("many heads", batch=3, heads=3, len_q=17, head_dim=64, is_causal=True),
    Case("many tiles", 1, 1, len_q=500, len_k=400, head_dim=64),
    Case("many tiles", 1, 1, len_q=400, len_k=500, head_dim=128, is_causal=True, causal_alignment=BOTTOM_RIGHT),
    Case("scale", 1, 1, len_q=65, len_k=130, head_dim=64, scale=-0.2),
    Case("scale", 1, 1, len_q=65, len_k=130, head_dim=64, scale=0.0, is_causal=True),
    Case("scale", 1, 1, len_q=65, len_k=130, head_dim=64, scale=2.0),
    *(
        Case("layout", batch=2, len_q=65, len_k=130, head_dim=40, value_dim=72, layout=layout)
        for layout in ("BLHE", "LBHE", "packed")
    ),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, dtype: torch.dtype, seed: int, backward: Backward) -> None:
    inputs = make_inputs(case, dtype, "cpu", seed)
    truth, attempts = expected(inputs)
    for name, grad in gradients(backward, inputs).items():
        assert_within_contract(grad, truth[name], [attempt[name] for attempt in attempts], name)


def test_without_gradient_of_lse(seed: int, backward: Backward) -> None:
    inputs = make_inputs(Case("", 1, 2, len_q=65, len_k=130, head_dim=64), torch.bfloat16, "cpu", seed)
    truth, attempts = expected(inputs, with_lse=False)
    problem = problem_of(inputs.query, inputs.key, inputs.value, inputs.options)
    for name, grad in backward(problem, inputs.grad_out, None).items():
        assert_within_contract(grad, truth[name], [attempt[name] for attempt in attempts], name)


@pytest.mark.parametrize("offset", [-1000, -70, 3, 1000])
def test_any_offset(offset: int, seed: int, backward: Backward) -> None:
    """Causal, with the queries far before the keys, or past them: what is empty has gradient 0."""
    inputs = make_inputs(Case("", 1, 1, len_q=150, len_k=150, head_dim=64), torch.bfloat16, "cpu", seed)
    problem = problem_of(inputs.query, inputs.key, inputs.value, {"is_causal": True})._replace(position_offset=offset)
    found = backward(problem, inputs.grad_out, inputs.grad_lse)
    mask = torch.arange(150)[None] <= torch.arange(150)[:, None] + offset
    inputs.options["attn_mask"] = mask[None, None]
    truth, attempts = expected(inputs)
    for name, grad in found.items():
        assert_within_contract(grad, truth[name], [attempt[name] for attempt in attempts], name)
    assert not found["grad query"][:, :, ~mask.any(1)].any()
    assert not found["grad key"][:, :, ~mask.any(0)].any()
    assert not found["grad value"][:, :, ~mask.any(0)].any()


@pytest.mark.parametrize("draw", range(12))
def test_drawn_bands(draw: int, seed: int, backward: Backward) -> None:
    """Blocks take turns by the band: two views of it that differ anywhere would wait for ever, or miss a turn."""
    generator = torch.Generator().manual_seed(seed + draw)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    len_q, len_k, head_dim = drawn(1, 400), drawn(1, 500), (64, 128)[draw % 2]
    sides = [None if drawn(0, 3) == 0 else drawn(0, 200) for _ in range(2)]
    options = {"causal_alignment": ("top_left", BOTTOM_RIGHT)[drawn(0, 2)], "window": (sides[0], sides[1])}
    case = Case("", 1, 2, heads_kv=1, len_q=len_q, len_k=len_k, head_dim=head_dim, **options)  # type: ignore[arg-type]
    inputs = make_inputs(case, torch.bfloat16, "cpu", seed)
    truth, _ = expected(inputs)
    for name, grad in gradients(backward, inputs).items():
        assert_no_mistake(grad, truth[name], f"{case} {options}: {name}")


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_any_order_of_threads_gives_the_same_bits(
    head_dim: int, schedule: int, seed: int, backward: Backward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run again, with what the hardware does early or late and the order of warps drawn at random."""
    case = Case("", 1, 2, heads_kv=1, len_q=400, len_k=150, head_dim=head_dim, window=(250, 90))
    inputs = make_inputs(case, torch.bfloat16, "cpu", seed)
    before = gradients(backward, inputs)
    monkeypatch.setenv("FUSEDFORMER_EMULATED_SEED", str(schedule))
    for name, grad in gradients(backward, inputs).items():
        assert_equal_bits(grad, before[name], name)


def test_keys_past_the_end_when_scores_are_far_below_zero(seed: int, backward: Backward) -> None:
    """Their score would be 0, and its exponential against the log-sum-exp of the others infinite."""
    inputs = make_inputs(Case("", 1, 1, len_q=65, len_k=65, head_dim=64, scale=1.0), torch.bfloat16, "cpu", seed)
    inputs.query.copy_(2.0 + inputs.query / 16)
    inputs.key.copy_(-2.0 + inputs.key / 16)
    truth, attempts = expected(inputs)
    for name, grad in gradients(backward, inputs).items():
        assert_within_contract(grad, truth[name], [attempt[name] for attempt in attempts], name)


def test_masked_keys_and_empty_rows_change_nothing(seed: int, backward: Backward) -> None:
    """Whatever finite numbers are in keys that no query sees, and whatever gradient comes to a row that sees no key."""
    inputs = make_inputs(Case("", 1, 1, len_q=165, len_k=200, head_dim=64), torch.bfloat16, "cpu", seed)
    inputs.options["window"] = (None, 0)
    problem = problem_of(inputs.query, inputs.key, inputs.value, inputs.options)._replace(position_offset=-100)
    before = backward(problem, inputs.grad_out, inputs.grad_lse)
    for x in (inputs.key, inputs.value):
        x[:, :, 65:] = torch.finfo(torch.bfloat16).max
    inputs.grad_lse[:, :, :100] = float("nan")
    for name, grad in backward(problem, inputs.grad_out, inputs.grad_lse).items():
        assert_equal_bits(grad, before[name], name)
