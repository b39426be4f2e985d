"""``fuse`` and ``unfuse``: an existing model's layers swapped for ours, in place, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import MultiheadAttention
from .decoder import TransformerDecoder, TransformerDecoderLayer
from .encoder import TransformerEncoder, TransformerEncoderLayer
from .feed_forward import FeedForward
from .frozen import freeze, unfreeze
from .linear import FusedLinear

# torch's classes, and ours with the same attributes, so that changing an instance's class is all it takes.
FUSED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoder: TransformerDecoder,
}
STOCK: tuple[type[torch.nn.Module], ...] = tuple(FUSED)
OURS: tuple[type[torch.nn.Module], ...] = tuple(FUSED.values())
# Whose weights are all multiplied by our kernels.
MULTIPLIED = (MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer, FeedForward, FusedLinear)
# What changes besides the speed.
NOTED: dict[type[torch.nn.Module], str] = {TransformerEncoder: "; padding rows are not 0 in eval mode"}

# What a changed module was before, kept on the module itself: its attributes, and a Hugging Face model's attention.
_BEFORE, _MADE, _HUGGINGFACE = "_fusedformer_before", "_fusedformer_made", "attention implementation"
SWAPPED, SET, LEFT = "swapped", "set", "left"


@dataclass(frozen=True)
class Entry:
    """What ``fuse`` did with one module.

    Attributes:
        module: its name in the model; "" for the model itself.
        kind: the name of its class.
        action: "swapped", "set" (a container's flag, so that it calls the swapped attention) or "left".
        detail: what runs now, or why nothing changed.
    """

    module: str
    kind: str
    action: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What ``fuse`` swapped, what not and why. ``print`` it for a table.

    Attributes:
        entries: one for each module that was looked at.
        differences: with ``verify``, the largest absolute difference of each output tensor, by its place in the output.
        frozen_bytes: with ``frozen``, the memory of the packed copies of weights.
    """

    entries: tuple[Entry, ...]
    differences: Mapping[str, float] | None = None
    frozen_bytes: int | None = None

    @property
    def swapped(self) -> list[str]:
        """The names of the modules that were swapped."""
        return [entry.module for entry in self.entries if entry.action == SWAPPED]

    @property
    def left(self) -> dict[str, str]:
        """By name, the modules that were left as they are, and why."""
        return {entry.module: entry.detail for entry in self.entries if entry.action == LEFT}

    def __str__(self) -> str:
        if not self.entries:
            return "nothing to fuse: none of torch.nn's attentions, encoders and decoders, and no Hugging Face model"
        rows = [("module", "class", "", "")]
        rows += [(entry.module or "(the model)", entry.kind, entry.action, entry.detail) for entry in self.entries]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"{len(self.swapped)} swapped, {len(self.left)} left")
        if self.frozen_bytes is not None:
            lines.append(f"packed copies of frozen weights: {self.frozen_bytes:,} bytes")
        for name, difference in (self.differences or {}).items():
            lines.append(f"largest difference in {name}: {difference:.3g}")
        return "\n".join(lines)


