"""Saving and loading: tied weights once, dtypes, shards, failed saves, and errors that name what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.transformer.models import Converter, PretrainedModel
from tests.tolerances import assert_equal_bits

safetensors = pytest.importorskip("safetensors.torch")


@dataclass(frozen=True)
class Config:
    tokens: int
    features: int = 4
    stops: tuple[int, ...] = (1, 2)


class Model(PretrainedModel):
    config_class = Config
    model_type = "fusedformer-test"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.tokens, config.features)
        self.norm = torch.nn.BatchNorm1d(config.features)  # has buffers, one of integers
        self.output = torch.nn.Linear(config.features, config.tokens)
        self.output.weight = self.embedding.weight
        self.embedding.weight.requires_grad_(config.tokens < 7)

    @classmethod
    def converters(cls) -> Mapping[str, Converter]:
        def weights(theirs: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
            return {name.removeprefix("their."): x for name, x in theirs.items()}

        return {"their-test": Converter(lambda theirs: Config(theirs["vocab"]), weights)}


def save(model: Model, folder: Path, **changes: Tensor | None) -> None:
    """Saves the model, some weights changed or, for None, left out."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {**safetensors.load_file(path), **{name.replace("__", "."): x for name, x in changes.items()}}
    safetensors.save_file({name: x for name, x in weights.items() if x is not None}, path)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = Model(Config(5, stops=(3, 4)))
    model.norm(torch.randn(7, 4))
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = Model.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.output.weight is loaded.embedding.weight
    assert isinstance(loaded.output.weight, torch.nn.Parameter)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, x in loaded.state_dict().items():
        assert_equal_bits(x, model.state_dict()[name], name)
    assert not any(x.is_meta for x in loaded.state_dict().values())


def test_a_file_holds_tied_weights_once_and_says_what_it_is(tmp_path: Path) -> None:
    Model(Config(5)).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    assert "embedding.weight" in weights
    assert "output.weight" not in weights
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "fusedformer-test", "tokens": 5, "features": 4, "stops": [1, 2]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_is_that_of_floating_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Model(Config(5)).bfloat16()
    model.save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).embedding.weight.dtype == torch.bfloat16
    loaded = Model.from_pretrained(tmp_path, dtype=dtype, device="cpu")
    assert {x.dtype for x in loaded.state_dict().values()} == {dtype, torch.int64}
    assert_equal_bits(loaded.embedding.weight, model.embedding.weight.to(dtype))


def test_what_needs_no_gradient_still_needs_none(tmp_path: Path) -> None:
    Model(Config(8)).save_pretrained(tmp_path)
    assert [name for name, p in Model.from_pretrained(tmp_path).named_parameters() if not p.requires_grad] == [
        "embedding.weight"
    ]


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    Model(Config(5)).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    Model.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_shards_are_read_and_stay_in_their_folder(tmp_path: Path) -> None:
    model = Model(Config(5))
    save(model, tmp_path)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        safetensors.save_file({name: x for name, x in weights.items() if files[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for name, x in Model.from_pretrained(tmp_path).state_dict().items():
        assert_equal_bits(x, model.state_dict()[name], name)
    index.write_text(json.dumps({"weight_map": {**files, "output.bias": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"got the shard '../model\.safetensors', expected the name of a file"):
        Model.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Model(Config(5))
    old.save_pretrained(tmp_path)

    def fail(weights: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        Model(Config(6)).save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(TypeError, match="not JSON serializable"):
        Model(Config(6, stops=torch.tensor([1]))).save_pretrained(tmp_path)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_equal_bits(Model.from_pretrained(tmp_path).embedding.weight, old.embedding.weight)


def test_a_model_is_saved_over_the_files_it_was_loaded_from(tmp_path: Path) -> None:
    Model(Config(5)).save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path)
    with torch.no_grad():
        model.embedding.weight.fill_(7.0)
    model.save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).embedding.weight.eq(7.0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output__bias": None}, r"missing output\.bias weights for Model"),
        ({"embedding__weight": None}, r"missing embedding\.weight weights"),
        ({"other": torch.zeros(1)}, r"unexpected other weights"),
        ({"output__bias": None, "outputs__bias": torch.zeros(5)}, r"missing output\.bias and unexpected outputs\.bias"),
        ({"output__bias": torch.zeros(6)}, r"output\.bias has shape \(6,\), expected \(5,\)"),
        ({"output__bias": torch.zeros(5).int()}, r"output\.bias is int32, expected a floating type"),
        ({"norm__num_batches_tracked": torch.zeros(())}, r"norm\.num_batches_tracked is float32, expected int64"),
        ({"output__weight": torch.zeros(5, 4)}, r"embedding\.weight and output\.weight differ"),
    ],
)
def test_weights_that_do_not_fit_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(Model(Config(5)), tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(tmp_path)


def test_tied_weights_may_come_under_any_name_or_both(tmp_path: Path) -> None:
    model = Model(Config(5))
    weight = model.embedding.weight.detach().clone()
    for changes in ({"embedding__weight": None, "output__weight": weight}, {"output__weight": weight.clone()}):
        save(model, tmp_path, **changes)
        loaded = Model.from_pretrained(tmp_path)
        assert loaded.output.weight is loaded.embedding.weight
        assert_equal_bits(loaded.output.weight, weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt9"},
            r"config.json: got model_type 'gpt9', expected one that Model reads: \['fusedformer-t",
        ),
        ({"model_type": None}, "got model_type None"),
        ({"layers": 3}, "unexpected layers for Config"),
        ({"tokens": ...}, "missing tokens for Config"),
        ({"quantization_config": {"quant_method": "awq"}}, "got a quantization_config"),
    ],
)
def test_configs_that_do_not_fit_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    Model(Config(5)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(tmp_path)


def test_missing_files_and_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Model.from_pretrained(tmp_path)
    Model(Config(5)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        Model.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="dtype: got int8, expected a floating type"):
        Model.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(TypeError, match="config: got dict, expected Config"):
        Model({"tokens": 5})  # type: ignore[arg-type]


def test_without_safetensors_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        Model(Config(5)).save_pretrained(tmp_path)


def test_a_converter_reads_other_checkpoints_on_disk_and_in_memory(tmp_path: Path) -> None:
    class Theirs(torch.nn.Module):
        """As a Hugging Face model: a config that says what it is, and weights, tied ones under both names."""

        def __init__(self) -> None:
            super().__init__()
            self.their = Model(Config(5))
            self.config = SimpleNamespace(to_dict=lambda: {"model_type": "their-test", "vocab": 5})

    theirs = Theirs()
    found = Model.from_huggingface(theirs, dtype=torch.float64)
    assert found.output.weight is found.embedding.weight
    assert_equal_bits(found.embedding.weight, theirs.their.embedding.weight.double())
    copied = Model.from_huggingface(theirs)
    with torch.no_grad():
        theirs.their.output.bias.add_(1.0)
    assert not torch.equal(copied.output.bias, theirs.their.output.bias)
    weights = {name: x for name, x in theirs.state_dict().items() if name != "their.output.weight"}
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    assert_equal_bits(Model.from_pretrained(tmp_path).output.bias, theirs.their.output.bias)
