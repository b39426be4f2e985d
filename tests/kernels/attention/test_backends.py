"""Which backend takes which attention problem, and why each other one refuses it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fusedformer import BackendRefused, use_backend
from fusedformer.functional import attention, attention_weights
from fusedformer.kernels.common import native
from fusedformer.kernels.common.backend import record_decisions
from tests.cases import CASES, Case, make_inputs
from tests.kernels.attention.eager import assert_results_within_contract, fused, results
from tests.lanes import built, interpreted

FLASH = Case("", heads=2)
BUILT = native.EXTENSION.path is not None
BY_AUTO = "cpu" if BUILT else "torch"


def decide(inputs: Any, **given: Any) -> Any:
    with record_decisions() as explanation:
        attention(inputs.query, inputs.key, inputs.value, **inputs.options, **given)
    (decision,) = explanation.decisions
    return decision


def refuses(backend: str, inputs: Any, **given: Any) -> list[str]:
    """What this backend says, asked for by name."""
    with pytest.raises(BackendRefused) as caught:
        attention(inputs.query, inputs.key, inputs.value, **inputs.options, **given, backend=backend)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f'backend="{backend}" refuses attention(query ')
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["cuda", "triton", "cpu", "torch", "reference"]
    (said,) = (line.split(": ", 1)[1] for line in lines if line.startswith(f"  {backend}: "))
    return said.split("; ")


def taken_by_torch(case: Case, dtype: torch.dtype) -> bool:
    """With a gradient for every float mask; that of a mask for each key comes in float32."""
    per_key = case.key_mask == "float" or ("float" in case.mask and "1S" in case.mask)
    rounded = "float32" in case.mask or (per_key and dtype != torch.float32)
    return not (case.alibi or case.sinks or case.softcap or case.dropout_p or rounded)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{dtype}")
        for case in CASES
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if taken_by_torch(case, dtype)
    ],
)
def test_torch_holds_the_contract(case: Case, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, "cpu", seed)
    assert_results_within_contract(results(fused("torch"), inputs, with_lse=False), inputs)


TORCH_REFUSES: list[tuple[Case, dict[str, Any], str]] = [
    (Case("", alibi="H"), {}, "SDPA has no alibi_slopes"),
    (Case("", sinks=True), {}, "SDPA has no sinks"),
    (Case("", softcap=1.0), {}, "SDPA has no softcap"),
    (FLASH, {"return_lse": True}, "SDPA returns no log-sum-exp"),
    (Case("", dropout_p=0.5), {}, "torch draws its own dropout mask, a seed was given"),
    (Case("", mask="bool 1H1S", heads=4, heads_kv=2), {},
     "a key mask for each query head would need each group's keys and values copied for each head"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "given", "reason"), TORCH_REFUSES, ids=[reason for _, _, reason in TORCH_REFUSES])
def test_torch_says_why_not(case: Case, given: dict[str, Any], reason: str, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    assert refuses("torch", inputs, **given) == [reason]
    decision = decide(inputs, **given)
    assert (decision.chosen, decision.refusals["torch"]) == ("cpu" if BUILT else "reference", [reason])


def test_torch_says_every_reason_at_once(seed: int) -> None:
    inputs = make_inputs(Case("", alibi="H", sinks=True, softcap=1.0, dropout_p=0.1), torch.float64, "cpu", seed)
    assert refuses("torch", inputs, return_lse=True) == [
        "SDPA has no alibi_slopes",
        "SDPA has no sinks",
        "SDPA has no softcap",
        "SDPA returns no log-sum-exp",
        "torch draws its own dropout mask, a seed was given",
        "float64 is left to the reference",
    ]


def test_torch_refuses_masks_that_it_would_round(seed: int) -> None:
    inputs = make_inputs(Case("", mask="float32 LS"), torch.bfloat16, "cpu", seed)
    assert refuses("torch", inputs) == ["attn_mask is float32, SDPA would round it to bfloat16"]
    trainable, _ = make_inputs(Case("", key_mask="float"), torch.float16, "cpu", seed).leaves()
    assert refuses("torch", trainable) == ["key_mask is float32, SDPA would round it to float16"]
    inputs = make_inputs(Case("", mask="float32 B11S"), torch.float16, "cpu", seed)
    assert refuses("torch", inputs) == ["key_mask is float32, SDPA would round it to float16"]


@pytest.mark.parametrize("size", ["batch", "len_q", "len_k"])
def test_torch_refuses_empty_tensors(size: str) -> None:
    shape = {"batch": 2, "len_q": 3, "len_k": 3} | {size: 0}
    query, key = torch.randn(shape["batch"], 2, shape["len_q"], 8), torch.randn(shape["batch"], 2, shape["len_k"], 8)
    with pytest.raises(BackendRefused, match="torch's kernels do not take empty tensors"):
        attention(query, key, key, backend="torch")
    assert attention(query, key, key).shape == query.shape


def test_native_kernels_say_why_not(seed: int) -> None:
    inputs = make_inputs(FLASH, torch.float32, "cpu", seed)
    if not BUILT:
        assert refuses("cpu", inputs) == [native.EXTENSION.absence]
    else:
        double = make_inputs(FLASH, torch.float64, "cpu", seed)
        assert refuses("cpu", double) == ["kernels are for float32, float16 and bfloat16, not float64"]
        coarse = torch.zeros(17, 17, dtype=torch.float8_e5m2)
        assert refuses("cpu", inputs, attn_mask=coarse) == ["kernels read no attn_mask of float8_e5m2"]
        meta = inputs.query.to("meta")
        with pytest.raises(BackendRefused, match="cpu: needs tensors on cpu, they are on meta"):
            attention(meta, meta, meta, backend="cpu")


@built
def test_auto_takes_the_native_kernels_on_the_cpu(seed: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs = make_inputs(Case("", head_dim=300, mask="float BHLS", alibi="BH", sinks=True), dtype, "cpu", seed)
        decision = decide(inputs, return_lse=True, softcap=1.0)
        assert decision.chosen == "cpu"
        assert decision.notes == [f"instruction set level {native.level()}"]
    leaves, _ = make_inputs(replace(FLASH, len_k=1025), torch.float32, "cpu", seed).leaves()
    rows = leaves.query.size(0) * leaves.query.size(1) * leaves.query.size(2)
    assert decide(leaves).workspace_bytes >= 4 * rows * (3 + leaves.query.size(3))


@interpreted
def test_auto_never_interprets(seed: int) -> None:
    inputs = make_inputs(FLASH, torch.float32, "cpu", seed)
    decision = decide(inputs)
    assert decision.chosen == BY_AUTO
    assert decision.refusals["triton"] == ["the interpreter (TRITON_INTERPRET=1) runs only when asked for by name"]
    decision = decide(inputs, backend="triton")
    assert decision.chosen == "triton"
    assert decision.notes == ["not verified on this architecture (interpreter)"]
    rows = inputs.query.shape[0] * inputs.query.shape[1] * inputs.query.shape[2]
    assert decision.workspace_bytes >= 4 * rows
    assert decision.workspace_bytes < inputs.query.nbytes


@interpreted
def test_triton_says_why_not(seed: int) -> None:
    reason = "kernels are for float32, float16 and bfloat16, not float64"
    assert refuses("triton", make_inputs(FLASH, torch.float64, "cpu", seed)) == [reason]
    for case in (Case("", head_dim=264), Case("", value_dim=512)):
        inputs = make_inputs(case, torch.float32, "cpu", seed)
        dims = f"E {inputs.query.size(3)} and Ev {inputs.value.size(3)}"
        assert refuses("triton", inputs) == [f"head dims up to 256, got {dims}"]
        assert attention(inputs.query, inputs.key, inputs.value).isfinite().all()


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu(seed: int) -> None:
    decision = decide(make_inputs(FLASH, torch.float16, "cuda", seed))
    assert decision.chosen == "triton"
    assert "not built" in decision.refusals["cuda"][0] or BUILT


def test_reference_takes_everything(seed: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        inputs = make_inputs(Case("", head_dim=300, alibi="BH", sinks=True), dtype, "cpu", seed)
        assert decide(inputs, return_lse=True, backend="reference").chosen == "reference"
    assert decide(inputs.to(torch.float64), return_lse=True).chosen == "reference"


def test_use_backend_reaches_attention(seed: int) -> None:
    inputs = make_inputs(FLASH, torch.float32, "cpu", seed)
    with use_backend("reference"):
        assert decide(inputs).chosen == "reference"
        assert decide(inputs, backend="torch").chosen == "torch"
    assert decide(inputs).chosen == BY_AUTO


def test_a_decision_reads_like_the_call(seed: int) -> None:
    inputs = make_inputs(
        Case("", heads=4, heads_kv=2, len_k=9, is_causal=True, key_mask="bool"), torch.float32, "cpu", seed
    )
    text = str(decide(inputs, backend="torch")).splitlines()
    assert text[0] == (
        "attention(query (2, 4, 17, 32), key (2, 2, 9, 32), value (2, 2, 9, 32), float32, cpu, "
        "key_mask (2, 4, 9) bool, window (-1, 0) at offset 0, precision torch)"
    )
    assert any(line.startswith("  torch      chosen, workspace ") for line in text)


def test_torch_workspace_is_the_mask_and_not_the_scores(seed: int) -> None:
    """Grouped heads with a float mask must not take the path that holds every score (ComfyUI#15135)."""
    inputs = make_inputs(Case("", heads=4, heads_kv=2, len_q=64, mask="float 11LS"), torch.float32, "cpu", seed)
    for needs_grad in (False, True):
        inputs.query.requires_grad_(needs_grad)
        assert decide(inputs, backend="torch").workspace_bytes == 64 * 64 * 4


@pytest.mark.parametrize("case", [FLASH, Case("", is_causal=True), Case("", key_mask="bool", value_dim=5)], ids=str)
def test_torch_gives_the_same_with_and_without_gradients(case: Case, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    without = attention(inputs.query, inputs.key, inputs.value, **inputs.options, backend="torch")
    leaves, _ = inputs.leaves()
    out = attention(leaves.query, leaves.key, leaves.value, **leaves.options, backend="torch")
    assert out.requires_grad
    assert torch.equal(out.detach(), without)


def test_weights_are_decided_by_themselves(seed: int) -> None:
    inputs = make_inputs(FLASH, torch.float32, "cpu", seed)
    with record_decisions() as explanation:
        _, lse = attention(inputs.query, inputs.key, inputs.value, return_lse=True)
        attention_weights(inputs.query, inputs.key, lse)
    assert [(x.operation, x.chosen) for x in explanation.decisions] == [
        ("attention", "cpu" if BUILT else "reference"),
        ("attention_weights", "cpu" if BUILT else "reference"),
    ]
    with pytest.raises(BackendRefused, match=r'backend="torch" refuses attention_weights\('):
        attention_weights(inputs.query, inputs.key, lse, backend="torch")
