"""What a user would call instead, on the same inputs. Masks a peer needs are built before the timing starts."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedformer import functional as F
from tests.cases import Inputs

from .rows import OURS
from .timing import Subject

SDPA = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
}
PLAIN = ("eager", "compiled")
WRITES_SCORES = ("sdpa math", *PLAIN)
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to compute a case.

    Attributes:
        name: as tables and results show it.
        prepare: from the inputs to a call that gives the output; runs once, outside of the timing.
        scope: in force while it runs, entered outside of the timing.
    """

    name: str
    prepare: Callable[[Inputs], Callable[[], Tensor]]
    scope: Callable[[], AbstractContextManager[object]] = nullcontext


class PeerFailed(Exception):
    """A peer did not run a case; the message is what it said."""


def too_large(peer: Peer, inputs: Inputs) -> str | None:
    """Why a peer is left out: it writes scores that would crowd out the others' memory."""
    batch, heads, len_q, _ = inputs.query.shape
    scores = batch * heads * len_q * inputs.key.size(2) * inputs.query.element_size()
    if peer.name not in WRITES_SCORES or scores <= _memory(inputs.query.device) / 16:
        return None
    return f"its scores alone take {scores / 1e9:.1f} GB"


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def ours(backend: str = "auto", is_decode: bool = False) -> Peer:
    return Peer(OURS, partial(_decode if is_decode else _attention, backend=backend))


def peers(device_type: str, compiled: bool, is_decode: bool = False) -> list[Peer]:
    """Ours first, then torch's SDPA by each backend's name, the equation in torch operations, and that compiled."""
    found = [ours(is_decode=is_decode)]
    found += [Peer(sdpa_name(backend), _sdpa, partial(sdpa_kernel, backend)) for backend in SDPA[device_type]]
    found.append(Peer("eager", _eager))
    if compiled:
        found.append(Peer("compiled", _compiled))
    return found


def default_sdpa(inputs: Inputs) -> str:
    """The name of the backend that plain ``scaled_dot_product_attention`` picks for these inputs."""
    mask, is_causal = _mask(inputs)
    choice = torch._fused_sdp_choice(
        inputs.query, inputs.key, inputs.value, mask, _dropout_p(inputs), is_causal, enable_gqa=_is_grouped(inputs)
    )
    return sdpa_name(SDPBackend(choice))


def sdpa_name(backend: SDPBackend) -> str:
    return f"sdpa {backend.name.lower().removesuffix('_attention')}"


def subject(peer: Peer, inputs: Inputs, direction: str) -> Subject:
    """What to time of a peer."""
    if direction == "forward":
        return Subject(peer.prepare(inputs), peer.scope)
    inputs, named = inputs.leaves()
    call, leaves, grad_out = peer.prepare(inputs), list(named.values()), inputs.grad_out
    if direction == "forward+backward":
        return Subject(lambda: torch.autograd.grad(call(), leaves, grad_out), peer.scope)
    with peer.scope():
        out = call()
    return Subject(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True), peer.scope)


def results(peer: Peer, inputs: Inputs, direction: str) -> Results:
    """The output and, unless only the forward is asked for, the gradient of every differentiable input.

    Raises:
        PeerFailed: the peer does not run this case.
    """
    inputs, named = inputs.leaves() if direction != "forward" else (inputs, {})
    with _reporting_failure(), peer.scope():
        out = peer.prepare(inputs)()
        grads = torch.autograd.grad(out, list(named.values()), inputs.grad_out) if named else ()
        if out.device.type == "cuda":
            torch.cuda.synchronize()
    return {"out": out.detach()} | {f"grad {name}": grad for name, grad in zip(named, grads, strict=True)}


def failures() -> tuple[type[Exception], ...]:
    """What torch and, once it was imported, Triton raise when something cannot be compiled, launched or allocated."""
    triton = sys.modules.get("triton.errors")
    return (RuntimeError, triton.TritonError) if triton else (RuntimeError,)


@contextmanager
def _reporting_failure() -> Iterator[None]:
    """A failure becomes PeerFailed. Why a backend of SDPA does not run is said in warnings; they join the message."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except failures() as error:
            said = dict.fromkeys([str(error), *(str(w.message) for w in caught)])
            raise PeerFailed("; ".join(message.split("\n")[0] for message in said)) from error


def without(inputs: Inputs, *names: str) -> Inputs:
    """The same inputs less some options."""
    return replace(inputs, options={name: value for name, value in inputs.options.items() if name not in names})


def _dropout_p(inputs: Inputs) -> float:
    return float(inputs.options.get("dropout_p", 0.0))


def _is_grouped(inputs: Inputs) -> bool:
    return inputs.query.size(1) != inputs.key.size(1)


def _mask(inputs: Inputs) -> tuple[Tensor | None, bool]:
    """What torch must be told: a mask that holds everything, or none and causality in words."""
    options = inputs.options
    causal, key_mask, attn_mask = (options.get(name) for name in ("is_causal", "key_mask", "attn_mask"))
    if key_mask is None and attn_mask is None:
        return None, bool(causal)
    keep = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        shape, device = (inputs.query.size(2), inputs.key.size(2)), inputs.query.device
        triangle = torch.ones(shape, dtype=torch.bool, device=device).tril()
        keep = triangle if keep is None else keep & triangle
    if attn_mask is None or keep is None:
        return (keep if attn_mask is None else attn_mask), False
    return attn_mask.masked_fill(~keep, float("-inf")), False


def _attention(inputs: Inputs, backend: str) -> Callable[[], Tensor]:
    # Looked up here, so that what is judged and timed is what the library holds now.
    return partial(F.attention, inputs.query, inputs.key, inputs.value, **inputs.options, backend=backend)


def _decode(inputs: Inputs, backend: str) -> Callable[[], Tensor]:
    batch, _, len_k, _ = inputs.key.shape
    lengths = torch.full((batch,), len_k, dtype=torch.int32, device=inputs.key.device)
    return partial(F.attention_with_kvcache, inputs.query, inputs.key, inputs.value, lengths, backend=backend)


def _sdpa(inputs: Inputs) -> Callable[[], Tensor]:
    mask, is_causal = _mask(inputs)
    return partial(
        torch.nn.functional.scaled_dot_product_attention,
        inputs.query,
        inputs.key,
        inputs.value,
        attn_mask=mask,
        dropout_p=_dropout_p(inputs),
        is_causal=is_causal,
        enable_gqa=_is_grouped(inputs),
    )


def _eager(inputs: Inputs) -> Callable[[], Tensor]:
    mask, is_causal = _mask(inputs)
    if is_causal:
        shape, device = (inputs.query.size(2), inputs.key.size(2)), inputs.query.device
        mask = torch.ones(shape, dtype=torch.bool, device=device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=inputs.query.dtype).masked_fill(~mask, float("-inf"))
    return partial(_equation, inputs.query, inputs.key, inputs.value, mask, _dropout_p(inputs))


def _compiled(inputs: Inputs) -> Callable[[], Tensor]:
    torch._dynamo.reset()  # each case compiles for its own shapes
    torch._functorch.config.donated_buffer = False  # so that the backward can be timed again and again
    call = _eager(inputs)
    assert isinstance(call, partial)
    return partial(torch.compile(_equation, dynamic=False), *call.args)


def _equation(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    group = query.size(1) // key.size(1)
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(dim=-1)
    return torch.dropout(weights, dropout_p, train=True) @ value
