"""Which feature runs on which backend: ``python -m benchmarks features``, the README's table, from the refusals.

A cell is what a backend's own ``refusals`` says of a problem with the feature, beyond what it says of a plain one: so
the table is the same on a machine without a GPU, or without the extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusedformer.kernels.attention.api import CANDIDATES
from fusedformer.kernels.attention.problem import AttentionProblem, canonical

LENGTH, KEYS, HEADS, HEAD_DIM = 6, 8, 4, 16


def _problem(dtype: torch.dtype = torch.float16, gradients: bool = False, **features: Any) -> AttentionProblem:
    heads_kv, value_dim = features.pop("heads_kv", HEADS), features.pop("value_dim", HEAD_DIM)
    query, key, value = (
        torch.zeros(2, heads, length, dim, dtype=dtype, requires_grad=gradients)
        for heads, length, dim in ((HEADS, LENGTH, HEAD_DIM), (heads_kv, KEYS, HEAD_DIM), (heads_kv, KEYS, value_dim))
    )
    settings: dict[str, Any] = {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": True,
        "key_mask": None,
        "causal_alignment": "top_left",
        "window": None,
        "softcap": None,
        "alibi_slopes": None,
        "sinks": None,
        "precision": None,
        "seed": None,
        "return_lse": False,
    }
    return canonical(query, key, value, **{**settings, **features})


def _features() -> dict[str, AttentionProblem]:
    padding = torch.ones(2, KEYS, dtype=torch.bool)
    mask, bias = torch.ones(LENGTH, KEYS, dtype=torch.bool), torch.zeros(1, HEADS, LENGTH, KEYS).half()
    learned = bias.clone().requires_grad_()
    return {
        "cross attention, any strides": _problem(),
        "gradients": _problem(gradients=True),
        "causal, both alignments": _problem(is_causal=True, causal_alignment="bottom_right"),
        "key padding `(B, S)`": _problem(key_mask=padding),
        "causal + key padding": _problem(is_causal=True, key_mask=padding),
        "bool mask": _problem(attn_mask=mask),
        "float mask, any broadcast shape": _problem(attn_mask=bias),
        "gradient of a float mask": _problem(attn_mask=learned, gradients=True),
        "sliding window": _problem(window=(3, 0)),
        "grouped heads (GQA, MQA)": _problem(heads_kv=1),
        "Ev != E": _problem(value_dim=24),
        "dropout": _problem(dropout_p=0.1, gradients=True),
        "dropout from a given seed": _problem(dropout_p=0.1, seed=torch.zeros(2, dtype=torch.int64)),
        "softcap": _problem(softcap=30.0),
        "ALiBi": _problem(alibi_slopes=torch.ones(HEADS)),
        "attention sinks": _problem(sinks=torch.zeros(HEADS)),
        "log-sum-exp, `need_weights` from it": _problem(return_lse=True),
        "float16, the rows above": _problem(),
        "float32": _problem(torch.float32),
        "bfloat16": _problem(torch.bfloat16),
        "float64": _problem(torch.float64),
    }


def table() -> str:
    """The table in Markdown."""
    plain = {name: candidate.refusals(_problem(), False) for name, candidate in CANDIDATES.items()}
    lines = ["| | " + " | ".join(f"`{name}`" for name in CANDIDATES) + " |", "|---" * (len(CANDIDATES) + 1) + "|"]
    for feature, problem in _features().items():
        cells = []
        for name, candidate in CANDIDATES.items():
            reasons = [reason for reason in candidate.refusals(problem, False) if reason not in plain[name]]
            cells.append("; ".join(reasons) if reasons else "yes")
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Prints the table."""
    print(table())
    return 0
