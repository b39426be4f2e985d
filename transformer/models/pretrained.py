"""Models in folders as Hugging Face's: ``config.json`` beside ``model.safetensors``; theirs are read too."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ...kernels.common.checks import dtype_name

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Hugging Face's names of the activations that the feed-forward kernels have.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
Model = TypeVar("Model", bound="PretrainedModel")


@dataclass(frozen=True)
class Converter:
    """How checkpoints of another kind become ours.

    Attributes:
        config: our config from the content of their ``config.json``; raises where it asks for what we do not compute.
        weights: our weights, by our names, from theirs and our config. Weights without a name of ours keep their own,
            and are then reported as unexpected; what is knowingly not used is left out.
    """

    config: Callable[[Mapping[str, Any]], Any]
    weights: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]


class PretrainedModel(torch.nn.Module):
    """A model made from one frozen dataclass of plain values, which can be saved and loaded.

    Its constructor takes the config alone and makes parameters and persistent buffers alone, as it also runs on the
    meta device: what is computed from the config, such as a table of positions, is made when first used.

    Args:
        config: of the class's ``config_class``.

    Raises:
        TypeError: ``config`` is of another class.
    """

    config_class: ClassVar[type]
    model_type: ClassVar[str]
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(f"config: got {type(config).__name__}, expected {self.config_class.__name__}")
        self.config = config

    @classmethod
    def converters(cls) -> Mapping[str, Converter]:
        """By the ``model_type`` in ``config.json``, the checkpoints of another kind that this class reads."""
        return {}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` and ``model.safetensors``, tied weights once; the folder is made where it is missing.

        Files of these names are replaced only when both new ones are whole.

        Raises:
            ImportError: safetensors is not installed.
        """
        write = _safetensors().save_file
        config = json.dumps({"model_type": self.model_type, **asdict(self.config)}, indent=2) + "\n"
        weights = {names[0]: x.detach().contiguous() for names, x in _places(self)}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {name: folder / f".{name}.{os.getpid()}.part" for name in (WEIGHTS, CONFIG)}
        try:
            write(weights, parts[WEIGHTS], metadata={"format": "pt"})
            parts[CONFIG].write_text(config, encoding="utf-8")
            for name, part in parts.items():
                part.replace(folder / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """The model in a folder that :meth:`save_pretrained` wrote, or in one of a Hugging Face checkpoint.

        Args:
            folder: with ``config.json`` and ``model.safetensors``, or the shards of ``model.safetensors.index.json``.
            dtype: of the weights; None: as they were saved.
            device: None: torch's default.

        Returns:
            The model, in eval mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the checkpoint is of a kind that this class does not read, its config asks for what the model
                does not compute, or weights are missing, unexpected or of another shape; the message names them.
            TypeError: ``dtype`` is no floating type.
            ImportError: safetensors is not installed.
        """
        _check_dtype(dtype)
        path = Path(folder) / CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        converter = cls._converter(config, str(path))
        device = torch.get_default_device() if device is None else torch.device(device)
        return cls._build(converter, config, _read(Path(folder), device), dtype, device, str(folder))

    @classmethod
    def from_huggingface(
        cls: type[Model],
        model: Any,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """The model with the weights, copied, of one of Hugging Face transformers that is in memory.

        Args:
            model: its ``config.to_dict()`` and ``state_dict()`` are read.
            dtype: of the weights; None: as they are.
            device: None: where they are.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError, TypeError: as of :meth:`from_pretrained`.
        """
        _check_dtype(dtype)
        source, config = type(model).__name__, model.config.to_dict()
        converter = cls._converter(config, source)
        weights = model.state_dict(keep_vars=True)
        copies = {id(x): x.detach().clone() for x in weights.values()}  # one of each, though tied ones come twice
        weights = {name: copies[id(x)] for name, x in weights.items()}
        return cls._build(converter, config, weights, dtype, None if device is None else torch.device(device), source)

    @classmethod
    def _converter(cls, config: Mapping[str, Any], source: str) -> Converter:
        own = Converter(cls._own_config, lambda weights, config: dict(weights))
        known = {cls.model_type: own, **cls.converters()}
        found = config.get("model_type")
        if found not in known:
            raise ValueError(
                f"{source}: got model_type {found!r}, expected one that {cls.__name__} reads: {list(known)}"
            )
        # Of GGUF the config says what the file was; transformers reads it as floating numbers.
        quantization = config.get("quantization_config")
        if quantization is not None and quantization.get("quant_method") != "gguf":
            raise ValueError(f"{source}: got a quantization_config, expected weights that are not quantised")
        return known[found]

    @classmethod
    def _own_config(cls, config: Mapping[str, Any]) -> Any:
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
        del given["model_type"]
        known = {field.name: field for field in fields(cls.config_class)}
        required = [name for name, field in known.items() if field.default is field.default_factory is MISSING]
        problems = _differences(required, known, given)
        if problems:
            raise ValueError(f"{CONFIG}: {problems} for {cls.config_class.__name__}")
        return cls.config_class(**given)

    @classmethod
    def _build(
        cls: type[Model],
        converter: Converter,
        their_config: Mapping[str, Any],
        their_weights: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        device: torch.device | None,
        source: str,
    ) -> Model:
        config = converter.config(their_config)
        with torch.device("meta"):
            model = cls(config)
        _fill(model, converter.weights(their_weights, config), dtype, device, source)
        return model.eval()


def check_supported(config: Mapping[str, Any], supported: Mapping[str, Collection[Any]]) -> None:
    """Raises ValueError where a Hugging Face config has another value than those a model computes; absent is fine."""
    for name, values in supported.items():
        if name in config and config[name] not in values:
            raise ValueError(f"{name}: got {config[name]!r} in the Hugging Face config, supported: {list(values)}")


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype_name(dtype)}, expected a floating type")


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("models are saved and loaded with safetensors: pip install safetensors") from error
    return safetensors.torch


def _read(folder: Path, device: torch.device) -> dict[str, Tensor]:
    read = _safetensors().load_file
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.exists():
        return dict(read(whole, str(device)))
    if not index.exists():
        raise FileNotFoundError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index}: got the shard {shard!r}, expected the name of a file in the same folder")
        weights.update(read(folder / shard, str(device)))
    return weights


