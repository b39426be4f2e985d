"""The Hopper forward kernel, run on the host by the emulator of ``csrc/cuda/emulator``, against the float64 oracle; and
the emulator itself: its matrix products in every form, and the mistakes that it has to notice."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.cases import Case, make_inputs
from tests.kernels.attention.eager import eager_attention
from tests.kernels.attention.emulator import DTYPES, Forward, message, problem_of
from tests.lanes import emulated
from tests.tolerances import assert_equal_bits, assert_within_contract

INF, NAN = float("inf"), float("nan")

pytestmark = emulated

# Sizes about those of tiles: 64 queries of a warpgroup, 128 or 192 of a block, 128 keys, panels of 64 features.
LENGTHS = [(1, 1), (1, 200), (17, 63), (63, 17), (65, 65), (127, 129), (129, 127), (200, 1), (193, 260)]
FEATURES = [(40, 40), (64, 64), (72, 72), (80, 64), (128, 128), (64, 128), (128, 40), (8, 16)]
BOTTOM_RIGHT = "bottom_right"
CASES = (
    *(Case("lengths", batch=1, heads=1, len_q=q, len_k=k, head_dim=64) for q, k in LENGTHS),
    *(Case("features", batch=1, len_q=65, len_k=150, head_dim=e, value_dim=ev) for e, ev in FEATURES),
    *(
        Case(f"causal_{alignment}", 1, 1, len_q=q, len_k=k, head_dim=e, is_causal=True, causal_alignment=alignment)
        for alignment in ("top_left", BOTTOM_RIGHT)
        for q, k, e in ((65, 65, 128), (129, 300, 64), (300, 129, 64), (200, 63, 80), (1, 200, 128))
    ),
    Case("window left", 1, 1, len_q=300, head_dim=64, window=(70, None)),
    Case("window right", 1, 1, len_q=200, head_dim=128, window=(None, 40)),
    Case("window both", 1, 1, len_q=129, len_k=400, head_dim=64, window=(130, 50), causal_alignment=BOTTOM_RIGHT),
    Case("window of one", 1, 1, len_q=200, head_dim=72, window=(0, 0)),
    Case("window leaves rows empty", 1, 1, len_q=300, len_k=63, head_dim=64, window=(5, 3)),
    Case("window before all", 1, 1, len_q=300, len_k=65, head_dim=128, window=(None, 3), causal_alignment=BOTTOM_RIGHT),
    Case("window past all", 1, 1, len_q=400, len_k=65, head_dim=64, window=(20, None)),
    Case("window wide", 1, 1, len_q=65, head_dim=64, window=(1 << 40, 1 << 40)),
    Case("grouped", batch=2, heads=4, heads_kv=2, len_q=65, len_k=130, head_dim=64, is_causal=True),
    Case("grouped", batch=1, heads=3, heads_kv=1, len_q=130, len_k=65, head_dim=128),
    Case("many turns", batch=2, heads=4, len_q=65, len_k=200, head_dim=64),
    Case("many turns", batch=2, heads=4, len_q=17, len_k=65, head_dim=128, window=(20, 40)),
    Case("many heads", batch=3, heads=3, len_q=17, head_dim=64, is_causal=True),
    Case("many tiles", 1, 1, len_q=200, len_k=900, head_dim=64),
    Case("many tiles", 1, 1, len_q=129, len_k=900, head_dim=128, is_causal=True, causal_alignment=BOTTOM_RIGHT),
    Case("wide tiles", 1, 1, len_q=129, len_k=528, head_dim=128),
    Case("wide tiles", 1, 1, len_q=65, len_k=1003, head_dim=80),
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
def test_contract(case: Case, dtype: torch.dtype, seed: int, forward: Forward) -> None:
    inputs = make_inputs(case, dtype, "cpu", seed)

    def eager(dtype: torch.dtype, attempt: int = 0) -> tuple[Tensor, Tensor]:
        x = inputs.to(dtype)
        return eager_attention(x.query, x.key, x.value, **x.options, attempt=attempt)[:2]

    truth, truth_lse = eager(torch.float64)
    out, lse, lse_residual = forward(problem_of(inputs.query, inputs.key, inputs.value, inputs.options))
    assert_within_contract(out, truth, [eager(dtype, attempt)[0] for attempt in range(2)], "out")
    assert_within_contract(lse, truth_lse, [eager(torch.float32, attempt)[1] for attempt in range(2)], "lse")
    empty = truth_lse == -INF
    assert not out[empty].any()
    assert not lse_residual[empty].any()


def test_lse_residual(seed: int, forward: Forward) -> None:
    """Of 200 equal scores, large and exact, the log-sum-exp is the score and log 200: both parts together keep it."""
    torch.manual_seed(seed)
    query, key = torch.randint(30, 60, (1, 1, 70, 64)).bfloat16(), torch.randint(30, 60, (1, 1, 1, 64)).bfloat16()
    keys = key.expand(1, 1, 200, 64).contiguous()
    _, lse, lse_residual = forward(problem_of(query, keys, keys, {"scale": 1.0}))
    score = (query.double() @ key.double().mT)[..., 0]
    logarithm = torch.tensor(200.0, dtype=torch.float64).log().expand_as(score)
    assert_within_contract((lse.double() + lse_residual - score).float(), logarithm, logarithm.float())
    assert ((lse - score.float()) != logarithm.float()).any(), "the first part has it all: the scores are too small"


@pytest.mark.parametrize("schedule", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_any_order_of_threads_gives_the_same_bits(
    head_dim: int, schedule: int, seed: int, forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the hardware does early or late, and which warp runs first, changes no result."""
    case = Case("", 1, 2, heads_kv=1, len_q=200, len_k=700, head_dim=head_dim, window=(400, 90))
    inputs = make_inputs(case, torch.bfloat16, "cpu", seed)
    problem = problem_of(inputs.query, inputs.key, inputs.value, inputs.options)
    expected = forward(problem)
    monkeypatch.setenv("FUSEDFORMER_EMULATED_SEED", str(schedule))
    for x, y in zip(forward(problem), expected, strict=True):
        assert_equal_bits(x, y)


