"""What whole layers and models are timed on, each next to its stock equal with the same weights: training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedformer import nn

from .cases import DTYPES
from .peers import Results
from .rows import OURS
from .timing import Call

TORCH_NN = "torch.nn"
FEW = 16  # by which a workload is divided to see how long it would take


@dataclass(frozen=True)
class Prepared:
    """A workload made ready: what to call of each peer, ours first; the bytes that one call must read, and of what."""

    calls: dict[str, Call]
    read_bytes: int = 0
    read: Sequence[Tensor] = ()


class Workload(Protocol):
    """What a case computes.

    Attributes:
        name: of the workload, whatever the dtype.
        direction: "training step", "decoding step" or "generation".
        peers: ours first, then what it is compared with.
        tokens: of one call.
        flops: of the products in one call.
    """

    @property
    def name(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def peers(self) -> tuple[str, ...]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def flops(self) -> float: ...

    def missing(self) -> str | None:
        """What keeps it from running, and what to do about it."""
        ...

    def few(self) -> Workload:
        """The same of about a ``FEW``-th of the tokens."""
        ...

    def prepare(self, dtype: str, device: str) -> Prepared: ...

    def ours(self, dtype: str, device: str) -> Results:
        """What ours computes, of few tokens and without dropout."""
        ...

    def expected(self, dtype: str, device: str) -> tuple[Results, list[Results]]:
        """The same in float64, and by the stock equal in the dtype, a few times over where that varies."""
        ...


def _attempts(stock: Callable[[], Results]) -> list[Results]:
    """Stock's results, and again with attention's sums in another order: all that follows is rounded otherwise."""
    with sdpa_kernel(SDPBackend.MATH):
        in_another_order = stock()
    return [stock(), in_another_order]


@dataclass(frozen=True)
class LayerStep:
    """A training step of one encoder or decoder layer: forward, and the gradient of every parameter and input.

    A quarter of the batch's keys are padding, a decoder layer is causal besides, dropout is 0.1.
    """

    kind: str
    batch: int
    length: int
    d_model: int = 512
    heads: int = 8
    dim_feedforward: int = 2048
    direction: str = field(default="training step", init=False)
    peers: tuple[str, ...] = field(default=(OURS, TORCH_NN), init=False)

    @property
    def name(self) -> str:
        return f"{self.kind}_layer-{self.direction.replace(' ', '_')}-B{self.batch}-L{self.length}-d{self.d_model}"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def flops(self) -> float:
        """Backward twice forward; of the causal scores only those below the diagonal."""
        attentions, scores = (2, 1.5) if self.kind == "decoder" else (1, 1.0)
        parameters = 4 * attentions * self.d_model**2 + 2 * self.d_model * self.dim_feedforward
        return 6.0 * self.tokens * (parameters + 2 * scores * self.length * self.d_model)

    def missing(self) -> str | None:
        return None

    def few(self) -> LayerStep:
        return replace(self, batch=max(1, self.batch // FEW), length=max(1, self.length * self.batch // FEW))

    def prepare(self, dtype: str, device: str) -> Prepared:
        calls: dict[str, Call] = {}
        for peer, module in self._modules(0.1).items():
            calls[peer] = self._step(module.to(device, DTYPES[dtype]), DTYPES[dtype], device)
        return Prepared(calls)

    def ours(self, dtype: str, device: str) -> Results:
        return self._judged(OURS, DTYPES[dtype], DTYPES[dtype], device)

    def expected(self, dtype: str, device: str) -> tuple[Results, list[Results]]:
        truth = self._judged(TORCH_NN, DTYPES[dtype], torch.float64, device)
        return truth, _attempts(lambda: self._judged(TORCH_NN, DTYPES[dtype], DTYPES[dtype], device))

    def _modules(self, dropout: float) -> dict[str, torch.nn.Module]:
        """The same weights twice."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            class_name = f"Transformer{self.kind.capitalize()}Layer"
            sizes = (self.d_model, self.heads, self.dim_feedforward, dropout)
            stock = getattr(torch.nn, class_name)(*sizes, batch_first=True)
            fused = getattr(nn, class_name)(*sizes, batch_first=True)
        fused.load_state_dict(stock.state_dict())
        return {OURS: fused, TORCH_NN: stock}

    def _inputs(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        generator = torch.Generator().manual_seed(1)
        names = ("src",) if self.kind == "encoder" else ("tgt", "memory")
        shape = (self.batch, self.length, self.d_model)
        tensors = {name: torch.randn(shape, generator=generator).to(device, dtype) for name in names}
        lengths = torch.randint(max(1, self.length // 2), self.length + 1, (self.batch,), generator=generator)
        padding = (torch.arange(self.length) >= lengths[:, None]).to(device)
        options: dict[str, Any] = {f"{name}_key_padding_mask": padding for name in names}
        if self.kind == "decoder":
            mask = torch.nn.Transformer.generate_square_subsequent_mask(self.length, torch.device(device), torch.bool)
            options |= {"tgt_mask": mask, "tgt_is_causal": True}
        return tensors, options, torch.randn(shape, generator=generator).to(device, dtype)

    def _step(self, module: torch.nn.Module, dtype: torch.dtype, device: str) -> Call:
        tensors, options, grad_out = self._inputs(dtype, device)
        tensors = {name: x.requires_grad_() for name, x in tensors.items()}

        def step() -> None:
            for x in (*module.parameters(), *tensors.values()):
                x.grad = None
            module(**tensors, **options).backward(grad_out)

        return step

    def _judged(self, peer: str, rounded: torch.dtype, dtype: torch.dtype, device: str) -> Results:
        """Output and gradients of few tokens without dropout, from weights and inputs rounded to ``rounded``."""
        few = self.few()
        module = few._modules(0.0)[peer].to(device, rounded).to(dtype)
        tensors, options, grad_out = few._inputs(rounded, device)
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        out = module(**leaves, **options)
        named = dict(module.named_parameters()) | leaves
        grads = torch.autograd.grad(out, list(named.values()), grad_out.to(dtype))
        return {"out": out.detach()} | {f"grad {name}": grad for name, grad in zip(named, grads, strict=True)}


@dataclass(frozen=True)
class Seq2SeqStep:
    """A training step of the paper's model: forward, loss with label smoothing, backward, Adam.

    Source and target are each ``length`` tokens less the padding of a quarter of them; dropout is 0.1 wherever
    torch.nn has it.
    """

    size: str
    batch: int
    length: int
    vocab_size: int = 37_000
    sizes: tuple[tuple[str, int], ...] = ()
    direction: str = field(default="training step", init=False)
    peers: tuple[str, ...] = field(default=(OURS, TORCH_NN), init=False)

    @property
    def name(self) -> str:
        return f"seq2seq_{self.size}-training_step-B{self.batch}-L{self.length}+{self.length}"

    @property
    def tokens(self) -> int:
        return 2 * self.batch * self.length

    @property
    def flops(self) -> float:
        c = self._config(0.1)
        d, half = c.d_model, self.batch * self.length
        feed_forward = 2 * d * c.dim_feedforward
        encoder = 4 * d * d + feed_forward + 2 * self.length * d
        decoder = 8 * d * d + feed_forward + 3 * self.length * d
        per_token = c.num_encoder_layers * encoder + c.num_decoder_layers * decoder + d * self.vocab_size
        return 6.0 * half * int(per_token)

    def missing(self) -> str | None:
        return None

    def few(self) -> Seq2SeqStep:
        return replace(self, batch=1, length=max(2, self.batch * self.length // FEW))

    def prepare(self, dtype: str, device: str) -> Prepared:
        calls: dict[str, Call] = {}
        for peer, (model, loss) in self._models(0.1).items():
            model = model.to(device, DTYPES[dtype])
            calls[peer] = self._step(model, loss, torch.optim.Adam(model.parameters(), 1e-5), device)
        return Prepared(calls)

    def ours(self, dtype: str, device: str) -> Results:
        return self._judged(OURS, DTYPES[dtype], DTYPES[dtype], device)

    def expected(self, dtype: str, device: str) -> tuple[Results, list[Results]]:
        truth = self._judged(TORCH_NN, DTYPES[dtype], torch.float64, device)
        return truth, _attempts(lambda: self._judged(TORCH_NN, DTYPES[dtype], DTYPES[dtype], device))

    def _config(self, dropout: float) -> Any:
        from fusedformer.transformer.models import Seq2SeqConfig

        rates = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), dropout)
        config = getattr(Seq2SeqConfig, self.size)(self.vocab_size)
        return replace(config, **rates, **dict(self.sizes))

    def _models(self, dropout: float) -> dict[str, tuple[torch.nn.Module, Any]]:
        """Each with its loss, and the same weights."""
        from fusedformer.transformer.loss import cross_entropy
        from fusedformer.transformer.models import Seq2SeqTransformer

        with torch.random.fork_rng():
            torch.manual_seed(0)
            fused = Seq2SeqTransformer(self._config(dropout))
        stock = StockSeq2Seq(fused.config)
        stock.load(fused.state_dict())
        return {OURS: (fused, cross_entropy), TORCH_NN: (stock, _stock_loss)}

    def _tokens(self, device: str) -> tuple[dict[str, Tensor], Tensor]:
        """The arguments of a model, and the labels."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.length)
        source, target = (torch.randint(3, self.vocab_size, shape, generator=generator) for _ in range(2))
        lengths = torch.randint(max(1, self.length // 2), self.length + 1, (2, self.batch, 1), generator=generator)
        source_mask, target_mask = torch.arange(self.length) < lengths
        labels = torch.where(target_mask, torch.randint(3, self.vocab_size, shape, generator=generator), -100)
        tokens = {
            "input_ids": source,
            "decoder_input_ids": target,
            "attention_mask": source_mask,
            "decoder_attention_mask": target_mask,
        }
        return {name: x.to(device) for name, x in tokens.items()}, labels.to(device)

    def _step(self, model: torch.nn.Module, loss: Any, optimizer: torch.optim.Optimizer, device: str) -> Call:
        tokens, labels = self._tokens(device)

        def step() -> None:
            optimizer.zero_grad()
            loss(model(**tokens), labels, label_smoothing=0.1).backward()
            optimizer.step()

        return step

    def _judged(self, peer: str, rounded: torch.dtype, dtype: torch.dtype, device: str) -> Results:
        """Loss and gradients of few tokens without dropout, from weights rounded to ``rounded``."""
        few = self.few()
        models = few._models(0.0)
        model, loss = models[peer]
        model = model.to(device, rounded).to(dtype)
        tokens, labels = few._tokens(device)
        value = loss(model(**tokens), labels, label_smoothing=0.1)
        names = [name for name, _ in models[TORCH_NN][0].named_parameters()]
        grads = torch.autograd.grad(value, [model.get_parameter(name) for name in names])
        return {f"grad {name}": grad for name, grad in zip(names, grads, strict=True)}


class StockSeq2Seq(torch.nn.Module):
    """The same model as a user of torch.nn writes it, its parameters named alike."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        c = config
        layer = (c.d_model, c.nhead, c.dim_feedforward, c.dropout, c.activation, c.layer_norm_eps, True, c.norm_first)
        self.scale = math.sqrt(c.d_model)
        self.embedding = torch.nn.Embedding(c.vocab_size, c.d_model, c.pad_token_id)
        self.dropout = torch.nn.Dropout(c.dropout)
        self.encoder = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(*layer), c.num_encoder_layers, enable_nested_tensor=False
        )
        self.decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(*layer), c.num_decoder_layers)
        self.table: Tensor
        self.register_buffer(
            "table",
            nn.SinusoidalPositionalEncoding(c.d_model).span(0, 1024, torch.float32, torch.device("cpu")),
            persistent=False,
        )

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict({name: state[name] for name in self.state_dict()})

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        source, target = (
            self.dropout(self.embedding(ids) * self.scale + self.table[: ids.size(1)])
            for ids in (input_ids, decoder_input_ids)
        )
        length, device = decoder_input_ids.size(1), target.device
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length, device, torch.bool)
        memory = self.encoder(source, src_key_padding_mask=~attention_mask)
        out = self.decoder(
            target,
            memory,
            tgt_mask=mask,
            tgt_key_padding_mask=~decoder_attention_mask,
            memory_key_padding_mask=~attention_mask,
            tgt_is_causal=True,
        )
        return F.linear(out, self.embedding.weight)


def _stock_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing)
