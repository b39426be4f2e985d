"""What the layers promise beyond torch's: empty rows, one result in every mode, causality without a mask, dropout that
is the same everywhere, and modules inside that are hooked or replaced."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedformer
from fusedformer import nn
from fusedformer.transformer.cache import KVCache
from tests.tolerances import assert_equal_bits

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

D, HEADS = 16, 2
SIZES: dict[str, Any] = {"d_model": D, "nhead": HEADS, "dim_feedforward": 24, "batch_first": True}
orders = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
kinds = pytest.mark.parametrize("kind", ["Encoder", "Decoder"])


class Recorder(TorchDispatchMode):
    """The operators that ran, and the largest tensor that one of them returned; a fused operator counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.operators.append(func.name())
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return results


def layer(kind: str, module: Any = nn, **options: Any) -> Any:
    return getattr(module, f"Transformer{kind}Layer")(**{**SIZES, "dropout": 0.0, **options})


def stack(kind: str, module: Any = nn, **options: Any) -> Any:
    return getattr(module, f"Transformer{kind}")(layer(kind, module, **options), 2)


def inputs(kind: str, length: int = 6) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, length, D) for _ in range(1 if kind == "Encoder" else 2))


def padding_of(kind: str, mask: Tensor) -> dict[str, Tensor]:
    names = ["src"] if kind == "Encoder" else ["tgt", "memory"]
    return {f"{name}_key_padding_mask": mask for name in names}


# Of two rows one is padding alone, and the other's is at the front and in the middle.
PADDING = torch.tensor([[True] * 6, [True, False, False, True, False, False]])


