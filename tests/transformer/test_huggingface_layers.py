"""BERT's and Llama's layers and their copies, fused: which are, what they run, that nothing attached is left out."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedformer
from tests.tolerances import assert_within_contract

transformers = pytest.importorskip("transformers")

SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
COPIES = {"Bert": {}, "Roberta": {}, "Electra": {"embedding_size": 32}, "XLMRoberta": {}, "Ernie": {}}
LAYERS = {"encoder.layer.0", "encoder.layer.0.attention.output", "encoder.layer.0.output"}
LLAMAS: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 5, "head_dim": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
}


def build(name: str = "Bert", **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZE, **COPIES[name], **options, attn_implementation="eager")
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
    return model


def build_llama(name: str = "Llama", **options: Any) -> Any:
    sizes = {**SIZE, "num_key_value_heads": 2, "tie_word_embeddings": False, **LLAMAS[name], **options}
    config = getattr(transformers, f"{name}Config")(**sizes, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
    return model


def tokens() -> Tensor:
    return torch.randint(3, 64, (3, 11))


def operations(model: Any) -> list[str]:
    decisions = fusedformer.explain(model, input_ids=tokens()).decisions
    return [decision.operation for decision in decisions]


PROJECTIONS = ["linear", "linear", "linear", "attention", "linear"]  # of query, key, value; of the output
FUSED = [*PROJECTIONS, "dropout_add_layer_norm", "feed_forward", "dropout_add_layer_norm"]
POOLED = [*FUSED, "linear"]


@pytest.mark.parametrize("name", COPIES)
def test_a_layer_and_its_copies_are_fused_and_put_back(name: str) -> None:
    model = build(name)
    classes = {part: type(module) for part, module in model.named_modules()}
    report = fusedformer.fuse(model)
    linears = {part for part, of in classes.items() if of is torch.nn.Linear}
    assert set(report.swapped) == {"", *LAYERS, *linears}
    assert "feed-forward network and residual fused" in str(report)
    assert operations(model) == (FUSED if name == "Electra" else POOLED)
    for part, module in model.named_modules():
        assert isinstance(module, classes[part])
        assert type(module).__name__ == classes[part].__name__
    assert not fusedformer.fuse(model).swapped
    fusedformer.unfuse(model)
    assert {part: type(module) for part, module in model.named_modules()} == classes
    assert operations(model) == []


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_as_accurate_as_the_layer_was(activation: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = build(hidden_act=activation).encoder.layer[0].to(dtype)
    fused = copy.deepcopy(layer)
    fusedformer.fuse(torch.nn.ModuleDict({"model": build(), "layer": fused}))
    assert type(fused) is not type(layer)
    x = torch.randn(17, 32, generator=generator).to(dtype)
    grad_out = torch.randn(17, 32, generator=generator).to(dtype)

    def run(part: Any) -> dict[str, Tensor]:
        parameters = dict(part.named_parameters())
        used = {name: p for name, p in parameters.items() if name.startswith(("intermediate", "output"))}
        given = x.to(next(iter(used.values())).dtype).requires_grad_()
        out = part.feed_forward_chunk(given)
        grads = torch.autograd.grad(out, [given, *used.values()], grad_out.to(out.dtype))
        return {"out": out.detach()} | dict(zip(["grad input", *used], grads, strict=True))

    truth, eager = run(copy.deepcopy(layer).double()), run(layer)
    for name, actual in run(fused).items():
        assert_within_contract(actual, truth[name], eager[name], name)


def test_an_activation_that_no_kernel_has_is_left() -> None:
    model = build(hidden_act="mish")
    report = fusedformer.fuse(model)
    assert report.left == {"encoder.layer.0": "no kernel has the activation MishActivation"}
    norm = "dropout_add_layer_norm"
    assert operations(model) == [*PROJECTIONS, norm, "linear", "linear", norm, "linear"]


def test_code_of_its_own_is_left() -> None:
    """A subclass that computes something else, and a method set on the instance."""
    model = build()
    layer = model.encoder.layer[0]

    class Other(type(layer)):  # type: ignore[misc]
        def feed_forward_chunk(self, attention_output: Any) -> Any:
            return attention_output

    layer.__class__ = Other
    layer.attention.output.forward = lambda hidden_states, input_tensor: input_tensor
    report = fusedformer.fuse(model)
    assert report.left == {"encoder.layer.0.attention.output": "a method of its own was set on it"}
    assert type(layer) is Other
    assert operations(model) == [*PROJECTIONS[:-1], "linear"]  # of the attention, of the pooler


@pytest.mark.parametrize("name", LLAMAS)
def test_llamas_layers_and_their_copies_are_fused_and_put_back(name: str) -> None:
    model, ids = build_llama(name), tokens()
    classes = {part: type(module) for part, module in model.named_modules()}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    report = fusedformer.fuse(model, verify={"input_ids": ids})
    assert report.differences is not None
    assert report.differences["output.logits"] < 1e-4
    norm, of_heads = "dropout_add_rms_norm", 2 if name == "Qwen3" else 0  # of query and key
    found = operations(model)
    assert found.count("linear") == 4 + 1
    assert found.count(norm) == 2 + 1 + of_heads
    assert found.count("feed_forward") == found.count("attention") == 1
    assert not fusedformer.fuse(model).swapped
    fusedformer.unfuse(model)
    assert {part: type(module) for part, module in model.named_modules()} == classes
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_what_our_layers_read_themselves_is_left_to_them() -> None:
    """A linear layer that is swapped is none whose parameters an encoder layer of ours would read."""
    encoder = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    report = fusedformer.fuse(torch.nn.ModuleDict({"model": build(), "encoder": encoder}))
    assert "model.pooler.dense" in report.swapped
    assert [name for name in report.swapped if name.startswith("encoder")] == ["encoder", "encoder.self_attn"]
    assert type(encoder.linear1) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_llama_is_as_accurate_as_it_was(dtype: torch.dtype, seed: int) -> None:
    """Each part that is swapped, its output and every gradient."""
    layer = build_llama().model.layers[0].to(dtype)
    fused = copy.deepcopy(layer)
    fusedformer.fuse(torch.nn.ModuleDict({"model": build_llama(), "layer": fused}))
    x, grad_out = (torch.randn(17, 32, generator=torch.Generator().manual_seed(seed + i)).to(dtype) for i in range(2))
    for name in ("mlp", "input_layernorm", "self_attn.q_proj"):
        part = layer.get_submodule(name)

        def run(part: Any) -> dict[str, Tensor]:
            parameters = dict(part.named_parameters())
            given = x.to(next(iter(parameters.values())).dtype).requires_grad_()
            out = part(given)
            grads = torch.autograd.grad(out, [given, *parameters.values()], grad_out.to(out.dtype))
            return {"out": out.detach()} | dict(zip(["grad input", *parameters], grads, strict=True))

        exact = copy.deepcopy(part).double()
        if name == "input_layernorm":  # Hugging Face's computes in float32, whatever it is given
            exact = torch.nn.RMSNorm(part.weight.shape, part.variance_epsilon, dtype=torch.float64)
            exact.load_state_dict(part.state_dict())
        truth, eager = run(exact), run(part)
        for tensor, actual in run(fused.get_submodule(name)).items():
            assert_within_contract(actual, truth[tensor], eager[tensor], f"{name}: {tensor}")


def test_a_llama_generates_the_same_tokens_after_fuse() -> None:
    model, ids = build_llama(num_hidden_layers=2), tokens()
    options: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    fusedformer.fuse(model)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options), expected)


def adapt_llama(layer: Any) -> None:
    layer.mlp.up_proj = Doubled(layer.mlp.up_proj)
    layer.self_attn.v_proj = Doubled(layer.self_attn.v_proj)


def hook_llama(layer: Any) -> None:
    layer.mlp.gate_proj.register_forward_hook(lambda module, args, out: 2.0 * out)
    layer.input_layernorm.register_forward_hook(lambda module, args, out: 2.0 * out)


def parametrize_llama(layer: Any) -> None:
    for part in (layer.mlp.down_proj, layer.self_attn.o_proj):
        torch.nn.utils.parametrizations.weight_norm(part)
        with torch.no_grad():
            part.parametrizations.weight.original0.mul_(2.0)


class Double(Tensor):
    """A tensor that is more than it seems, as a quantised weight is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [x.as_subclass(Tensor) * 2.0 if isinstance(x, Double) else x for x in args]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*plain, **(kwargs or {}))


