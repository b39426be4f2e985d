"""Right before fast: a result's error against float64, held to the contract of ``tests/tolerances.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.cases import Inputs
from tests.kernels.attention.eager import ATTEMPTS, eager, expected, sdpa
from tests.tolerances import NORMS, assert_within_contract

from .peers import Results

# float64 attention of long sequences takes as long as all the rest: one head is enough, forward some rows of it.
SAMPLED_SCORES, SAMPLED_ROWS = 1 << 18, 512

if not __debug__:
    raise RuntimeError("python -O strips the assertions that the correctness gate is made of")


@dataclass(frozen=True)
class Verdict:
    """How far a result is from float64.

    Attributes:
        error: largest absolute error, in the tensor where it is largest next to eager's.
        eager_error: that of torch's eager computation in the same dtype, in the same tensor.
        tensor: which one that is: "out", or the gradient of an input.
        wrong: how the contract is broken; None while it holds.
        errors: the largest absolute error in each tensor.
    """

    error: float
    eager_error: float
    tensor: str
    wrong: str | None
    errors: dict[str, float] = field(default_factory=dict)


class Gate:
    """The truth for some heads of a case, and the judge of results for the whole of it.

    Args:
        inputs: of the whole case.
        direction: gradients are judged unless it is "forward".
        backend: that computes ours. What "torch" does is held to torch's SDPA too, as the tests hold it.
    """

    def __init__(self, inputs: Inputs, direction: str, backend: str = "") -> None:
        self._batches, self._heads_kv = _sampled(inputs)
        self._group = inputs.query.size(1) // inputs.key.size(1)
        self._rows = _sampled_rows(inputs, direction)
        sample = self._sample_of(inputs)
        if direction == "forward":
            self._truth, self._eager = _expected_output(sample, with_sdpa=backend == "torch")
        else:
            # Nothing here returns the log-sum-exp; a gradient of 0 keeps its share out of the others.
            sample = replace(sample, grad_lse=torch.zeros_like(sample.grad_lse))
            self._truth, self._eager = expected(sample, with_lse=backend != "torch")
            self._truth.pop("lse", None)
        batch, heads, len_q, _ = inputs.query.shape
        self.checked = f"{len(self._batches) * len(self._heads)} of {batch * heads} heads"
        if len(self._rows) < len_q:
            self.checked += f", {len(self._rows)} of {len_q} rows"

    @property
    def _heads(self) -> list[int]:
        return [head * self._group + i for head in self._heads_kv for i in range(self._group)]

    def judge(self, results: Results) -> Verdict:
        """The verdict on the results (``peers.results``) of the whole case."""
        return judge(self._results_of(results), self._truth, self._eager)

    def _sample_of(self, inputs: Inputs) -> Inputs:
        batches, rows, options = self._batches, self._rows, dict(inputs.options)
        if "key_mask" in options:
            options["key_mask"] = options["key_mask"][batches]
        if "attn_mask" in options:
            options["attn_mask"] = options["attn_mask"][:, self._heads]
        len_q, len_k = inputs.query.size(2), inputs.key.size(2)
        if len(rows) < len_q and options.pop("is_causal", False):
            options["attn_mask"] = torch.ones(len_q, len_k, dtype=torch.bool).tril()[rows].to(inputs.query.device)
        return replace(
            inputs,
            query=inputs.query[batches][:, self._heads][:, :, rows],
            key=inputs.key[batches][:, self._heads_kv],
            value=inputs.value[batches][:, self._heads_kv],
            grad_out=inputs.grad_out[batches][:, self._heads][:, :, rows],
            grad_lse=inputs.grad_lse[batches][:, self._heads][:, :, rows],
            options=options,
        )

    def _results_of(self, results: Results) -> Results:
        sampled = {}
        for name, x in results.items():
            heads = self._heads_kv if name in ("grad key", "grad value") else self._heads
            sampled[name] = x[:, heads] if name == "grad attn_mask" else x[self._batches][:, heads]
            if name == "out":
                sampled[name] = sampled[name][:, :, self._rows]
        return {name: sampled[name] for name in results}


def judge(results: Results, truth: Results, eager: Sequence[Results]) -> Verdict:
    """The verdict on results, tensor by tensor; ``truth`` in float64, ``eager`` torch's own, several times over."""
    assert results.keys() == truth.keys(), f"got {results.keys()}, expected {truth.keys()}"
    largest = NORMS["largest"]
    worst, wrong, all_errors = Verdict(0.0, 0.0, "", None), None, {}
    for name, expected_tensor in truth.items():
        attempts = [attempt[name] for attempt in eager]
        try:
            assert_within_contract(results[name], expected_tensor, attempts, name)
        except AssertionError as broken:
            wrong = wrong or str(broken)
        error, *eager_errors = (largest(x.double() - expected_tensor) for x in (results[name], *attempts))
        all_errors[name] = error
        verdict = Verdict(error, max(eager_errors), name, None)
        if not _ratio(verdict) < _ratio(worst):  # a NaN is worst of all
            worst = verdict
    return replace(worst, wrong=wrong, errors=all_errors)


def _ratio(verdict: Verdict) -> float:
    return verdict.error / max(verdict.eager_error, 1e-30)


def _expected_output(inputs: Inputs, with_sdpa: bool) -> tuple[Results, list[Results]]:
    """As ``expected``, of the output alone."""
    functions = [eager(attempt) for attempt in range(ATTEMPTS.get(inputs.query.dtype, 2))] + [sdpa] * with_sdpa

    def output(function: Callable[..., tuple[Tensor, ...]], x: Inputs) -> Results:
        return {"out": function(x.query, x.key, x.value, **x.options)[0]}

    return output(eager(), inputs.to(torch.float64)), [output(function, inputs) for function in functions]


def _sampled_rows(inputs: Inputs, direction: str) -> list[int]:
    """Which queries are: all, unless only their outputs are judged, each of which stands by itself."""
    len_q = inputs.query.size(2)
    by_place = {"attn_mask", "dropout_p"} & inputs.options.keys()
    if direction != "forward" or by_place or len_q * inputs.key.size(2) <= SAMPLED_SCORES:
        return list(range(len_q))
    return sorted({*torch.linspace(0, len_q - 1, SAMPLED_ROWS).long().tolist()})


def _sampled(inputs: Inputs) -> tuple[list[int], list[int]]:
    """Which batch entries and key heads are computed in float64: the first and the last, of long sequences the first.

    The gradient of a mask that the batch shares sums over all of it. A dropout mask is that of its place in the whole,
    which the first heads of the first entry keep.
    """
    batch, heads_kv = inputs.key.shape[:2]
    scores = inputs.query.size(2) * inputs.key.size(2)
    few = scores > SAMPLED_SCORES or "dropout_p" in inputs.options
    batches = list(range(batch)) if "attn_mask" in inputs.options else sorted({0} if few else {0, batch - 1})
    return batches, sorted({0} if few else {0, heads_kv - 1})
