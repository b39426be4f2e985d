"""The short way of plain calls on the CPU: the same bits as the long one, and left wherever there is more to a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedformer import explain, use_backend
from fusedformer.functional import attention, scaled_dot_product_attention
from fusedformer.kernels.common.backend import record_decisions
from tests.cases import Case, make_inputs
from tests.kernels.attention.eager import call
from tests.lanes import built
from tests.operators import is_short
from tests.tolerances import assert_equal_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

PLAIN: dict[str, dict[str, Any]] = {
    "defaults": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "grouped": {"heads": 4, "heads_kv": 2},
    "value dim": {"value_dim": 24, "len_k": 9},
    "BLHE": {"layout": "BLHE"},
    "LBHE": {"layout": "LBHE"},
    "packed": {"layout": "packed"},
    "one query": {"len_q": 1, "len_k": 33},
}


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("said", PLAIN)
def test_the_short_way_gives_what_the_long_one_does(
    said: str, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(replace(Case(""), **PLAIN[said]), dtype, "cpu", seed)
    tensors = (inputs.query, inputs.key, inputs.value)
    with record_decisions():  # which is never skipped
        long = attention(*tensors, **inputs.options, backend="cpu")
    for function in (attention, scaled_dot_product_attention):
        assert is_short(lambda: function(*tensors, **inputs.options), monkeypatch)  # noqa: B023
        short = function(*tensors, **inputs.options)
        assert_equal_bits(short, long)
        assert short.stride() == long.stride()


@built
def test_the_short_way_is_left_where_there_is_more_to_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(function: Callable[[], Any]) -> bool:
        return is_short(function, monkeypatch)

    inputs = make_inputs(Case("", len_k=17), torch.float32, "cpu", seed)
    tensors = query, key, value = inputs.query, inputs.key, inputs.value
    assert short(lambda: call(*tensors))
    mask = torch.ones(17, 17, dtype=torch.bool)
    for options in (
        {"attn_mask": mask}, {"key_mask": mask[:2]}, {"dropout_p": 0.5}, {"window": (3, 3)}, {"softcap": 1.0},
        {"alibi_slopes": torch.ones(2)}, {"sinks": torch.ones(2)}, {"return_lse": True}, {"backend": "torch"},
        {"backend": "reference"}, {"causal_alignment": "bottom_right"}, {"precision": "ieee"},
    ):  # fmt: skip
        assert not short(lambda: call(*tensors, **options)), options  # noqa: B023
    leaf = query.clone().requires_grad_()
    assert not short(lambda: call(leaf, key, value))
    assert call(leaf, key, value).requires_grad
    with torch.no_grad():
        assert short(lambda: call(leaf, key, value))
    with use_backend("reference"):
        assert not short(lambda: call(*tensors))
    with use_backend("cpu"):
        assert short(lambda: call(*tensors))
    with record_decisions() as explanation:
        assert not short(lambda: call(*tensors))
    assert explanation.backend == "cpu"
    assert explain(call, *tensors).backend == "cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not short(lambda: call(*tensors))
        assert call(*tensors).dtype == torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not short(lambda: call(*tensors))
        fake = mode.from_tensor(query)
        assert type(call(fake, fake, fake)) is type(fake)
    assert not short(lambda: torch.func.vmap(call)(*(x[None] for x in tensors)))
    assert not short(lambda: torch.func.grad(lambda x: call(x, key, value).sum())(query))
    assert not short(lambda: call(*(x.double() for x in tensors)))
    assert not short(lambda: call(*(x.mT.contiguous().mT for x in tensors)))
    assert not short(lambda: call(query[:0], key[:0], value[:0]))


BAD: list[tuple[str, dict[str, Any]]] = [
    ("key: got", {"key": torch.randn(2, 2, 17, 31)}),
    ("value: got", {"key": torch.randn(2, 4, 17, 32)}),
    ("value: got", {"value": torch.randn(2, 2, 16, 32)}),
    ("key: got", {"key": torch.randn(2, 4, 17, 32), "value": torch.randn(2, 4, 17, 32)}),
    ("value: got", {"value": torch.randn(3, 2, 17, 32)}),
    ("key: got", {"key": torch.randn(2, 2, 17, 32, dtype=torch.bfloat16)}),
    ("query: got", {"query": torch.zeros(2, 2, 17, 32, dtype=torch.int32)}),
    ("query: got", {"query": torch.randn(2, 2, 17)}),
    ("query: got", {"query": None}),
    ("key: got", {"key": None}),
    ("key: got", {"key": torch.randn(2, 2, 17, 32, device="meta")}),
    ("key: got", {"key": torch.nested.nested_tensor([torch.randn(2, 3)])}),
    ("value: got", {"value": torch.randn(2, 2, 17, 32).to_sparse()}),
    ("scale: got", {"scale": "1"}),
    ("scale: got", {"scale": torch.tensor(1.0)}),
    ("dropout_p: got", {"dropout_p": torch.tensor(0.0)}),
    ("dropout_p: got", {"dropout_p": "0"}),
    ("dropout_p: got", {"dropout_p": float("nan")}),
]  # fmt: skip


@built
@pytest.mark.parametrize(("message", "bad"), BAD, ids=[f"{number}-{said}" for number, (said, _) in enumerate(BAD)])
def test_the_short_way_lets_no_mistake_pass(message: str, bad: dict[str, Any]) -> None:
    good = {name: torch.randn(2, 2, 17, 32) for name in ("query", "key", "value")}
    with pytest.raises((TypeError, ValueError), match=message):
        attention(**good | bad)
    with pytest.raises((TypeError, ValueError), match="got"):
        scaled_dot_product_attention(**good | bad)
