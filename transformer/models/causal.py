"""The decoder-only model, in the styles of GPT-2 and of Llama: it writes on what it is given, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.common.activations import check_activation
from ...kernels.common.checks import check_probability
from ..cache import KVCache
from ..generation import GenerationMixin
from ..linear import apply_linear
from ..positional_encoding import LearnedPositionalEncoding, SinusoidalPositionalEncoding
from ..rotary import RotaryEmbedding, check_positive, check_scaling
from .causal_layer import CausalLayer, add_norm, decode_layers, make_norm, norm
from .checks import check_choice, check_like_tokens, check_size, check_token, check_tokens
from .pretrained import Converter, PretrainedModel


@dataclass(frozen=True)
class CausalConfig:
    """What a :class:`CausalLanguageModel` is made of; the defaults are those of GPT-2, :meth:`llama` has Llama's.

    Args:
        vocab_size: tokens of the vocabulary.
        d_model: features of a token.
        nhead: query heads.
        num_kv_heads: key and value heads, a divisor of ``nhead``; None: ``nhead``.
        head_dim: features of a head; None: ``d_model / nhead``.
        num_layers: layers.
        dim_feedforward: hidden features of the feed-forward networks; None: ``4 * d_model``.
        activation: a name that ``fusedformer.functional.feed_forward`` knows.
        gated: whether the feed-forward networks are.
        norm: "layer_norm" or "rms_norm".
        norm_eps: added to its variance or mean of squares.
        positions: "learned", a table of ``max_length``; "sinusoidal"; or "rotary".
        max_length: of a learned table, and only of one.
        rope_theta, rope_scaling: of rotary positions, as in :class:`~fusedformer.transformer.rotary.RotaryEmbedding`.
        attention_bias: the projections to queries, keys and values have a bias.
        output_bias: the projection out of attention has one.
        feed_forward_bias: the feed-forward networks have biases.
        tie_embeddings: the softmax's weights are the embedding's.
        window: the keys that a query sees, its own and those before it; None: all. A tuple has that of each layer.
        query_key_norm: RMS norms, with ``norm_eps``, of each head's query and key, in front of rotary positions.
        dropout: of each sublayer's output.
        embedding_dropout: of the sums of embeddings and positions.
        attention_dropout: of the attention weights.
        bos_token_id, eos_token_id, pad_token_id: as ``generate`` takes them; several may end a sequence.

    Raises:
        ValueError, TypeError: a field is not as described; the message names it.

    Source: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019); "LLaMA" (Touvron et al.,
    2023); windows: "Mistral 7B" (Jiang et al., 2023), section 2; norms of query and key: "Qwen3 Technical Report"
    (Yang et al., 2025).
    """

    vocab_size: int
    d_model: int = 768
    nhead: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_layers: int = 12
    dim_feedforward: int | None = None
    activation: str = "gelu_tanh"
    gated: bool = False
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    positions: str = "learned"
    max_length: int | None = 1024
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    attention_bias: bool = True
    output_bias: bool = True
    feed_forward_bias: bool = True
    tie_embeddings: bool = True
    window: int | tuple[int | None, ...] | None = None
    query_key_norm: bool = False
    dropout: float = 0.1
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "nhead", "num_layers"):
            check_size(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim", "dim_feedforward"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        if self.head_dim is None and self.d_model % self.nhead:
            raise ValueError(f"nhead: got {self.nhead}, expected a divisor of d_model = {self.d_model}, or a head_dim")
        if self.nhead % self.kv_heads:
            raise ValueError(f"num_kv_heads: got {self.num_kv_heads}, expected a divisor of nhead = {self.nhead}")
        if not isinstance(self.activation, str):
            raise TypeError(f"activation: got {type(self.activation).__name__}, expected a name")
        check_activation(self.activation)
        check_choice("norm", self.norm, ("layer_norm", "rms_norm"))
        check_positive("norm_eps", self.norm_eps)
        check_choice("positions", self.positions, ("learned", "sinusoidal", "rotary"))
        if self.positions == "learned":
            check_size("max_length", self.max_length)
        elif self.max_length is not None:
            raise ValueError(
                f"max_length: got {self.max_length}, expected None: {self.positions} positions have no end"
            )
        if self.positions == "rotary" and self.size_of_head % 2:
            raise ValueError(f"head_dim: got {self.size_of_head}, expected an even number for rotary positions")
        check_positive("rope_theta", self.rope_theta)
        check_scaling("rope_scaling", self.rope_scaling)
        if isinstance(self.window, tuple) and len(self.window) != self.num_layers:
            expected = f"one of each of num_layers = {self.num_layers}"
            raise ValueError(f"window: got {len(self.window)} windows, expected {expected}")
        for window in self.windows:
            if window is not None:
                check_size("window", window)
        for name in ("dropout", "embedding_dropout", "attention_dropout"):
            check_probability(name, getattr(self, name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given = getattr(self, name)
            for token in given if name == "eos_token_id" and isinstance(given, tuple) else (given,):
                if token is not None:
                    check_token(name, token, self.vocab_size)

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.nhead if self.num_kv_heads is None else self.num_kv_heads

    @property
    def size_of_head(self) -> int:
        """Features of a head."""
        return self.d_model // self.nhead if self.head_dim is None else self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """``window`` of each layer."""
        return self.window if isinstance(self.window, tuple) else (self.window,) * self.num_layers

    @property
    def hidden_features(self) -> int:
        """Hidden features of the feed-forward networks."""
        return 4 * self.d_model if self.dim_feedforward is None else self.dim_feedforward

    @classmethod
    def llama(cls, vocab_size: int, **others: Any) -> CausalConfig:
        """Llama's layers: rotary positions, RMS norms, gated networks with SiLU, no biases, no dropout."""
        style: dict[str, Any] = {
            "activation": "silu",
            "gated": True,
            "norm": "rms_norm",
            "norm_eps": 1e-6,
            "positions": "rotary",
            "max_length": None,
            **dict.fromkeys(("attention_bias", "output_bias", "feed_forward_bias", "tie_embeddings"), False),
            **dict.fromkeys(("dropout", "embedding_dropout", "attention_dropout"), 0.0),
        }
        return cls(vocab_size, **{**style, **others})