def _places(model: torch.nn.Module) -> list[tuple[list[str], Tensor]]:
    """What ``state_dict`` holds, each tensor with all of its names: tied weights have several."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        found.setdefault(id(x), ([], x))[0].append(name)
    return list(found.values())


def _fill(
    model: torch.nn.Module,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device | None,
    source: str,
) -> None:
    """Puts the weights in place of a model's on the meta device; tied ones may come under any of their names."""
    places = _places(model)
    required = [next((name for name in names if name in weights), names[0]) for names, _ in places]
    problems = _differences(required, {name for names, _ in places for name in names}, weights)
    if problems:
        raise ValueError(f"{source}: {problems} weights for {type(model).__name__}")
    for names, place in places:
        first, *others = (name for name in names if name in weights)
        weight = weights[first]
        for other in others:
            if weights[other] is not weight and not torch.equal(weights[other], weight):
                raise ValueError(f"{source}: {first} and {other} differ, where the config ties them")
        if weight.shape != place.shape:
            raise ValueError(f"{source}: {first} has shape {tuple(weight.shape)}, expected {tuple(place.shape)}")
        if weight.is_floating_point() != place.is_floating_point():
            expected = "a floating type" if place.is_floating_point() else dtype_name(place.dtype)
            raise ValueError(f"{source}: {first} is {dtype_name(weight.dtype)}, expected {expected}")
        weight = weight.to(device, dtype if weight.is_floating_point() else None).contiguous()
        if isinstance(place, torch.nn.Parameter):
            weight = torch.nn.Parameter(weight, place.requires_grad)
        for name in names:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, weight)
    unfilled = [name for name, x in model.named_buffers() if x.is_meta]
    assert not unfilled, f"{type(model).__name__} makes buffers that are not saved in its constructor: {unfilled}"


def _differences(required: Iterable[str], known: Collection[str], given: Collection[str]) -> str:
    missing = [name for name in required if name not in given]
    unexpected = [name for name in given if name not in known]
    return " and ".join(
        f"{what} {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    )
