"""``fuse`` and ``unfuse`` on torch's own modules: what is swapped, what is kept, what is put back, and the report."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

import fusedformer
from fusedformer import nn
from tests.tolerances import assert_equal_bits, assert_within_contract

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
SIZE: dict[str, Any] = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dropout": 0.0}


def transformer(**options: Any) -> torch.nn.Transformer:
    return torch.nn.Transformer(**SIZE, num_encoder_layers=2, num_decoder_layers=2, **options)


def encoder(**options: Any) -> torch.nn.TransformerEncoder:
    layer = torch.nn.TransformerEncoderLayer(**SIZE, batch_first=True, **options)
    return torch.nn.TransformerEncoder(layer, num_layers=2)


def call(batch_first: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of a Transformer: padded source, causal and padded target."""
    src, tgt = torch.randn(3, 11, 32, dtype=dtype), torch.randn(3, 7, 32, dtype=dtype)
    padding = torch.arange(11) >= torch.tensor([[11], [4], [7]])
    tgt_padding = torch.arange(7) >= torch.tensor([[5], [7], [3]])
    return {
        "src": src if batch_first else src.transpose(0, 1),
        "tgt": tgt if batch_first else tgt.transpose(0, 1),
        "tgt_mask": torch.ones(7, 7, dtype=torch.bool).triu(1),
        "src_key_padding_mask": padding,
        "tgt_key_padding_mask": tgt_padding,
        "memory_key_padding_mask": padding,
    }


@contextmanager
def no_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def structure(model: torch.nn.Module) -> dict[str, Any]:
    """Everything about the modules of a model but the numbers in them."""
    plain = (bool, int, float, str, type(None))
    return {
        name: (type(module), {key: x for key, x in vars(module).items() if isinstance(x, plain)}, sorted(vars(module)))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"norm_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_transformer_is_as_accurate(options: dict[str, Any], training: bool) -> None:
    model = transformer(**options).train(training)
    arguments = call(options.get("batch_first", False))
    fused = copy.deepcopy(model)
    report = fusedformer.fuse(fused)
    assert len(report.swapped) == 2 + 4 + 6  # stacks, layers, attentions
    results = []
    for module, dtype in ((model, torch.float64), (model, torch.float32), (fused, torch.float32)):
        module = copy.deepcopy(module).to(dtype)
        with no_fast_path():
            out = module(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in arguments.items()})
        out.square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        results.append((out.detach(), grads))
    for what, truth, eager, actual in zip(("output", "gradients"), *results, strict=True):
        assert_within_contract(actual, truth, eager, what)


def test_an_encoder_in_eval_mode_calls_its_attention_with_the_padding_mask() -> None:
    model = encoder().eval()
    x, padding = torch.randn(3, 11, 32), torch.arange(11) >= torch.tensor([[11], [4], [7]])
    assert model.use_nested_tensor
    assert all(layer.activation_relu_or_gelu for layer in model.layers)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        fusedformer.fuse(model)
        seen = []
        for layer in model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append((args[0].is_nested, kwargs["key_padding_mask"])),
                with_kwargs=True,
            )
        actual = model(x, src_key_padding_mask=padding)
        for layer in model.layers:
            layer.self_attn._forward_pre_hooks.clear()
            layer.self_attn._forward_pre_hooks_with_kwargs.clear()
        assert_equal_bits(model(x, src_key_padding_mask=padding), actual)  # hooks are not what kept the fast path away
    assert [nested for nested, mask in seen] == [False, False]
    assert all(mask.shape == (3, 11) for nested, mask in seen)
    torch.testing.assert_close(actual[~padding], expected[~padding])


@pytest.mark.parametrize("build", [transformer, encoder, lambda: torch.nn.MultiheadAttention(32, 4)])
def test_everything_keeps_its_identity_and_comes_back(build: Any) -> None:
    model = build().eval()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    name = next(name for name, module in modules.items() if type(module) is torch.nn.MultiheadAttention)
    attention = modules[name]
    attention.in_proj_weight.requires_grad_(False)
    calls = []
    attention.register_forward_hook(lambda *args: calls.append(1))
    before, state = structure(model), copy.deepcopy(model.state_dict())
    fusedformer.fuse(model)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert type(attention) is nn.MultiheadAttention
    assert not attention.in_proj_weight.requires_grad
    x = torch.randn(5, 2, 32)
    attention(x, x, x)
    assert calls == [1]
    assert structure(model) != before
    fusedformer.unfuse(model)
    assert structure(model) == before
    assert list(model.state_dict()) == list(state)
    for key, value in state.items():
        assert_equal_bits(model.state_dict()[key], value, key)


