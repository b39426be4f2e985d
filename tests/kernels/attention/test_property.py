"""Random problems against the float64 oracle: shapes, strides, masks and features drawn together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.cases import Case, make_inputs
from tests.kernels.attention.eager import eager, fused, results
from tests.lanes import every_level, interpreted
from tests.tolerances import assert_no_mistake

pytest.importorskip("hypothesis")
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

MASKS = ("LS", "1S", "L1", "1HLS", "B1LS", "BHLS", "B11S", "1H1S", "BHL1", "BH1S")
SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def cases(draw: st.DrawFn, longest: int, widest: int, batch: int) -> Case:
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
        layout=draw(
            st.sampled_from(["contiguous", "BLHE", "LBHE", "packed", "last stride", "shared heads", "shared batch"])
        ),
    )


# No shrinking: the interpreter would take minutes, and a problem drawn is small already.
some = partial(settings, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


def check(backend: str, case: Case, number: int) -> None:
    with_lse = backend != "torch"
    inputs = make_inputs(case, torch.float32, "cpu", number)
    actual = results(fused(backend), inputs, with_lse)
    truth = results(eager(), inputs.to(torch.float64), with_lse)
    for name, x in actual.items():
        assert_no_mistake(x, truth[name], name)


@some(max_examples=100)
@given(case=cases(longest=70, widest=100, batch=3), number=SEEDS)
def test_reference_on_any_problem(case: Case, number: int) -> None:
    inputs = make_inputs(case, torch.float32, "cpu", number).to(torch.float64)
    actual, expected = results(fused("reference"), inputs), results(eager(), inputs)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name])


@interpreted
@some(max_examples=20)
@given(case=cases(longest=35, widest=40, batch=2), number=SEEDS)
def test_kernels_on_any_problem(case: Case, number: int) -> None:
    check("triton", case, number)


@every_level
@some(max_examples=40)
@given(case=cases(longest=150, widest=100, batch=3), number=SEEDS)
def test_native_kernels_on_any_problem(case: Case, number: int, level: str) -> None:
    check("cpu", case, number)


def without_what_torch_refuses(case: Case) -> Case:
    mask = "" if "1S" in case.mask or (case.len_q == 1 and case.heads_kv) else case.mask.replace("float32", "float")
    return replace(case, softcap=None, dropout_p=0.0, alibi="", sinks=False, mask=mask)


@some(max_examples=100)
@given(case=cases(longest=70, widest=100, batch=3).map(without_what_torch_refuses), number=SEEDS)
def test_torch_on_any_problem(case: Case, number: int) -> None:
    check("torch", case, number)