def quantise_llama(layer: Any) -> None:
    for part in (layer.mlp.down_proj, layer.self_attn.o_proj):
        weight = part.weight.detach().as_subclass(Double)
        del part.weight
        part.weight = weight


@pytest.mark.parametrize("change", [adapt_llama, hook_llama, parametrize_llama, quantise_llama])
def test_what_is_attached_to_a_llama_later_is_not_left_out(change: Callable[[Any], None]) -> None:
    model = build_llama()
    stock, ids = copy.deepcopy(model), tokens()
    fusedformer.fuse(model)
    with torch.no_grad():
        unchanged = stock(input_ids=ids).logits
        for each in (stock, model):
            change(each.model.layers[0])
        expected, actual = (each(input_ids=ids).logits for each in (stock, model))
    assert not torch.allclose(expected, unchanged, atol=1e-2)
    torch.testing.assert_close(actual, expected)


def test_a_llama_whose_weights_are_of_two_dtypes_runs_its_own_norm() -> None:
    """Norms kept in float32 beside half-precision weights, as some training does."""
    norm = build_llama().model.norm
    fused = copy.deepcopy(norm)
    fusedformer.fuse(torch.nn.ModuleDict({"model": build_llama(), "norm": fused}))
    x = torch.randn(3, 32).bfloat16()
    with torch.no_grad():
        assert fused(x).dtype == torch.float32
        assert torch.equal(fused(x), norm(x))