def test_masked_keys_change_nothing(seed: int, forward: Forward) -> None:
    """Whatever finite numbers are in keys that a query does not see: the largest there are."""
    inputs = make_inputs(Case("", 1, 1, len_q=65, len_k=200, head_dim=64), torch.bfloat16, "cpu", seed)
    options = {"is_causal": True}
    before = forward(problem_of(inputs.query, inputs.key, inputs.value, options))
    for x in (inputs.key, inputs.value):
        x[:, :, 65:] = torch.finfo(torch.bfloat16).max
    for x, y in zip(forward(problem_of(inputs.query, inputs.key, inputs.value, options)), before, strict=True):
        assert_equal_bits(x, y)


# ---- the emulator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [64, 96, 128])
@pytest.mark.parametrize("depth", [16, 80, 128])
@pytest.mark.parametrize("b_over", ["features", "rows"])
@pytest.mark.parametrize("a_over", ["features", "rows", "registers"])
def test_product(
    a_over: str, b_over: str, depth: int, n: int, dtype: torch.dtype, seed: int, emulator: ctypes.CDLL
) -> None:
    """Each operand's source and transposition, against the product as it is written."""
    torch.manual_seed(seed)
    a = torch.randint(-8, 9, (64, depth)).to(dtype)  # so small that every order of the sum is exact
    b = torch.randint(-8, 9, (depth, n)).to(dtype)
    a_tile = a.T.contiguous() if a_over == "rows" else a
    b_tile = b if b_over == "rows" else b.T.contiguous()
    d = torch.full((64, n), NAN)
    source = ["features", "rows", "registers"].index(a_over)
    pointers = (x.data_ptr() for x in (a_tile, b_tile, d))
    error = emulator.check_product(*pointers, n, depth, source, b_over == "rows", dtype == torch.bfloat16)
    assert message(error) == ""
    assert_equal_bits(d, a.float() @ b.float())


MISTAKES = {
    "none": "",
    "a barrier that too few arrive at": "deadlock.*128 threads from 0 on wait for the barrier at 8192 .* parity 0",
    "a warp that misses a named barrier": "deadlock; 96 threads from 0 on wait for barrier 3 of 128 threads",
    "a flag that a later block raises": "deadlock.*a flag to become 1",
    "a product without a fence": "a WGMMA without a wgmma_fence",
    "an accumulator that is read early": None,
    "an accumulator that is written early": "an accumulator was written while a WGMMA was under way",
    "a fragment that is written early": None,
    "a tile that is overwritten early": None,
    "a tile that is not fenced for WGMMA": None,
    "a product that nobody waits for": "a WGMMA that nobody waited for",
    "a load that nobody waits for": "a TMA load that nobody waited for",
    "a store outside shared memory": "4 bytes at 16384 of 9216 bytes",
    "a barrier that is not initialised": "a barrier at 8192 of shared memory that was not initialised",
    "a barrier that is not fenced": "a barrier at 8192 that was not shown to the others since its initialisation",
    "registers increased to fewer": "setmaxnreg to 24 from",
    "a flag before a store is written": "a flag raised before the thread's stores are written",
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_noticed(what: str, emulator: ctypes.CDLL) -> None:
    """By a message, or by a result that is wrong."""
    pattern, number = MISTAKES[what], list(MISTAKES).index(what)
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    result = torch.full((128, 32), NAN)
    error = message(emulator.check_mistake(ones.data_ptr(), result.data_ptr(), number))
    right = bool((result == 64).all())
    if pattern is None:
        assert error == ""
        assert not right
    elif pattern == "":
        assert error == ""
        assert right
    else:
        with pytest.raises(RuntimeError, match=pattern):
            raise RuntimeError(error)
