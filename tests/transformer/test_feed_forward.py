"""``FeedForward`` and ``GatedFeedForward`` against the same networks of ``torch.nn``'s layers: parameters, numbers,
modes, and what a module has to survive."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor

import fusedformer
from fusedformer import nn
from fusedformer.functional import feed_forward
from tests.tolerances import assert_equal_bits, assert_within_contract

D, FF = 24, 40
ACTIVATIONS = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}


class Plain(torch.nn.Module):
    """What a user of torch writes."""

    def __init__(self, activation: str = "relu", bias: bool = True, gated: bool = False) -> None:
        super().__init__()
        self.linear1, self.linear2 = torch.nn.Linear(D, FF, bias), torch.nn.Linear(FF, D, bias)
        self.linear_gate = torch.nn.Linear(D, FF, bias) if gated else None
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        value = self.linear1(x)
        hidden = self.act(value) if self.linear_gate is None else self.act(self.linear_gate(x)) * value
        out: Tensor = self.linear2(hidden)
        return out if residual is None else residual + out


def pair(activation: str, bias: bool, gated: bool, **given: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Torch's and ours, with the same parameters."""
    theirs, made = Plain(activation, bias, gated), nn.GatedFeedForward if gated else nn.FeedForward
    ours = made(D, FF, 0.0, activation, bias, **given)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(module: torch.nn.Module, x: Tensor, with_residual: bool, grad_out: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().to(next(module.parameters()).dtype).requires_grad_()
    out = module(leaf, leaf) if with_residual else module(leaf)
    named = {"input": leaf, **dict(module.named_parameters())}
    grads = torch.autograd.grad(out, list(named.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(named, grads, strict=True))}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("activation", "bias"), [("relu", True), ("gelu", True), ("silu", False)])
