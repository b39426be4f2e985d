"""What every backend of ``attention_with_kvcache`` is handed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..common.checks import dtype_name


class KVCacheProblem(NamedTuple):
    """What a backend decides on and computes; the order is that of the operators' schemas."""

    query: Tensor  # (B, H, L, E), unit last stride, as all that follow
    key_cache: Tensor  # (B, Hkv, S_max, E), or (blocks, Hkv, page, E) with a block table
    value_cache: Tensor  # the same with Ev
    cache_seqlens: Tensor  # (B,), before the append
    key: Tensor | None  # (B, Hkv, L_new, E)
    value: Tensor | None
    block_table: Tensor | None  # int32 (B, n)
    alibi_slopes: Tensor | None  # (B, H), float32
    sinks: Tensor | None  # (B, H)
    scale: float
    window_left: int  # keys back from the position, -1 = unbounded
    window_right: int  # keys ahead of it, -1 = unbounded, 0 = causal
    softcap: float  # 0 = none

    @property
    def appended(self) -> int:
        return 0 if self.key is None else self.key.size(2)

    @property
    def capacity(self) -> int:
        """Slots of one sequence."""
        pages = 1 if self.block_table is None else self.block_table.size(1)
        return self.key_cache.size(2) * pages

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}

    def __str__(self) -> str:
        parts = [f"{name} {tuple(x.shape)}" for name, x in self.tensors().items()]
        parts += [dtype_name(self.query.dtype), self.query.device.type]
        if self.window_left >= 0 or self.window_right >= 0:
            parts.append(f"window ({self.window_left}, {self.window_right})")
        parts += [f"softcap {self.softcap}"] if self.softcap else []
        return ", ".join(parts)
