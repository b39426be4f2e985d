"""Random problems against the float64 oracle: shapes, strides, masks and features drawn together."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.cases import Case, Inputs, make_inputs
from tests.kernels.attention.eager import assert_results_within_contract, eager, eager_attention, fused, results
from tests.kernels.attention.lanes import interpreted

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

MASKS = ("LS", "1S", "L1", "1HLS", "B1LS", "BHLS", "B11S", "1H1S", "BHL1", "BH1S")
SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def cases(draw: hypothesis.strategies.DrawFn, longest: int, widest: int, batch: int) -> Case:
    """Any problem of the public function: small ones for the interpreter, larger ones for the rest."""
    lengths, dims = st.integers(2, longest), st.integers(1, widest)
    heads, heads_kv = draw(st.sampled_from([(1, None), (2, None), (2, 1), (4, 2), (3, 3)]))
    window = st.one_of(st.none(), st.tuples(*[st.one_of(st.none(), st.integers(0, longest))] * 2))
    mask = draw(st.sampled_from(["", "bool", "float", "float32"]))
    return Case(
        "drawn",
        batch=draw(st.integers(1, batch)),
        heads=heads,
        heads_kv=heads_kv,
        len_q=draw(st.integers(1, longest)),
        len_k=draw(lengths),
        head_dim=draw(dims),
        value_dim=draw(dims),
        is_causal=draw(st.booleans()),
        causal_alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        window=draw(window),
        scale=draw(st.sampled_from([None, 0.3, -0.1])),
        softcap=draw(st.sampled_from([None, 3.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        mask=mask and f"{mask} {draw(st.sampled_from(MASKS))} {draw(st.sampled_from(['', 'transposed', 'expanded']))}",
        key_mask=draw(st.sampled_from(["", "bool", "float"])),
        alibi=draw(st.sampled_from(["", "H", "BH"])),
        sinks=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "BLHE", "LBHE", "packed", "last stride", "shared heads", "shared batch"])),
    )


# No shrinking: the interpreter would take minutes, and a problem drawn is small already.
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
settings = functools.partial(hypothesis.settings, deadline=None, phases=PHASES)
# Half precision, whose rounding errors are many and alike: the bound is then not a matter of luck on a handful of numbers.
DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


def draw_inputs(case: Case, dtype: torch.dtype, number: int) -> Inputs:
    """Inputs whose rows see several keys. Where one key has all the weight the gradients of query and key are 0 by cancellation,
    exactly so in eager's softmax, and a bound relative to such an error and such a result says nothing."""
    inputs = make_inputs(case, dtype, "cpu", number)
    double = inputs.to(torch.float64)
    options = {name: x for name, x in double.options.items() if name not in ("dropout_p", "seed")}
    _, _, weights = eager_attention(double.query, double.key, double.value, **options)
    hypothesis.assume(bool(weights.square().sum(-1).mean() < 0.4))
    return inputs


@settings(max_examples=60)
@hypothesis.given(case=cases(longest=70, widest=100, batch=3), dtype=DTYPES, number=SEEDS)
def test_reference_on_any_problem(case: Case, dtype: torch.dtype, number: int) -> None:
    inputs = draw_inputs(case, dtype, number)
    assert_results_within_contract(results(fused("reference"), inputs), inputs)


@settings(max_examples=60)
@hypothesis.given(case=cases(longest=70, widest=100, batch=3), number=SEEDS)
def test_reference_on_any_problem_in_float64(case: Case, number: int) -> None:
    inputs = make_inputs(case, torch.float32, "cpu", number).to(torch.float64)
    actual, expected = results(fused("reference"), inputs), results(eager(), inputs)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name])


@interpreted
@settings(max_examples=20)
@hypothesis.given(case=cases(longest=35, widest=40, batch=2), number=SEEDS)
def test_kernels_on_any_problem(case: Case, number: int) -> None:
    inputs = draw_inputs(case, torch.float16, number)
    assert_results_within_contract(results(fused("triton"), inputs), inputs)


@settings(max_examples=60)
@hypothesis.given(
    case=cases(longest=70, widest=100, batch=3).map(
        lambda c: Case(
            "drawn", batch=c.batch, heads=c.heads, heads_kv=c.heads_kv, len_q=c.len_q, len_k=c.len_k, head_dim=c.head_dim,
            is_causal=c.is_causal, causal_alignment=c.causal_alignment, window=c.window, layout=c.layout, key_mask=c.key_mask and "bool",
            mask="" if c.mask.startswith("float") or "1S" in c.mask else c.mask,
        )
    ),
    dtype=DTYPES,
    number=SEEDS,
)  # fmt: skip
def test_torch_on_any_problem(case: Case, dtype: torch.dtype, number: int) -> None:
    hypothesis.assume(not (case.len_q == 1 and case.mask and (case.heads_kv or case.key_mask)))  # a key mask of each head
    inputs = draw_inputs(case, dtype, number)
    assert_results_within_contract(results(fused("torch"), inputs, with_lse=False), inputs)
