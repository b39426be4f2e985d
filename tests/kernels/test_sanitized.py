"""One small call of every kernel, forward and backward, for compute-sanitizer, under which a test takes minutes.

The sizes are odd, so that a tile at every edge is cut. Each tensor is an allocation of its own (benchmarks/gpu.sh).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedformer.functional import (
    attention,
    attention_weights,
    attention_with_kvcache,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    feed_forward,
    linear,
)
from tests.lanes import compiled

pytestmark = pytest.mark.gpu

BACKENDS = ["triton", pytest.param("cuda", marks=compiled)]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float16, device="cuda", requires_grad=True)


def differentiate(out: Tensor) -> None:
    out.backward(torch.randn_like(out))
    torch.cuda.synchronize()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sanitized_attention(backend: str, is_causal: bool) -> None:
    query, key, value = random(2, 4, 131, 72), random(2, 2, 205, 72), random(2, 2, 205, 40)
    differentiate(attention(query, key, value, is_causal=is_causal, enable_gqa=True, backend=backend))


def test_sanitized_attention_with_everything() -> None:
    query, key, value, mask = random(2, 2, 67, 40), random(2, 2, 133, 40), random(2, 2, 133, 40), random(2, 67, 133)
    key_mask = torch.arange(133, device="cuda") < torch.tensor([[70], [133]], device="cuda")
    options = {"dropout_p": 0.2, "key_mask": key_mask, "softcap": 5.0, "sinks": random(2), "window": (50, 9)}
    differentiate(attention(query, key, value, mask, **options, backend="triton"))  # type: ignore[call-overload]
    with torch.no_grad():
        _, lse = attention(query, key, value, return_lse=True, backend="triton")
        attention_weights(query, key, lse, backend="triton")
        torch.cuda.synchronize()


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_sanitized_decoding(backend: str, page: int | None) -> None:
    lengths = torch.tensor([300, 0, 77], device="cuda")
    table = None if page is None else torch.randperm(60, device="cuda", dtype=torch.int32).view(3, 20)
    key_cache, value_cache = (random(*((3, 2, 320, 72) if page is None else (60, 2, page, 72))) for _ in range(2))
    query, key, value = random(3, 8, 2, 72), random(3, 2, 2, 72), random(3, 2, 2, 72)
    attention_with_kvcache(
        query, key_cache, value_cache, lengths, key=key, value=value, block_table=table, backend=backend
    )
    torch.cuda.synchronize()


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "feed_forward": lambda x: feed_forward(
        x, random(200, 72), random(72, 200), random(200), random(72), dropout_p=0.1, residual=x, backend="triton"
    ),
    "gated feed_forward": lambda x: feed_forward(
        x, random(200, 72), random(72, 200), activation="silu", gate_weight=random(200, 72), backend="triton"
    ),
    "linear": lambda x: linear(x, random(136, 72), random(136), backend="triton"),
    "layer_norm": lambda x: dropout_add_layer_norm(
        x, random(133, 72), random(72), random(72), dropout_p=0.1, backend="triton"
    ),
    "rms_norm": lambda x: dropout_add_rms_norm(x, random(133, 72), random(72), dropout_p=0.1, backend="triton"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_sanitized_layer(name: str) -> None:
    differentiate(LAYERS[name](random(133, 72)))