def fuse(model: torch.nn.Module, *, verify: Any = None, frozen: bool = False) -> Report:
    """Swaps the model's layers for ours, in place; :func:`unfuse` undoes it. Calling it again changes nothing.

    torch's attention, encoder and decoder layers and their stacks become those of ``fusedformer.nn`` by their class
    alone: the module, its parameters, ``requires_grad`` and hooks stay the objects they are. A subclass is left as it
    is, what is in it is not. A Hugging Face model gets the attention implementation "fusedformer" in
    its configuration, which models built from the same configuration object share; its linear layers, and
    layers that are BERT's or Llama's or copies of them, run on fused kernels too: feed-forward network, norm, BERT's
    residual connections.

    Args:
        model: any module. Itself, too, is swapped if it is an attention.
        verify: inputs to run the model on before and after, in eval mode without gradients: a tensor, a tuple of
            arguments or a mapping of keyword arguments. The largest differences are in the report; positions of padding
            count too, where no result is the right one, and one that was NaN before makes a NaN.
        frozen: a promise that the weights of our layers, fused or built as ours, no longer change. Where kernels gain
            by it (AMX) they keep packed copies of the weights until :func:`unfuse`, and in calls without gradients need
            not see a change. Without it none is ever missed.

    Returns:
        Report: what was swapped, what was left and why.

    Raises:
        TypeError: ``model`` is no module, or ``verify`` is of another type.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if verify is None:
        return _swap_all(model, frozen)
    arguments = _arguments(verify)
    before = _outputs(model, *arguments)
    report = _swap_all(model, frozen)
    try:
        after = _outputs(model, *arguments)
    except BaseException:
        for entry in report.entries:
            if entry.action != LEFT:
                _restore(model.get_submodule(entry.module))
        unfreeze(model)
        raise
    shared = [name for name in before if name in after]
    differences = {name: _difference(before[name], after[name]) for name in shared}
    return Report(report.entries, differences, report.frozen_bytes)


def unfuse(model: torch.nn.Module) -> None:
    """Puts back what :func:`fuse` swapped in this model: classes, flags and Hugging Face's attention implementation.

    Packed copies of frozen weights are dropped.

    Raises:
        RuntimeError: a module has been given another class since (as parametrizations and FSDP do), which putting back
            its own would undo in part; nothing has been changed.
    """
    for name, module in model.named_modules():
        found, made = _name_of(type(module)), module.__dict__.get(_MADE)
        if made not in (None, found):
            raise RuntimeError(f"{name or 'model'}: got {found}, expected {made}, as fuse left it: undo that first")
    for module in model.modules():
        _restore(module)
    unfreeze(model)


def _swap_all(model: torch.nn.Module, frozen: bool) -> Report:
    entries = tuple(_swap(model))
    if not frozen:
        return Report(entries)
    return Report(entries, frozen_bytes=freeze(*(part for part in model.modules() if isinstance(part, MULTIPLIED))))


def _swap(model: torch.nn.Module) -> Iterator[Entry]:
    for name, module in model.named_modules():
        if isinstance(module, STOCK):
            yield _swap_class(name, module)
    for name, module in model.named_modules():
        yield from _set_container(name, module)
    # A Hugging Face model can only be there if transformers was imported before us.
    if "transformers.modeling_utils" in sys.modules:
        yield from _swap_huggingface(model)


def _swap_class(name: str, module: torch.nn.Module) -> Entry:
    of, kind = type(module), type(module).__name__
    if issubclass(of, OURS):
        return Entry(name, kind, LEFT, "it is fusedformer's already")
    fused = FUSED.get(of)
    if fused is None:
        return Entry(name, kind, LEFT, f"a subclass, {type(module).__module__}.{kind}, may compute something else")
    if "forward" in module.__dict__:
        return Entry(name, kind, LEFT, "a forward of its own was set on it")
    _change(module, "__class__", fused)
    if fused is TransformerEncoderLayer:  # as it is built: torch's container reads it and would make nested tensors
        _change(module, "activation_relu_or_gelu", 0)
    return Entry(name, kind, SWAPPED, f"runs fusedformer.nn.{kind}{NOTED.get(fused, '')}")


def _set_container(name: str, module: torch.nn.Module) -> Iterator[Entry]:
    """Turns off the eval paths of what was left that go around a swapped part or hand it nested tensors."""
    if isinstance(module, OURS):
        return
    if isinstance(module, torch.nn.TransformerEncoderLayer):
        flag, off, detail = "activation_relu_or_gelu", 0, "calls its attention in eval mode too"
    elif isinstance(module, torch.nn.TransformerEncoder):
        flag, off, detail = "use_nested_tensor", False, "hands on the padding mask; padding rows are not 0 in eval mode"
    else:
        return
    if getattr(module, flag, off) and any(isinstance(part, OURS) for part in module.modules()):
        _change(module, flag, off)
        yield Entry(name, type(module).__name__, SET, detail)


def _swap_huggingface(model: torch.nn.Module) -> Iterator[Entry]:
    huggingface = _huggingface()
    huggingface.register()
    for name, part in huggingface.models(model):
        kind, before, reason = type(part).__name__, huggingface.implementation(part), huggingface.refusal(part)
        if before == huggingface.NAME:
            yield Entry(name, kind, LEFT, "it runs fusedformer's attention already")
        elif reason is not None:
            yield Entry(name, kind, LEFT, reason)
        else:
            huggingface.choose(part, huggingface.NAME)
            part.__dict__[_BEFORE] = {_HUGGINGFACE: before}
            yield Entry(name, kind, SWAPPED, f'attention "{huggingface.NAME}" instead of "{before}"')
    if huggingface.models(model):
        yield from _swap_layers(model)


def _swap_layers(model: torch.nn.Module) -> Iterator[Entry]:
    from . import huggingface_layers as layers

    ours = [module for module in model.modules() if isinstance(module, MULTIPLIED)]
    read = {id(part) for module in ours for part in module.modules()}  # whose parameters are read where they are
    for name, module in model.named_modules():
        kind, combined, reason = type(module).__name__, layers.fused_class(module), layers.refusal(module)
        if combined is None or id(module) in read:
            continue
        if reason is not None:
            yield Entry(name, kind, LEFT, reason)
            continue
        _change(module, "__class__", combined)
        yield Entry(name, kind, SWAPPED, layers.description(combined))


def _huggingface() -> Any:
    from . import huggingface

    return huggingface


def _change(module: torch.nn.Module, name: str, value: Any) -> None:
    module.__dict__.setdefault(_BEFORE, {})[name] = getattr(module, name)
    if name == "__class__":
        module.__dict__[_MADE] = _name_of(value)
    setattr(module, name, value)


def _name_of(of: type) -> str:
    """A class that is made on the way has no other that a file could hold."""
    return f"{of.__module__}.{of.__qualname__}"


def _restore(module: torch.nn.Module) -> None:
    module.__dict__.pop(_MADE, None)
    for name, value in module.__dict__.pop(_BEFORE, {}).items():
        if name == _HUGGINGFACE:
            _huggingface().choose(module, value)
        else:
            setattr(module, name, value)


def _arguments(verify: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(verify, Tensor):
        return (verify,), {}
    if isinstance(verify, tuple):
        return verify, {}
    if isinstance(verify, Mapping):
        return (), verify
    raise TypeError(f"verify: got {type(verify).__name__}, expected a tensor, a tuple or a mapping of arguments")


def _outputs(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's output tensors by their place, in eval mode; modes and random state are left as they were."""
    training = {module: module.training for module in model.modules()}
    devices = {x.device.index for x in model.parameters() if x.device.type == "cuda"}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            return dict(_tensors("output", model(*args, **kwargs)))
    finally:
        for module, mode in training.items():
            module.training = mode


def _tensors(name: str, x: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, Mapping):
        for key, part in x.items():
            yield from _tensors(f"{name}.{key}", part)
    elif isinstance(x, tuple | list):
        for i, part in enumerate(x):
            yield from _tensors(f"{name}[{i}]", part)


def _difference(before: Tensor, after: Tensor) -> float:
    return (after.double() - before.double()).abs().max().item() if before.numel() else 0.0
