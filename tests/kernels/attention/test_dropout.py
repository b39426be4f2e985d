"""Dropout as a function of (seed, element index): one mask on every kernel backend, in every tile, in both
directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusedformer.functional import attention
from fusedformer.kernels.common import philox
from tests.cases import Case, make_inputs
from tests.kernels.attention.eager import fused, results
from tests.lanes import every_feature, every_triton
from tests.tolerances import assert_equal_bits

LEN_Q, LEN_K = 33, 65


def seen_mask(backend: str, device: str, p: float, seed: Tensor, heads_kv: int = 3, **options: object) -> Tensor:
    """(B, H, L, S) bool: the weights that survive. Equal scores and one-hot values make the output the weights
    themselves."""
    query, key = torch.zeros(2, 3, LEN_Q, 8, device=device), torch.zeros(2, heads_kv, LEN_K, 8, device=device)
    value = torch.eye(LEN_K, device=device).expand(2, heads_kv, LEN_K, LEN_K).contiguous()
    out = attention(query, key, value, dropout_p=p, seed=seed, enable_gqa=True, backend=backend, **options)  # type: ignore[call-overload]
    assert isinstance(out, Tensor)
    kept = out != 0
    expected = philox.keep_scale(p) / LEN_K
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], expected))
    return kept


@every_feature
@pytest.mark.parametrize("heads_kv", [3, 1])
def test_the_mask_is_philox(heads_kv: int, backend: str, device: str) -> None:
    seed = philox.draw_seed(torch.device(device))
    expected = philox.keep_mask(seed, 2 * 3, LEN_Q, LEN_K, 0.3, philox.STREAM_ATTENTION)
    assert torch.equal(seen_mask(backend, device, 0.3, seed, heads_kv), expected.view(2, 3, LEN_Q, LEN_K))


@every_triton
@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 32)])
def test_the_mask_and_the_gradients_do_not_depend_on_the_tile(
    tile: tuple[int, int], backend: str, device: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedformer.kernels.attention import triton_launch
    from fusedformer.kernels.attention.config import Tile
    from tests.kernels.attention.eager import assert_results_within_contract

    chosen = Tile(*tile, num_warps=4, num_stages=1)
    monkeypatch.setattr(triton_launch, "pick_config", lambda *_: chosen)
    drawn = philox.draw_seed(torch.device(device))
    expected = philox.keep_mask(drawn, 2 * 3, LEN_Q, LEN_K, 0.3, philox.STREAM_ATTENTION)
    assert torch.equal(seen_mask(backend, device, 0.3, drawn), expected.view(2, 3, LEN_Q, LEN_K))
    inputs = make_inputs(Case("", batch=1, len_q=33, is_causal=True, dropout_p=0.4), torch.float32, device, seed)
    assert_results_within_contract(results(fused(backend), inputs), inputs)


@every_feature
def test_nothing_dropped_is_no_dropout(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", is_causal=True), torch.float32, device, seed)
    without = results(fused(backend), inputs)
    ignored = replace(
        inputs, options=inputs.options | {"dropout_p": 0.0, "seed": torch.zeros(2, dtype=torch.int64, device=device)}
    )
    for name, x in results(fused(backend), ignored).items():
        assert_equal_bits(x, without[name], name)


@every_feature
def test_everything_dropped(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", is_causal=True), torch.float32, device, seed)
    lse = results(fused(backend), inputs)["lse"]
    dropped = replace(inputs, options=inputs.options | {"dropout_p": 1.0}, grad_lse=torch.zeros_like(inputs.grad_lse))
    for name, x in results(fused(backend), dropped).items():
        if name == "lse":
            assert_equal_bits(x, lse)  # dropout comes after the softmax
        else:
            assert (x == 0).all(), name


@every_feature
def test_a_seed_repeats_and_another_does_not(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", dropout_p=0.5), torch.float32, device, seed)
    first, again = (results(fused(backend), inputs) for _ in range(2))
    for name, x in again.items():
        assert_equal_bits(x, first[name], name)
    for word in (0, 1):
        other = inputs.options["seed"].clone()
        other[word] ^= 1
        changed = replace(inputs, options=inputs.options | {"seed": other})
        assert not torch.equal(
            fused(backend)(changed.query, changed.key, changed.value, **changed.options)[0], first["out"]
        )


@every_feature
def test_without_a_seed_torchs_generator_decides(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", batch=1), torch.float32, device, seed)
    inputs = replace(inputs, options={"dropout_p": 0.5})
    torch.manual_seed(1)
    first, second = (results(fused(backend), inputs) for _ in range(2))
    torch.manual_seed(1)
    again = results(fused(backend), inputs)
    assert not torch.equal(first["out"], second["out"])
    for name, x in again.items():
        assert_equal_bits(x, first[name], name)  # the gradients too: backward regenerates forward's mask


def test_torch_draws_its_own_mask() -> None:
    query, key = torch.zeros(1, 1, 16, 8), torch.zeros(1, 1, 512, 8)
    value = torch.eye(512)[None, None]
    torch.manual_seed(1)
    out = attention(query, key, value, dropout_p=0.25, backend="torch")
    torch.manual_seed(1)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.25))
    assert 0.65 < (out != 0).float().mean() < 0.85
