"""Attention problems, declared once for every lane of proof: each feature, each odd size, each layout, and mixtures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

GUARD = 64  # elements of NaN around an input, so that reading past it shows; keeps 16-byte alignment


@dataclass(frozen=True)
class Case:
    """One problem of ``fusedformer.functional.attention``.

    Attributes:
        name: the feature it is there for; with the shape it makes the test's id.
        mask: ``attn_mask`` as "dtype shape [layout]": dtype bool, float (that of query) or float32; shape a word of
            B, H, L, S and 1; layout "transposed" (L is the fastest dimension) or "expanded" (given as (B, H, L, S),
            stride 0 where 1).
        key_mask: "" for none, "bool" or "float".
        alibi: "" for none, "H" or "BH", the shape of the slopes.
        layout: of query, key and value in memory, see :func:`_laid_out`.
    """

    name: str
    batch: int = 2
    heads: int = 2
    heads_kv: int | None = None
    len_q: int = 17
    len_k: int | None = None
    head_dim: int = 32
    value_dim: int | None = None
    is_causal: bool = False
    causal_alignment: str = "top_left"
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    mask: str = ""
    key_mask: str = ""
    alibi: str = ""
    sinks: bool = False
    precision: str | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        grouped = "" if self.heads_kv is None else f":{self.heads_kv}"
        len_k, value_dim = self.len_k or self.len_q, self.value_dim or self.head_dim
        apart = "" if value_dim == self.head_dim else f":{value_dim}"
        shape = f"B{self.batch}-H{self.heads}{grouped}-L{self.len_q}-S{len_k}-E{self.head_dim}{apart}"
        said = " ".join(filter(None, (self.name, self.mask, "" if self.layout == "contiguous" else self.layout)))
        return f"{said.replace(' ', '_')}-{shape}"


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradients to send back through its results."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another floating dtype."""
        query, key, value, grad_out, grad_lse = (
            x.to(dtype) for x in (self.query, self.key, self.value, self.grad_out, self.grad_lse)
        )
        options = {name: x.to(dtype) if _is_floating(x) else x for name, x in self.options.items()}
        return Inputs(query, key, value, grad_out, grad_lse, options)

    def leaves(self) -> tuple[Inputs, dict[str, Tensor]]:
        """The same views, each differentiable one a leaf that requires a gradient; and those by name."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        named |= {name: self.options[name] for name in ("attn_mask", "key_mask", "sinks") if name in self.options}
        named = {name: x.detach().requires_grad_() for name, x in named.items() if _is_floating(x)}
        tensors = {name: named[name] for name in ("query", "key", "value")}
        options = {name: named.get(name, x) for name, x in self.options.items()}
        return replace(self, **tensors, options=options), named


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Random arguments for ``case``; the same numbers on every device."""
    c = case
    generator = torch.Generator().manual_seed(seed)
    len_k, value_dim = c.len_k or c.len_q, c.value_dim or c.head_dim
    heads_kv = c.heads_kv or c.heads
    sizes = {"B": c.batch, "H": c.heads, "L": c.len_q, "S": len_k, "1": 1}

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    options: dict[str, Any] = {}
    if c.scale is not None:
        options["scale"] = c.scale
    for name in ("is_causal", "window", "softcap", "dropout_p", "precision"):
        if getattr(c, name):
            options[name] = getattr(c, name)
    if c.causal_alignment != "top_left":
        options["causal_alignment"] = c.causal_alignment
    if c.heads_kv is not None:
        options["enable_gqa"] = True
    if c.dropout_p:
        options["seed"] = torch.randint(0, 1 << 32, (2,), generator=generator).to(device)
    if c.mask:
        kind, letters, *layout = c.mask.split()
        shape = [sizes[letter] for letter in letters]
        if kind == "bool":
            mask = _some(shape, 0.7, generator).to(device)
        else:
            excluded = _some(shape, 0.1, generator).to(device)
            mask = normal(*shape, dtype=dtype if kind == "float" else torch.float32).masked_fill(
                excluded, float("-inf")
            )
        if "transposed" in layout:
            mask = mask.mT.contiguous().mT
        if "expanded" in layout:
            mask = mask.expand(c.batch, c.heads, c.len_q, len_k)
        options["attn_mask"] = mask
    if c.key_mask:
        lengths = torch.randint((len_k + 1) // 2, len_k + 1, (c.batch, 1), generator=generator)
        padding = (torch.arange(len_k) >= lengths).to(device)
        options["key_mask"] = (
            ~padding if c.key_mask == "bool" else normal(c.batch, len_k).masked_fill(padding, float("-inf"))
        )
    if c.alibi:
        options["alibi_slopes"] = normal(*(sizes[letter] for letter in c.alibi), dtype=torch.float32).sigmoid() / 4
    if c.sinks:
        options["sinks"] = normal(c.heads)
    return Inputs(
        _laid_out(normal(c.batch, c.heads, c.len_q, c.head_dim), c.layout),
        _laid_out(normal(c.batch, heads_kv, len_k, c.head_dim), c.layout, shared=True),
        _laid_out(normal(c.batch, heads_kv, len_k, value_dim), c.layout, shared=True),
        normal(c.batch, c.heads, c.len_q, value_dim),
        normal(c.batch, c.heads, c.len_q, dtype=torch.promote_types(dtype, torch.float32)),
        options,
    )


def _some(shape: list[int], share: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) < share


def _is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _laid_out(x: Tensor, layout: str, shared: bool = False) -> Tensor:
    """``x`` (B, H, L, E) as a view with other strides. ``shared``: it is key or value, which may be expanded views."""
    batch, heads, length, dim = x.shape
    if layout == "BLHE":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "LBHE":
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if layout == "packed":  # one of three projections side by side; what is between its rows is NaN
        view = x.new_full((batch, length, 3, heads, dim), float("nan"))[:, :, 1].transpose(1, 2)
        return view.copy_(x)
    if layout == "last stride":
        return x.mT.contiguous().mT
    if layout == "shared heads":
        return x[:, :1].expand_as(x) if shared else x
    if layout == "shared batch":
        return x[:1].expand_as(x) if shared else x
    assert layout == "contiguous", layout
    buffer = x.new_full((x.numel() + 2 * GUARD,), float("nan"))
    return buffer[GUARD : GUARD + x.numel()].view_as(x).copy_(x)


CASES = (
    # sizes
    Case("plain"),
    Case("tiny", heads=8, len_q=1, len_k=3, head_dim=1),
    Case("one_query", len_q=1, len_k=65, head_dim=40),
    Case("one_key", heads=8, len_k=1, head_dim=5, sinks=True),
    Case("cross", len_k=63, head_dim=72, value_dim=32),
    Case("head_dim", len_q=63, head_dim=80, heads=1),
    Case("head_dim", head_dim=96, value_dim=40),
    Case("head_dim", len_k=65, head_dim=128, heads=1),
    Case("head_dim", batch=1, head_dim=256),
    Case("value_dim", head_dim=5, value_dim=33),
    Case("length", batch=1, heads=1, len_q=127, len_k=129, head_dim=16),
    # position: causality and windows
    Case("causal", len_q=65, is_causal=True),
    Case("causal", batch=1, heads=1, len_q=129, head_dim=16, is_causal=True),
    Case("causal top left", len_k=63, is_causal=True),
    Case("causal top left", len_q=63, len_k=17, is_causal=True),
    Case("causal bottom right", len_k=63, is_causal=True, causal_alignment="bottom_right"),
    Case("causal bottom right", len_q=63, len_k=17, is_causal=True, causal_alignment="bottom_right"),
    Case("window left", len_q=65, heads=1, window=(9, None)),
    Case("window right", len_q=65, heads=1, window=(-1, 9)),
    Case("window both", len_q=33, len_k=63, window=(5, 3), causal_alignment="bottom_right"),
    Case("window causal", len_q=65, heads=1, window=(16, 16), is_causal=True),
    # masks: exclusion and bias
    Case("key mask bool", len_k=65, key_mask="bool"),
    Case("key mask float", len_k=65, key_mask="float"),
    Case("mask", mask="bool BHLS"),
    Case("mask", len_k=33, mask="bool LS"),
    Case("mask", mask="bool B1LS transposed"),
    Case("mask", mask="bool B11S", key_mask="bool"),
    Case("mask", mask="bool 11LS expanded"),
    Case("bias", mask="float LS"),
    Case("bias", len_k=65, mask="float 1HLS", is_causal=True),
    Case("bias", mask="float B1LS"),
    Case("bias", mask="float B11S"),
    Case("bias", mask="float 1H1S", key_mask="float"),
    Case("bias", mask="float BHL1"),
    Case("bias", len_k=33, mask="float BHLS transposed"),
    Case("bias", mask="float 1HLS expanded"),
    Case("bias", mask="float32 1HLS"),
    # scores
    Case("scale", scale=0.3),
    Case("scale negative", scale=-0.2, key_mask="bool"),
    Case("scale negative", scale=-0.2, is_causal=True),
    Case("scale zero", batch=1, scale=0.0, is_causal=True),
    Case("peaked", scale=0.9),
    Case("softcap", softcap=1.5),
    Case("softcap far", softcap=50.0, is_causal=True),
    Case("softcap causal", softcap=0.5, scale=-1.0, is_causal=True),
    Case("alibi", alibi="H"),
    Case("alibi bottom right", len_k=33, alibi="BH", causal_alignment="bottom_right"),
    Case("sinks", batch=1, heads=8, sinks=True),
    Case("sinks padding", batch=1, heads=8, sinks=True, key_mask="bool"),
    Case("dropout", len_k=33, dropout_p=0.3),
    Case("dropout causal", len_q=65, heads=1, dropout_p=0.1, is_causal=True),
    Case("ieee", precision="ieee"),
    Case("tf32x3", precision="tf32x3"),
    # heads and layouts
    Case("grouped", heads=4, heads_kv=2, len_k=33),
    Case("multi query", heads=4, heads_kv=1, is_causal=True),
    Case("layout", layout="BLHE", is_causal=True),
    Case("layout", layout="LBHE", value_dim=40),
    Case("layout", layout="packed", key_mask="bool"),
    Case("layout", layout="last stride"),
    Case("layout", layout="shared heads"),
    Case("layout", layout="shared batch", len_k=33, mask="float LS"),
    # mixtures
    Case(
        "decoder", heads=2, heads_kv=1, len_q=33, is_causal=True, key_mask="bool", mask="float 1HLS",
        dropout_p=0.2, layout="BLHE",
    ),
    Case(
        "everything", batch=1, heads=8, heads_kv=4, len_k=33, value_dim=40, is_causal=True, window=(20, None),
        causal_alignment="bottom_right", softcap=2.0, alibi="H", sinks=True, mask="float B1LS", key_mask="float",
        dropout_p=0.3,
    ),
    Case("excluded twice", len_k=33, mask="bool BHLS", key_mask="bool", dropout_p=0.5, value_dim=5, window=(None, 8)),
)  # fmt: skip