class Doubled(torch.nn.Module):
    """What an adapter does: another module in a part's place, that calls it."""

    def __init__(self, inside: torch.nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x)
        return 2.0 * out


def adapt(layer: Any) -> None:
    layer.intermediate.dense = Doubled(layer.intermediate.dense)


def hook(layer: Any) -> None:
    layer.output.dense.register_forward_hook(lambda module, args, out: 2.0 * out)


def hook_before(layer: Any) -> None:
    layer.intermediate.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))


def parametrize(layer: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer.output.dense)
    with torch.no_grad():
        layer.output.dense.parametrizations.weight.original0.mul_(2.0)


@pytest.mark.parametrize("change", [adapt, hook, hook_before, parametrize])
def test_what_is_attached_later_is_not_left_out(change: Callable[[Any], None]) -> None:
    model = build()
    stock, ids = copy.deepcopy(model), tokens()
    fusedformer.fuse(model)
    with torch.no_grad():
        unchanged = stock(input_ids=ids).last_hidden_state
        for each in (stock, model):
            change(each.encoder.layer[0])
        expected, actual = (each(input_ids=ids).last_hidden_state for each in (stock, model))
    assert not torch.allclose(expected, unchanged, atol=1e-2)
    torch.testing.assert_close(actual, expected)


def test_copies_and_pickles() -> None:
    model, ids = build(), tokens()
    fusedformer.fuse(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        for each in again:
            assert operations(each) == POOLED
            assert torch.equal(each(input_ids=ids).last_hidden_state, expected)
            fusedformer.unfuse(each)
            assert operations(each) == []


def test_dropout_is_on_in_training_alone() -> None:
    model, ids = build(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0), tokens()
    fusedformer.fuse(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)
        x = torch.randn(64, 32)
        part = model.encoder.layer[0].attention.output.train()
        part.LayerNorm.weight.fill_(1.0)
        part.LayerNorm.bias.zero_()
        first, second = (part(x, torch.zeros_like(x)) for _ in range(2))
        assert not torch.equal(first, second)
        dropped = first == first.mode(dim=1, keepdim=True).values  # what is dropped is 0 before the norm
        assert 0.4 < dropped.float().mean() < 0.6


def test_compiles_whole() -> None:
    model, ids = build(), tokens()
    fusedformer.fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)