@pytest.mark.parametrize("norm_first", [False, True])
def test_hooks_inside_swapped_layers_run(norm_first: bool) -> None:
    model = transformer(norm_first=norm_first, batch_first=True)
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("linear2", "norm1", "dropout1")]
    seen: list[str] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    arguments = call(True)
    expected = model(**arguments)
    before, seen[:] = list(seen), []
    report = fusedformer.fuse(model)
    assert {"encoder.layers.0", "decoder.layers.1"} < {*report.swapped}
    torch.testing.assert_close(model(**arguments), expected)
    assert seen == before
    assert {*seen} == {*names}


def test_a_swapped_layer_works_in_torchs_stack_in_evaluation() -> None:
    layer = torch.nn.TransformerEncoderLayer(**SIZE, batch_first=True)
    fusedformer.fuse(layer)
    model = torch.nn.TransformerEncoder(layer, num_layers=2).eval()
    x, padding = torch.randn(3, 11, 32), torch.arange(11) >= torch.tensor([[11], [4], [7]])
    with torch.no_grad():
        actual = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual, model(x, src_key_padding_mask=padding).detach())
    fusedformer.unfuse(layer)
    assert layer.activation_relu_or_gelu == 1


def test_unfused_computes_the_bits_it_did() -> None:
    model = encoder().eval()
    x, padding = torch.randn(3, 11, 32), torch.arange(11) >= torch.tensor([[11], [4], [7]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        fusedformer.fuse(model)
        fusedformer.unfuse(model)
        assert_equal_bits(model(x, src_key_padding_mask=padding), expected)


def test_fusing_twice_and_unfusing_twice_is_harmless() -> None:
    model = transformer()
    before = structure(model)
    fusedformer.fuse(model)
    fused = structure(model)
    again = fusedformer.fuse(model)
    assert structure(model) == fused
    assert again.swapped == []
    assert set(again.left.values()) == {"it is fusedformer's already"}
    fusedformer.unfuse(model)
    fusedformer.unfuse(model)
    assert structure(model) == before


class Halved(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_what_has_been_given_another_class_since_is_not_half_undone() -> None:
    model = encoder()
    fusedformer.fuse(model)
    attention, x = model.layers[1].self_attn, torch.randn(2, 5, 32)
    parametrize.register_parametrization(attention, "in_proj_weight", Halved())
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn: got .*Parametrized.*, expected .*\.MultiheadA"):
        fusedformer.unfuse(model)
    assert_equal_bits(model(x).detach(), expected.detach())  # nothing has been changed
    parametrize.remove_parametrizations(attention, "in_proj_weight", leave_parametrized=False)
    fusedformer.unfuse(model)
    assert type(attention) is torch.nn.MultiheadAttention


def test_a_copy_of_a_fused_model_is_unfused_alone() -> None:
    model = transformer()
    before = structure(model)
    fusedformer.fuse(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fusedformer.unfuse(other)
        assert structure(other) == before
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention


class OwnAttention(torch.nn.MultiheadAttention):
    pass


class OwnLayer(torch.nn.TransformerEncoderLayer):
    pass


def test_what_is_left_is_named_with_the_reason() -> None:
    own = OwnAttention(32, 4)
    quantizable = torch.ao.nn.quantizable.MultiheadAttention(32, 4)
    patched = torch.nn.MultiheadAttention(32, 4)
    patched.forward = lambda *args, **kwargs: args[0]  # type: ignore[method-assign]
    ours = nn.MultiheadAttention(32, 4)
    parts = {"own": own, "quantizable": quantizable, "patched": patched, "ours": ours, "linear": torch.nn.Linear(3, 3)}
    model = torch.nn.ModuleDict(parts)
    before = structure(model)
    report = fusedformer.fuse(model)
    assert structure(model) == before
    assert report.swapped == []
    assert report.left == {
        "own": f"a subclass, {__name__}.OwnAttention, may compute something else",
        "quantizable": "a subclass, torch.ao.nn.quantizable.modules.activation.MultiheadAttention, "
        "may compute something else",
        "patched": "a forward of its own was set on it",
        "ours": "it is fusedformer's already",
    }
    fusedformer.unfuse(model)
    assert type(model["ours"]) is nn.MultiheadAttention


def test_the_report_is_a_table() -> None:
    parts = {"stack": encoder(), "own": OwnAttention(32, 4), "layer": OwnLayer(**SIZE, batch_first=True)}
    report = fusedformer.fuse(torch.nn.ModuleDict(parts))
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "class"]
    assert {entry.action for entry in report.entries} == {"swapped", "set", "left"}
    column = lines[0].index("class")
    for entry, line in zip(report.entries, lines[1:], strict=False):
        assert line.startswith(f"{entry.module} ")
        assert line[column - 2 : column] == "  "
        assert line[column:].startswith(f"{entry.kind} ")
        assert line.endswith(entry.detail)
    assert lines[-1] == "6 swapped, 2 left"
    assert str(fusedformer.fuse(torch.nn.MultiheadAttention(8, 2))).splitlines()[1].startswith("(the model)  ")


def test_a_model_without_attention_is_said_to_have_none() -> None:
    report = fusedformer.fuse(torch.nn.Sequential(torch.nn.Linear(3, 3)))
    assert report.entries == ()
    assert str(report).startswith("nothing to fuse")


class Noisy(torch.nn.Module):
    """An encoder that draws random numbers in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = encoder()

    def forward(self, src: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        return {"hidden": self.stack(src + torch.rand_like(src), src_key_padding_mask=padding)}


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "mapping"])
def test_verify_runs_before_and_after_and_leaves_modes_and_random_state(inputs: str) -> None:
    model = Noisy().train()
    model.stack.layers[1].eval()
    original = copy.deepcopy(model).eval()
    src, padding = torch.randn(2, 6, 32), torch.arange(6) >= torch.tensor([[6], [6]])
    verify = {"tensor": src, "tuple": (src, padding), "mapping": {"src": src, "padding": padding}}[inputs]
    modes, random_state = [module.training for module in model.modules()], torch.get_rng_state()
    report = fusedformer.fuse(model, verify=verify)
    assert [module.training for module in model.modules()] == modes
    assert_equal_bits(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    outputs = []
    for module in (original, copy.deepcopy(model).eval()):
        torch.set_rng_state(random_state)
        with torch.no_grad():
            outputs.append(module(src, None if inputs == "tensor" else padding)["hidden"])
    assert report.differences == {"output.hidden": (outputs[1].double() - outputs[0].double()).abs().max().item()}
    assert re.search(r"^largest difference in output.hidden: \d", str(report), re.MULTILINE)
    torch.testing.assert_close(*outputs)


def test_verify_shows_what_differs() -> None:
    model = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    padding = torch.tensor([[True] * 5, [False] * 5])
    report = fusedformer.fuse(model, verify={"query": x, "key": x, "value": x, "key_padding_mask": padding})
    assert report.differences is not None
    assert report.differences.keys() == {"output[0]", "output[1]"}
    assert str(report.differences["output[0]"]) == "nan"  # what torch answered for the sample of padding


class FailsOnceFused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = encoder()

    def forward(self, x: Tensor) -> Tensor:
        if type(self.stack.layers[0].self_attn) is nn.MultiheadAttention:
            raise RuntimeError("the second run")
        return self.stack(x)  # type: ignore[no-any-return]


def test_a_failing_verification_leaves_the_model_as_it_was() -> None:
    model = FailsOnceFused()
    before = structure(model)
    with pytest.raises(RuntimeError, match="the second run"):
        fusedformer.fuse(model, verify=torch.randn(2, 5, 32))
    assert structure(model) == before


def test_bad_arguments_are_named() -> None:
    model = torch.nn.MultiheadAttention(8, 2)
    with pytest.raises(TypeError, match=r"model: got str, expected a torch\.nn\.Module"):
        fusedformer.fuse("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="verify: got list, expected a tensor, a tuple or a mapping"):
        fusedformer.fuse(model, verify=[torch.randn(3)])
    assert type(model) is torch.nn.MultiheadAttention


def test_a_fused_encoder_compiles_whole() -> None:
    model = encoder()
    fusedformer.fuse(model)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
    x = torch.randn(2, 9, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask=mask, is_causal=True), model(x, mask=mask, is_causal=True))
