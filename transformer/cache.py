"""The keys and values that decoding keeps, so that a step reads them instead of computing them anew."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attention.api import attention
from ..kernels.attention.kvcache import attention_with_kvcache


class KVCache:
    """Keys and values of all layers, for a batch of sequences that grow at the same time.

    Memory is allocated here alone: later calls write in place, and none but :meth:`repeat` makes the host wait or
    replaces a tensor, so that a step of decoding may be captured in a CUDA graph. Prompts of unequal length are padded
    on the right: causality hides the padding, ``advance(lengths)`` leaves it behind, and what follows overwrites it.

    Args:
        layers: decoder layers.
        batch: sequences.
        heads: key and value heads, Hkv.
        head_dim: D of keys and of values.
        capacity: slots of each sequence, S_max; a paged cache rounds them up to whole pages.
        dtype, device: of keys and values.
        page: slots of a page; None for caches in one piece.

    Attributes:
        keys, values: per layer (B, Hkv, S_max, D); paged (blocks, Hkv, page, D).
        lengths: int32 (B,), the tokens that each row of the cache holds.
        block_table: int32 (B, pages), or None.
        memory: per layer keys and values (M, H, S, D) of the cross-attention; empty without one.
        memory_mask: (M, S) bool, True = takes part; None: all do.
        copies: B / M. After :meth:`repeat` rows ``m * copies`` to ``(m + 1) * copies - 1`` share row m of the memory:
            to attend to it, view their (B, L, ...) queries as (M, copies * L, ...).

    Raises:
        ValueError: a size is below 1.

    Source: pages as in PagedAttention (Kwon et al., 2023).
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        page: int | None = None,
    ) -> None:
        sizes = {"layers": layers, "batch": batch, "heads": heads, "head_dim": head_dim, "capacity": capacity}
        for name, size in {**sizes, "page": 1 if page is None else page}.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        self.page = page
        self.pages = 1 if page is None else -(-capacity // page)
        self.capacity = capacity if page is None else self.pages * page
        self.copies = 1
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.memory_mask: Tensor | None = None
        self._allocate(2 * layers, batch, heads, head_dim, dtype, device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._offsets = torch.arange(self.capacity, device=device)
        # What the host knows of ``lengths``: no row is shorter or longer.
        self._shortest = self._longest = 0
        self._common = 0  # slots that the copies of one row held when they were made
        self._added = 0  # slots that the layers have written since the last ``advance``

    def _allocate(
        self, caches: int, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        slots = self.capacity if self.page is None else self.page
        self._storage = torch.empty((caches, batch * self.pages, heads, slots, head_dim), dtype=dtype, device=device)
        self.keys, self.values = (list(half) for half in self._storage.chunk(2))
        self._page_numbers = torch.arange(self.pages, device=device)
        self._own_blocks = torch.arange(batch * self.pages, dtype=torch.int32, device=device).view(batch, self.pages)
        self.block_table = None if self.page is None else self._own_blocks.clone()

    @property
    def is_empty(self) -> bool:
        """Nothing has been kept yet."""
        return self._longest == 0

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int] | None = None
    ) -> Tensor:
        """Appends keys and values behind each row's length and attends to all of the row's, causally.

        Args:
            layer: whose cache.
            query: (B, H, L, D), standing where ``key`` does.
            key, value: (B, Hkv, L, D).
            window: as :func:`~fusedformer.functional.attention` takes it. What leaves it stays in the cache.

        Returns:
            (B, H, L, D). The lengths stay as they are until :meth:`advance`, as all layers append at the same place.

        Raises:
            ValueError: the cache has no room for L more.
        """
        self.reserve(key.size(2))
        if self.is_empty:
            self._fill(self.keys[layer], key)
            self._fill(self.values[layer], value)
            return attention(query, key, value, is_causal=True, enable_gqa=True, window=window)
        return attention_with_kvcache(
            query,
            self.keys[layer],
            self.values[layer],
            self.lengths,
            key=key,
            value=value,
            block_table=self.block_table,
            window=window,
        )

    def reserve(self, count: int) -> None:
        """Says that each layer appends ``count`` tokens now, as :meth:`attend` does by itself.

        Raises:
            ValueError: the cache has no room for them.
        """
        if self._longest + count > self.capacity:
            room = self.capacity - self._longest
            raise ValueError(f"key: got {count} tokens, expected at most {room}, as many as the cache has room for")
        self._added = count

    def _fill(self, cache: Tensor, new: Tensor) -> None:
        """The first slots of each row, which lie in blocks of its own."""
        new = new.detach()
        if self.page is None:
            cache[:, :, : new.size(2)] = new
            return
        rows = cache.unflatten(0, (-1, self.pages)).transpose(1, 2)  # (B, Hkv, pages, page, D)
        full, rest = divmod(new.size(2), self.page)
        rows[:, :, :full] = new[:, :, : full * self.page].unflatten(2, (full, self.page))
        if rest:
            rows[:, :, full, :rest] = new[:, :, full * self.page :]

    def positions(self, count: int) -> Tensor:
        """Int64 (B, count): where the next ``count`` tokens of each row stand."""
        return self.lengths[:, None] + self._offsets[:count]

    def offset(self, count: int) -> int | Tensor:
        """:meth:`positions`; or their length, where all rows on the CPU share one: an encoding looks that up."""
        if self._shortest == self._longest and self.lengths.is_cpu and not torch.compiler.is_compiling():
            return self._longest
        return self.positions(count)

    def advance(self, count: int | Tensor) -> None:
        """Keeps what all layers have appended: ``count`` tokens, of each row or, a tensor (B,), per row."""
        self.lengths += count
        self._longest += count if isinstance(count, int) else self._added
        self._shortest += count if isinstance(count, int) else 0

    def truncate(self, length: int) -> None:
        """Keeps no more than the first ``length`` tokens of each row, as if the others had not come.

        Raises:
            ValueError: ``length`` is negative, or rows are copies of each other.
        """
        if length < 0 or self.copies > 1:
            raise ValueError(f"length: got {length} for {self.copies} copies of a row, expected at least 0, and 1 copy")
        self.lengths.clamp_(max=length)
        self._shortest, self._longest = min(self._shortest, length), min(self._longest, length)

    def repeat(self, copies: int) -> None:
        """Puts ``copies`` of each row in its place, in new memory; the rows of ``memory`` they share.

        Raises:
            ValueError: ``copies`` is below 1, or the rows are copies already.
        """
        if copies < 1 or self.copies > 1:
            raise ValueError(f"copies: got {copies} after {self.copies}, expected at least 1, and that once")
        if copies == 1:
            return
        old, batch = self._storage, len(self.lengths)
        self._allocate(old.size(0), batch * copies, old.size(2), old.size(4), old.dtype, old.device)
        self.lengths = self.lengths.repeat_interleave(copies)
        self.copies, self._common = copies, self._shortest
        if self.is_empty:
            return
        # Pages are copied to the first of the copies alone, as the others share all but the last.
        shares = self.page is not None
        for new_cache, old_cache in zip(self._storage, old, strict=True):
            new_rows = self._used(new_cache, 0).unflatten(0, (batch, copies))
            (new_rows[:, :1] if shares else new_rows).copy_(self._used(old_cache, 0).unsqueeze(1))
        if shares:
            self._share_pages(torch.arange(0, batch * copies, copies, device=old.device).repeat_interleave(copies))

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row ``rows[i]``: of any, or after :meth:`repeat` of one of its own copies.

        Those are of one length, share the memory, and all that they held when they were made. So a paged cache copies
        one page of each row at most and renames the others, the same work at each step; a cache in one piece copies
        the slots that have been added since.

        Args:
            rows: int64 (B,).
        """
        if self.copies > 1 and self.page is not None:
            self._share_pages(rows)
            return
        for cache in self._storage:
            used = self._used(cache, self._common)
            used.copy_(used.index_select(0, rows))
        if self.copies == 1:
            self.lengths.copy_(self.lengths.index_select(0, rows))
            self.memory = [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in self.memory]
            if self.memory_mask is not None:
                self.memory_mask = self.memory_mask.index_select(0, rows)

    def _used(self, cache: Tensor, first: int) -> Tensor:
        """(B, pages, Hkv, slots, D), from slot ``first`` of a page to the last that any row uses; each row's own."""
        slots = cache.size(2)
        pages: Tensor = cache.unflatten(0, (-1, self.pages))[:, : -(-self._longest // slots)]
        return pages[:, :, :, first : min(self._longest, slots)]

    def _share_pages(self, rows: Tensor) -> None:
        """Full pages of row ``rows[i]`` also stand in the table of row i; the page being written is copied to its own.

        Block (i, j) of row i is written only while page j is the last of row i: once full it never changes, whoever
        shares it, as long as those that do are of one length.
        """
        assert self.block_table is not None
        assert self.page is not None
        last = (self.lengths.long() // self.page)[:, None]  # (B, 1)
        table = self.block_table.index_select(0, rows)
        if self.page > 1:  # a page of one slot is full or empty
            last.clamp_(max=self.pages - 1)
            source, target = table.gather(1, last)[:, 0], self._own_blocks.gather(1, last)[:, 0].long()
            for cache in self._storage:
                cache.index_copy_(0, target, cache.index_select(0, source))
        self.block_table.copy_(torch.where(self._page_numbers < last, table, self._own_blocks))