class CausalLanguageModel(GenerationMixin, PretrainedModel):
    """A decoder-only language model over fused kernels: GPT-2, Llama, Mistral, Qwen, and what lies between.

    Weights start as GPT-2's: matrices and embeddings from a normal distribution of standard deviation 0.02, those that
    write to the residual stream (``out_proj``, ``linear2``) of 0.02 / sqrt(2 layers), as so many are summed; biases
    zero, norms one.

    To train it, compare ``logits[:, :-1]`` with ``input_ids[:, 1:]`` by
    :func:`fusedformer.transformer.loss.cross_entropy` (or torch's). Hugging Face checkpoints of GPT-2, Llama, Mistral,
    Qwen2 and Qwen3 are read. Where ``window`` bounds what a query sees, a cache still keeps all that came before.

    Args:
        config: what it is made of.

    Source: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.3.
    """

    config_class = CausalConfig
    model_type = "fusedformer-causal"
    config: CausalConfig

    def __init__(self, config: CausalConfig) -> None:
        super().__init__(config)
        c = config
        self.embedding = torch.nn.Embedding(c.vocab_size, c.d_model)
        self.positions: LearnedPositionalEncoding | SinusoidalPositionalEncoding | RotaryEmbedding
        if c.positions == "learned":
            assert c.max_length is not None
            self.positions = LearnedPositionalEncoding(c.max_length, c.d_model)
        elif c.positions == "sinusoidal":
            self.positions = SinusoidalPositionalEncoding(c.d_model)
        else:
            self.positions = RotaryEmbedding(c.size_of_head, c.rope_theta, c.rope_scaling)
        self.layers = torch.nn.ModuleList(
            CausalLayer(c, c.dropout if number else c.embedding_dropout, window)
            for number, window in enumerate(c.windows)
        )
        self.norm = make_norm(c)
        self.output = torch.nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.output.weight = self.embedding.weight
        self.reset_parameters()

    @classmethod
    def converters(cls) -> Mapping[str, Converter]:
        """GPT-2's, and those of Llama and its like."""
        from .huggingface_causal import CONVERTERS

        return CONVERTERS

    def reset_parameters(self) -> None:
        """The weights at the start of a training."""
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, x in self.named_parameters():
            if x.dim() > 1:
                torch.nn.init.normal_(x, std=residual if "out_proj" in name or "linear2" in name else 0.02)
            else:
                torch.nn.init.constant_(x, 0.0 if name.endswith("bias") else 1.0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits of each next token.

        Args:
            input_ids: (B, L) int64; position i sees those up to i.
            attention_mask: (B, L) bool or int; nonzero takes part, None: all do. Padding may stand on either side:
                positions count what takes part. (Windows count padding too, as Hugging Face's do.)

        Returns:
            (B, L, vocab_size), in the dtype of the parameters; of padding whatever comes.

        Raises:
            ValueError, TypeError: an argument is not as described; the message names it.
        """
        check_tokens("input_ids", input_ids)
        length = input_ids.size(1)
        self._check_length("input_ids", length)
        key_mask = None
        if attention_mask is not None:
            check_like_tokens("attention_mask", attention_mask, input_ids)
            key_mask = attention_mask != 0
        update, rotation = self.embedding(input_ids), None
        if isinstance(self.positions, RotaryEmbedding):
            positions = torch.arange(length, device=input_ids.device) if key_mask is None else _positions(key_mask)
            rotation = self.positions(positions, update.dtype)
        else:
            table = self.positions.span(0, length, update.dtype, update.device)
            update = update + (table if key_mask is None else F.embedding(_positions(key_mask), table))
        residual = None
        for layer in self.layers:
            update, residual = layer(update, residual, rotation, key_mask)
        dropout_p = self.config.dropout if self.training else 0.0
        return self._logits(add_norm(update, residual, self.norm, dropout_p)[0])

    def new_cache(self, batch: int, capacity: int, *, page: int | None = None) -> KVCache:
        """An empty cache for ``capacity`` tokens in each of ``batch`` rows.

        Raises:
            ValueError: there is no position for so many.
        """
        self._check_length("capacity", capacity)
        c, weight = self.config, self.embedding.weight
        return KVCache(
            c.num_layers,
            batch,
            c.kv_heads,
            c.size_of_head,
            capacity,
            dtype=weight.dtype,
            device=weight.device,
            page=page,
        )

    def decode(self, tokens: Tensor, cache: KVCache, count: Tensor | None = None) -> Tensor:
        """The logits after the tokens that follow those in the cache, which takes them in; nothing is dropped.

        Args:
            tokens: (B, L) int64.
            cache: of :meth:`new_cache`.
            count: (B,), how many of each row's tokens count, at least 1; None: all.

        Returns:
            (B, vocab_size), of each row's last token that counts.
        """
        length = tokens.size(1)
        x, positions, rotation = self.embedding(tokens), cache.positions(length), None
        if isinstance(self.positions, RotaryEmbedding):
            rotation = self.positions(positions, x.dtype)
        else:
            x = x + self.positions.at(positions, x.dtype)
        x = decode_layers(self.layers, x, cache, rotation)
        if count is None:
            last = x[:, -1]
        else:
            last = x.gather(1, (count.long() - 1)[:, None, None].expand(-1, 1, x.size(2)))[:, 0]
        cache.advance(length if count is None else count)
        return self._logits(norm(last, self.norm))

    def _logits(self, x: Tensor) -> Tensor:
        return apply_linear(x, self.output)

    def _check_length(self, name: str, length: int) -> None:
        if self.config.max_length is not None and length > self.config.max_length:
            raise ValueError(f"{name}: got {length} tokens, expected at most max_length = {self.config.max_length}")


def _positions(key_mask: Tensor) -> Tensor:
    """(B, L), where each token stands among those that take part."""
    return (key_mask.cumsum(1) - 1).clamp(min=0)