def test_numbers_are_torchs(
    activation: str, bias: bool, gated: bool, with_residual: bool, recompute: bool, seed: int
) -> None:
    theirs, ours = pair(activation, bias, gated, recompute=recompute)
    x, grad_out = torch.randn(3, 7, D), torch.randn(3, 7, D)
    eager, actual = (run(module, x, with_residual, grad_out) for module in (theirs, ours))
    truth = run(copy.deepcopy(theirs).double(), x, with_residual, grad_out)
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        assert_within_contract(value, truth[name], eager[name], name)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_torchs_encoder_layer(bias: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(D, 2, FF, bias=bias)
    own = {name: x for name, x in layer.state_dict().items() if name.startswith("linear")}
    ours = nn.FeedForward(D, FF, bias=bias)
    assert list(ours.state_dict()) == list(own)
    ours.load_state_dict(own)
    x = torch.randn(5, D)
    torch.testing.assert_close(ours.eval()(x), layer.eval()._ff_block(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_initialised_as_torchs_linear_layers(gated: bool, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    theirs = Plain("relu", bias, gated)
    torch.manual_seed(seed)
    ours = nn.GatedFeedForward(D, FF, bias=bias) if gated else nn.FeedForward(D, FF, bias=bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, x in theirs.state_dict().items():
        assert_equal_bits(ours.state_dict()[name], x, name)


def test_defaults() -> None:
    plain, gated = nn.FeedForward(8), nn.GatedFeedForward(8, 12)
    assert plain.linear1.weight.shape == (2048, 8)
    assert (plain.activation, plain.dropout, plain.residual_dropout, plain.recompute) == ("relu", 0.1, 0.1, False)
    assert plain.linear1.bias is not None
    assert (gated.activation, gated.dropout, gated.residual_dropout, gated.recompute) == ("silu", 0.0, 0.0, False)
    assert gated.linear1.bias is gated.linear_gate.bias is gated.linear2.bias is None


def test_device_and_dtype() -> None:
    for module in (
        nn.FeedForward(8, 12, device="meta", dtype=torch.bfloat16),
        nn.GatedFeedForward(8, 12, bias=True, device="meta", dtype=torch.bfloat16),
    ):
        assert {(x.device.type, x.dtype) for x in module.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(("name", "activation"), [("swiglu", "silu"), ("geglu", "gelu"), ("reglu", "relu")])
def test_shazeers_names(name: str, activation: str) -> None:
    module = nn.GatedFeedForward(D, FF, activation=name)
    assert module.activation == activation
    other = nn.GatedFeedForward(D, FF, activation=activation)
    other.load_state_dict(module.state_dict())
    x = torch.randn(5, D)
    assert_equal_bits(module(x).detach(), other(x).detach())
    with pytest.raises(ValueError, match=f"activation: got '{name}', expected one of"):
        nn.FeedForward(D, FF, activation=name)


def test_gated_parameters_in_llamas_places() -> None:
    module = nn.GatedFeedForward(D, FF)
    gate_proj, up_proj, down_proj = module.linear_gate, module.linear1, module.linear2
    x = torch.randn(5, D)
    torch.testing.assert_close(module(x), down_proj(torch.nn.functional.silu(gate_proj(x)) * up_proj(x)))


# ---- activations


@pytest.mark.parametrize("activation", [torch.relu, torch.nn.functional.relu, "relu"])
def test_torchs_relu_is_relu(activation: str | Callable[[Tensor], Tensor]) -> None:
    assert nn.FeedForward(D, FF, activation=activation).activation == "relu"


def test_an_activation_that_learns() -> None:
    module = nn.FeedForward(D, FF, 0.0, activation=torch.nn.PReLU())
    assert {name for name, _ in module.named_parameters()} >= {"activation.weight"}
    x = torch.randn(5, D)
    act = module.activation
    assert callable(act)
    expected = module.linear2(act(module.linear1(x)))
    torch.testing.assert_close(module(x), expected)
    module(x).sum().backward()
    assert all(x.grad is not None for x in module.parameters())
    assert fusedformer.explain(module, x).backend == "torch"


# ---- modes


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_is_of_training_alone(gated: bool, seed: int) -> None:
    ours = nn.GatedFeedForward(D, FF, 0.5) if gated else nn.FeedForward(D, FF, 0.5)
    x = torch.randn(2, 9, D)
    gate = ours.linear_gate.weight if isinstance(ours, nn.GatedFeedForward) else None
    weights = (ours.linear1.weight, ours.linear2.weight, ours.linear1.bias, ours.linear2.bias)
    without = feed_forward(x, *weights, gate_weight=gate, activation=ours.activation, residual=x)
    assert_equal_bits(ours.eval()(x, x).detach(), without.detach())
    ours.train()
    torch.manual_seed(seed)
    first, second = ours(x, x), ours(x, x)
    torch.manual_seed(seed)
    assert_equal_bits(ours(x, x).detach(), first.detach())
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, without)
    dropped = (first == x).double().mean().item()  # by the residual's dropout
    assert 0.35 < dropped < 0.65
    assert not (ours(x) == 0).any()  # without a residual only hidden features are dropped


def test_dropouts_of_their_own() -> None:
    module = nn.FeedForward(D, FF, 0.0, residual_dropout=1.0)
    x = torch.randn(5, D)
    assert_equal_bits(module(x, x).detach(), x)
    module = nn.FeedForward(D, FF, 1.0, residual_dropout=0.0)
    torch.testing.assert_close(module(x, x), x + module.linear2.bias)
    assert nn.FeedForward(D, FF, 0.25).residual_dropout == 0.25


def test_autocast() -> None:
    theirs, ours = pair("gelu", True, False)
    x = torch.randn(5, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype == torch.bfloat16
        ours(x).sum().backward()
    assert {x.grad.dtype for x in ours.parameters() if x.grad is not None} == {torch.float32}


# ---- what a module has to survive

MODULES: list[Callable[[], nn.FeedForward]] = [
    lambda: nn.FeedForward(D, FF, 0.0, "gelu", residual_dropout=0.25, recompute=True),
    lambda: nn.GatedFeedForward(D, FF, 0.0, "geglu", bias=True),
]


def through_a_file(module: torch.nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_a_file])
def test_copies(again: Callable[[Any], Any], make: Callable[[], nn.FeedForward]) -> None:
    module = make()
    other, x = again(module), torch.randn(5, D)
    assert repr(other) == repr(module)
    assert_equal_bits(other(x).detach(), module(x).detach())
    with torch.no_grad():
        other.linear1.weight.zero_()  # its own
    assert (module.linear1.weight != 0).all()


@pytest.mark.parametrize("make", MODULES)
def test_state_dict_and_strict_loading(make: Callable[[], nn.FeedForward]) -> None:
    module, other, x = make(), make(), torch.randn(5, D)
    other.load_state_dict(module.state_dict())
    assert_equal_bits(other(x).detach(), module(x).detach())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_repr() -> None:
    said = repr(nn.FeedForward(D, FF, 0.1, "gelu", recompute=True))
    assert said.startswith("FeedForward(\n  activation=gelu, dropout=0.1, residual_dropout=0.1, recompute=True\n")
    assert "(linear1): Linear(in_features=24, out_features=40, bias=True)" in said
    assert "recompute" not in repr(nn.GatedFeedForward(D, FF))
    assert "activation=silu, dropout=0.0" in repr(nn.GatedFeedForward(D, FF))


@pytest.mark.parametrize("make", MODULES)
def test_one_graph(make: Callable[[], nn.FeedForward]) -> None:
    module, x = make(), torch.randn(5, D)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    torch.compiler.reset()


@pytest.mark.parametrize("make", MODULES)
def test_training_steps_go_down(make: Callable[[], nn.FeedForward]) -> None:
    module, x, target = make(), torch.randn(17, D), torch.randn(17, D)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_use_backend_chooses() -> None:
    module, x = nn.FeedForward(D, FF), torch.randn(5, D)
    with fusedformer.use_backend("reference"):
        assert fusedformer.explain(module, x).backend == "reference"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"activation": "tanh"}, ValueError, "activation: got 'tanh', expected one of"),
        ({"activation": None}, TypeError, "activation: got NoneType, expected one of"),
        ({"dropout": 1.5}, ValueError, "dropout: got 1.5, expected a probability"),
        ({"residual_dropout": -0.5}, ValueError, "residual_dropout: got -0.5, expected a probability"),
    ],
)
@pytest.mark.parametrize("kind", [nn.FeedForward, nn.GatedFeedForward])
def test_a_bad_argument_is_named(
    kind: type[nn.FeedForward], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        kind(D, FF, **given)


def test_a_bad_input_is_named() -> None:
    module = nn.FeedForward(D, FF)
    with pytest.raises(ValueError, match=r"weight1: got shape \(40, 24\), expected \(d_ff, d_in\) = \(d_ff, 25\)"):
        module(torch.randn(5, D + 1))
    with pytest.raises(TypeError, match="weight1: got float32, expected float64"):
        module(torch.randn(5, D).double())
    with pytest.raises(ValueError, match="residual: got shape"):
        module(torch.randn(5, D), torch.randn(D))


def test_other_modules_know_the_names() -> None:
    assert {"FeedForward", "GatedFeedForward"} <= set(dir(nn))


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter, whose ``weight`` is the layer's own, as adapters' libraries have it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def replaced(module: Any, name: str) -> None:
    setattr(module, name, Adapted(getattr(module, name)))


def hooked(module: Any, name: str) -> None:
    getattr(module, name).register_forward_hook(lambda module, args, out: 2 * out)


def pruned(module: Any, name: str) -> None:
    torch.nn.utils.prune.l1_unstructured(getattr(module, name), "weight", 0.5)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("change", [replaced, hooked, pruned])
@pytest.mark.parametrize("name", ["linear1", "linear2", "linear_gate"])
def test_a_linear_layer_that_does_more_is_called(
    name: str, change: Callable[[Any, str], None], with_residual: bool, seed: int
) -> None:
    theirs, ours = pair("silu", True, gated=True)
    exact = copy.deepcopy(theirs)
    for module in (theirs, ours, exact):
        torch.manual_seed(seed)
        change(module, name)
    exact.double()
    x, grad_out = torch.randn(2, 3, 5, D)
    expected, found, truth = (run(module, x, with_residual, grad_out) for module in (theirs, ours, exact))
    assert found.keys() == expected.keys()
    for key, actual in found.items():
        assert_within_contract(actual, truth[key], expected[key], key)