@kinds
@orders
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
def test_a_row_of_padding_is_no_nan_and_changes_no_other(kind: str, norm_first: bool, floating: bool) -> None:
    model, given = stack(kind, norm_first=norm_first), inputs(kind)
    mask = torch.zeros(2, 6).masked_fill(PADDING, float("-inf")) if floating else PADDING
    results = []
    for training, grad in ((True, True), (False, True), (False, False)):
        with torch.set_grad_enabled(grad):
            results.append(model.train(training)(*given, **padding_of(kind, mask)))
    assert results[0].isfinite().all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    alone = model(*(x[1:] for x in given), **padding_of(kind, mask[1:]))
    torch.testing.assert_close(results[0][1:], alone)
    results[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@kinds
def test_nan_in_padding_does_not_leak(kind: str) -> None:
    model, given = stack(kind).eval(), inputs(kind)
    seen = given[-1]  # what the keys are of
    expected = model(*given, **padding_of(kind, PADDING))
    seen[PADDING] = float("nan")
    actual = model(*given, **padding_of(kind, PADDING))
    keep = ~PADDING if kind == "Encoder" else torch.ones_like(PADDING)
    torch.testing.assert_close(actual[keep], expected[keep])


def test_evaluation_heeds_every_mask() -> None:
    model, (x,) = stack("Encoder").eval(), inputs("Encoder")
    stock = stack("Encoder", torch.nn)
    stock.load_state_dict(model.state_dict())
    allowed = torch.rand(4, 6, 6) < 0.5
    allowed[..., 1] = True
    allowed |= torch.eye(6, dtype=torch.bool)
    bias = torch.randn(6, 6)
    padding = PADDING.clone()
    padding[0] = torch.tensor([False, False, True, True, False, True])
    calls: list[dict[str, Any]] = [
        {"mask": ~allowed},
        {"mask": bias},
        {"mask": ~allowed, "src_key_padding_mask": padding & ~torch.tensor([0, 1, 0, 0, 0, 0]).bool()},
        {"src_key_padding_mask": padding},
    ]
    for call in calls:
        with torch.no_grad():
            actual = model(x, **call)
        torch.testing.assert_close(actual, stock.train()(x, **call))  # torch's evaluation takes another path


@kinds
@orders
@pytest.mark.parametrize("batch_first", [True, False])
def test_is_causal_needs_no_mask_and_no_other_makes_the_host_wait(
    kind: str, norm_first: bool, batch_first: bool
) -> None:
    model, given = stack(kind, norm_first=norm_first, batch_first=batch_first), inputs(kind)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    assert_equal_bits(causal, torch.nn.Transformer.generate_square_subsequent_mask(6))
    mask, hint = ("mask", "is_causal") if kind == "Encoder" else ("tgt_mask", "tgt_is_causal")
    length = 6 if batch_first else 2
    with Recorder() as recorder:
        expected = model(*given, **{mask: causal[:length, :length]})
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero"} & {*recorder.operators}
    for read in (None, causal[:length, :length], causal[:length, :length].isinf()):
        torch.testing.assert_close(model(*given, **{mask: read, hint: True}), expected)


@pytest.mark.parametrize("training", [True, False])
def test_causality_and_padding_make_no_tensor_of_both_lengths(training: bool) -> None:
    length, batch = 512, 2
    model = nn.Transformer(**{**SIZES, "dropout": 0.1}, num_encoder_layers=1, num_decoder_layers=1).train(training)
    src, tgt = torch.randn(batch, length, D), torch.randn(batch, length, D, requires_grad=True)
    padding = torch.arange(length) >= torch.tensor([[length], [100]])
    paddings = {f"{name}_key_padding_mask": padding for name in ("src", "tgt", "memory")}
    with Recorder() as recorder:
        out = model(src, tgt, **paddings, src_is_causal=True, tgt_is_causal=True, memory_is_causal=True)
        out.sum().backward()
    assert "fusedformer::attention_forward" in recorder.operators
    assert "fusedformer::attention_backward" in recorder.operators
    assert recorder.largest <= 3 * batch * length * D < length * length
    explanation = fusedformer.explain(model, src, tgt, **paddings, tgt_is_causal=True)
    for decision in explanation.decisions:
        if decision.operation == "attention":
            assert decision.workspace_bytes < 4 * length * length, decision


@kinds
@orders
def test_each_sublayer_is_one_fused_call(kind: str, norm_first: bool) -> None:
    model = layer(kind, norm_first=norm_first, dropout=0.1)
    with Recorder() as recorder:
        model(*inputs(kind))
    fused = [
        recorder.operators.count(f"fusedformer::{name}_forward")
        for name in ("linear", "attention", "norm", "feed_forward")
    ]
    assert fused == ([2, 1, 2, 1] if kind == "Encoder" else [5, 2, 3, 1])
    assert not any(
        name in recorder.operators for name in ("aten::add.Tensor", "aten::bernoulli_", "aten::native_dropout")
    )


def run(model: Any, given: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    torch.manual_seed(7)
    with fusedformer.use_backend(backend):
        out = model(*given)
        grads = torch.autograd.grad(out.square().sum(), [*given, *model.parameters()])
    return [out.detach(), *grads]


@pytest.mark.parametrize(("kind", "norm_first"), [("Encoder", True), ("Decoder", False)], ids=str)
def test_dropout_is_the_same_on_every_kernel_backend(kind: str, norm_first: bool) -> None:
    model = layer(kind, norm_first=norm_first, dropout=0.4)
    given = tuple(x.requires_grad_() for x in inputs(kind))
    expected = run(model, given, "reference")
    for backend in ("cpu", "triton"):
        for actual, want in zip(run(model, given, backend), expected, strict=True):
            torch.testing.assert_close(actual, want, rtol=1e-3, atol=1e-4)
    other = run(copy.deepcopy(model).eval(), given, "reference")
    assert not torch.allclose(other[0], expected[0], atol=0.1)


@kinds
@orders
def test_dropout_is_torchs_in_distribution(kind: str, norm_first: bool) -> None:
    theirs = layer(kind, torch.nn, norm_first=norm_first, dropout=0.3)
    ours = layer(kind, norm_first=norm_first, dropout=0.3)
    ours.load_state_dict(theirs.state_dict())
    count = 8000
    given = tuple(torch.randn(1, 3, D).expand(count, -1, -1) for _ in inputs(kind))
    with torch.no_grad():
        a, b = theirs(*given), ours(*given)
    # Of each element mean and variance over the draws, in standard errors of their difference.
    for moment in (lambda x: x, lambda x: (x - x.mean(0)).square()):
        x, y = moment(a), moment(b)
        error = ((x.var(0) + y.var(0)) / count).sqrt()
        assert ((x.mean(0) - y.mean(0)).abs() < 6 * error).all()
    assert (b.var(0) > 0).all()


class Doubled(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replace(name: str, make: Callable[[Any], torch.nn.Module]) -> Callable[[Any], None]:
    return lambda model: setattr(model, name, make(getattr(model, name)))


def hook(name: str) -> Callable[[Any], None]:
    return lambda model: getattr(model, name).register_forward_hook(lambda module, args, out: out * 1.5) and None


def doubled(linear: torch.nn.Linear) -> torch.nn.Module:
    new = Doubled(linear.in_features, linear.out_features)
    new.load_state_dict(linear.state_dict())
    return new


STOCK_ATTENTION = torch.nn.MultiheadAttention(D, HEADS, batch_first=True)


class Scale(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * x


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hooked linear1": hook("linear1"),
    "hooked dropout": hook("dropout"),
    "hooked dropout1": hook("dropout1"),
    "hooked dropout2": hook("dropout2"),
    "hooked norm1": hook("norm1"),
    "hooked norm2": hook("norm2"),
    "hooked attention": lambda model: model.self_attn.register_forward_hook(lambda *x: (x[-1][0] * 2, None)),
    "another linear2": replace("linear2", doubled),
    "another norm2": replace("norm2", lambda norm: torch.nn.RMSNorm(D)),
    "another dropout1": replace("dropout1", lambda dropout: Scale()),
    "another attention": replace("self_attn", lambda attention: copy.deepcopy(STOCK_ATTENTION)),
    "spectral norm": lambda model: torch.nn.utils.parametrizations.spectral_norm(model.linear1),
    "weight norm of old": lambda model: torch.nn.utils.weight_norm(model.linear2),
    "method of its own": lambda model: setattr(model, "_ff_block", lambda x: x.tanh()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@kinds
@orders
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_attached_to_the_modules_inside_runs(kind: str, norm_first: bool, change: str, seed: int) -> None:
    theirs, ours = layer(kind, torch.nn, norm_first=norm_first), layer(kind, norm_first=norm_first)
    ours.load_state_dict(theirs.state_dict())
    given = inputs(kind)
    before = ours(*given)
    for model in (theirs, ours):
        torch.manual_seed(seed)
        CHANGES[change](model)
    torch.manual_seed(seed)
    expected = theirs(*given)
    assert not torch.allclose(before, expected) or change == "weight norm of old"
    torch.manual_seed(seed)
    torch.testing.assert_close(ours(*given), expected)


class Own(nn.TransformerEncoderLayer):
    """Written for torch's layer: its block takes the masks that torch hands on."""

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        assert attn_mask is not None
        assert key_padding_mask is not None
        out: Tensor = self.dropout1(
            x + attn_mask.clamp(min=-1.0).mean(-1)[:, None] + key_padding_mask.clamp(min=-2.0).mean()
        )
        return out


def test_a_block_that_a_subclass_overrides_runs() -> None:
    class Stock(torch.nn.TransformerEncoderLayer):
        _sa_block = Own._sa_block

    ours = nn.TransformerEncoder(Own(**SIZES, dropout=0.0), 2)
    theirs = torch.nn.TransformerEncoder(Stock(**SIZES, dropout=0.0), 2)
    theirs.load_state_dict(ours.state_dict())
    (x,) = inputs("Encoder")
    call = {"mask": torch.rand(6, 6) < 0.5, "src_key_padding_mask": PADDING}
    torch.testing.assert_close(ours(x, **call), theirs(x, **call))


class Custom(torch.nn.Module):
    """A layer of someone else in our stack, which reads the attributes and masks that torch's stack gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = torch.nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.linear = torch.nn.Linear(D, D)

    def forward(self, src: Tensor, src_mask: Any, is_causal: Any, src_key_padding_mask: Any) -> Tensor:
        out: Tensor = self.linear(src) + src_mask.clamp(min=-1.0).sum() + src_key_padding_mask.clamp(min=-1.0).sum()
        return out


def test_stacks_take_other_layers_and_transformers_other_stacks() -> None:
    ours, theirs = nn.TransformerEncoder(Custom(), 2), torch.nn.TransformerEncoder(Custom(), 2)  # type: ignore[arg-type]
    theirs.load_state_dict(ours.state_dict())
    (x,) = inputs("Encoder")
    call = {"mask": torch.rand(6, 6) < 0.5, "src_key_padding_mask": PADDING}
    torch.testing.assert_close(ours(x, **call), theirs(x, **call))
    decoder = stack("Decoder", torch.nn)
    model = nn.Transformer(**SIZES, custom_encoder=ours, custom_decoder=decoder)
    assert model.encoder is ours
    assert model.decoder is decoder
    call = {"src_mask": call["mask"], "src_key_padding_mask": PADDING}
    torch.testing.assert_close(model(x, x, **call), decoder(x, ours(x, call["src_mask"], PADDING)))


def test_works_in_torchs_stack_in_evaluation() -> None:
    ours = layer("Encoder").eval()
    model, (x,) = torch.nn.TransformerEncoder(ours, 2).eval(), inputs("Encoder")
    padding = torch.arange(6) >= torch.tensor([[6], [3]])
    with torch.no_grad():
        actual = model(x, src_key_padding_mask=padding)
        expected = model.layers[1](model.layers[0](x, None, padding), None, padding)
    torch.testing.assert_close(actual, expected)


CONSTRUCTORS: list[dict[str, Any]] = [
    {},
    {"bias": False, "norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-3},
    {"batch_first": True, "dtype": torch.float64, "activation": torch.nn.GELU()},
]


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_starts_as_torch_does_and_exchanges_state(options: dict[str, Any], seed: int) -> None:
    built = []
    for module in (torch.nn, nn):
        torch.manual_seed(seed)
        built.append(module.Transformer(12, 3, 2, 1, 20, 0.3, **options))
    theirs, ours = built
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in theirs.state_dict().items():
        assert_equal_bits(ours.state_dict()[name], x, name)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    mine_by_name = dict(ours.named_modules())
    for name, part in theirs.named_modules():
        mine = mine_by_name[name]
        assert isinstance(mine, type(part))
        switches = {"activation_relu_or_gelu", "use_nested_tensor"}  # of torch's inference path
        for key, value in vars(part).items():
            if isinstance(value, bool | int | float | str | None) and key not in switches:
                assert getattr(mine, key) == value, (name, key)
    with pytest.raises(RuntimeError, match="relu/gelu"):
        nn.TransformerEncoderLayer(12, 3, activation="swish")


@kinds
def test_is_copied_and_pickled(kind: str) -> None:
    model, given = stack(kind), inputs(kind)
    model.layers[0].recompute = True
    expected = model(*given).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert other.layers[0].recompute
        assert_equal_bits(other(*given).detach(), expected)


@kinds
@orders
def test_recompute_changes_the_memory_alone(kind: str, norm_first: bool) -> None:
    kept, given = [], tuple(x.requires_grad_() for x in inputs(kind))
    model = layer(kind, norm_first=norm_first, dropout=0.2)
    results = []
    for model.recompute in (False, True):
        saved: list[Tensor] = []

        def keep(x: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            torch.manual_seed(3)
            out = model(*given)
        kept.append(sum(x.numel() for x in saved))
        results.append([out.detach(), *torch.autograd.grad(out.sum(), [*given, *model.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert kept[0] - kept[1] == 2 * 6 * 24  # the hidden features


@orders
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("copies", [1, 2])
def test_decoding_is_the_forward_of_the_last_tokens(norm_first: bool, batch_first: bool, copies: int) -> None:
    model = stack("Decoder", norm_first=norm_first, batch_first=batch_first).eval()
    model.norm = torch.nn.LayerNorm(D)
    x, memory = torch.randn(2 * copies, 6, D), torch.randn(2, 5, D)
    padding = torch.tensor([[False] * 5, [False, True, False, False, True]])
    shared = memory.repeat_interleave(copies, 0)
    whole = (x, shared) if batch_first else (x.transpose(0, 1), shared.transpose(0, 1))
    paddings = {"memory_key_padding_mask": padding.repeat_interleave(copies, 0)}
    cache = KVCache(2, 2, HEADS, D // HEADS, 8, dtype=x.dtype, device="cpu")
    with torch.no_grad():
        expected = model(*whole, tgt_is_causal=True, **paddings)
        model.remember(memory, cache, ~padding)
        cache.repeat(copies)
        got = []
        for part in x.split([3, 1, 2], 1):
            got.append(model.train().decode(part, cache))
            cache.advance(part.size(1))
    torch.testing.assert_close(torch.cat(got, 1), expected if batch_first else expected.transpose(0, 1))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "features": ({"src": torch.randn(2, 6, 15)}, ValueError, r"src: got shape \(2, 6, 15\), expected \(N, length"),
    "rank": ({"tgt": torch.randn(D)}, ValueError, r"tgt: got shape \(16,\)"),
    "batch": ({"tgt": torch.randn(3, 6, D)}, ValueError, r"tgt: got shape \(3, 6, 16\), expected the batch of src"),
    "no tensor": ({"src": None}, TypeError, "src: got NoneType, expected a Tensor"),
    "mask": ({"tgt_mask": torch.zeros(5, 6)}, ValueError, r"attn_mask: got shape \(5, 6\), expected \(6, 6\)"),
    "padding": (
        {"src_key_padding_mask": torch.zeros(2, 6, dtype=torch.int64)},
        TypeError,
        "key_padding_mask: got int64, expected bool",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = nn.Transformer(**SIZES, num_encoder_layers=1, num_decoder_layers=1)
    with pytest.raises(kind, match=message):
        model(**{"src": torch.randn(2, 6, D), "tgt": torch.randn(2, 6, D), **changes})
