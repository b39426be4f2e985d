"""Encoder models: BERT's architecture, and what it is trained on, the prediction of masked tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...kernels.common.activations import ACTIVATIONS, activation_function
from ...kernels.common.checks import check_number, check_probability, check_tensor, dtype_name
from ..embedding import TokenEmbedding
from ..encoder import TransformerEncoder, TransformerEncoderLayer
from ..linear import apply_linear
from ..positional_encoding import LearnedPositionalEncoding, PositionalEncoding, SinusoidalPositionalEncoding
from ..sublayers import layer_norm
from .checks import check_choice, check_like_tokens, check_size, check_token, check_tokens, padding_of
from .pretrained import Converter, PretrainedModel


@dataclass(frozen=True)
class EncoderConfig:
    """What an :class:`Encoder` is made of; the defaults are BERT's base model.

    Args:
        vocab_size: tokens.
        d_model, nhead, num_layers, dim_feedforward, layer_norm_eps, norm_first: as of ``torch.nn.TransformerEncoder``
            and its layers; with ``norm_first`` a norm follows the last layer.
        activation: a name that ``fusedformer.functional.feed_forward`` knows.
        dropout: of each sublayer's output, and of what the first layer sees.
        attention_dropout: of the attention weights.
        activation_dropout: of the hidden features.
        positions: "learned" or "sinusoidal".
        max_length: positions of the learned table; None for sinusoidal ones, which have no end.
        skip_padding: positions count the tokens other than ``pad_token_id`` alone and start from ``pad_token_id + 1``;
            padding stands at ``pad_token_id``. As in RoBERTa.
        token_types: kinds of tokens, each with an embedding that is added; 0: none.
        scale_embedding: multiply the embeddings of tokens by sqrt(d_model), as in the paper.
        embedding_norm: a norm of the sums of embeddings.
        tie_embeddings: the weights that make logits are the embedding's.
        pad_token_id: its embedding is zero at first and gets no gradient from being looked up.
        initializer_range: the standard deviation of weights at first.

    Raises:
        ValueError, TypeError: a field is not as described; the message names it.

    Source: section 3 of "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al., 2019).
    """

    vocab_size: int
    d_model: int = 768
    nhead: int = 12
    num_layers: int = 12
    dim_feedforward: int = 3072
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    norm_first: bool = False
    layer_norm_eps: float = 1e-12
    positions: str = "learned"
    max_length: int | None = 512
    skip_padding: bool = False
    token_types: int = 2
    scale_embedding: bool = False
    embedding_norm: bool = True
    tie_embeddings: bool = True
    pad_token_id: int | None = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "nhead", "num_layers", "dim_feedforward"):
            check_size(name, getattr(self, name))
        if self.d_model % self.nhead:
            raise ValueError(f"nhead: got {self.nhead}, expected a divisor of d_model = {self.d_model}")
        check_choice("activation", self.activation, ACTIVATIONS)
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            check_probability(name, getattr(self, name))
        for name in ("layer_norm_eps", "initializer_range"):
            check_number(name, getattr(self, name))
        check_choice("positions", self.positions, ("learned", "sinusoidal"))
        if self.positions == "learned":
            check_size("max_length", self.max_length)
        elif self.max_length is not None:
            raise ValueError(f"max_length: got {self.max_length}, expected None, as sinusoidal positions have no end")
        check_size("token_types", self.token_types, 0)
        if self.pad_token_id is not None:
            check_token("pad_token_id", self.pad_token_id, self.vocab_size)
        elif self.skip_padding:
            raise ValueError("pad_token_id: got None, expected the token that skip_padding skips")


class Encoder(PretrainedModel):
    """BERT without a head: each token's vector in its context.

    Args:
        config: what it is made of.

    Source: section 3 of "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al., 2019).
    """

    config_class = EncoderConfig
    model_type = "fusedformer-encoder"
    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        c = config
        activation = activation_function(c.activation)
        layer = TransformerEncoderLayer(
            c.d_model, c.nhead, c.dim_feedforward, c.dropout, activation, c.layer_norm_eps, True, c.norm_first
        )
        layer.dropout.p, layer.self_attn.dropout = c.activation_dropout, c.attention_dropout
        final_norm = torch.nn.LayerNorm(c.d_model, c.layer_norm_eps) if c.norm_first else None
        self.embeddings = _Embeddings(c)
        self.transformer = TransformerEncoder(layer, c.num_layers, final_norm)
        start(self, c.initializer_range)

    @classmethod
    def converters(cls) -> Mapping[str, Converter]:
        """Hugging Face's checkpoints, and ours of the models that have an encoder, whose heads are left out."""
        from .classifiers import SequenceClassifier, TokenClassifier
        from .huggingface_encoder import ENCODER

        ours = (MaskedLanguageModel, SequenceClassifier, TokenClassifier)
        return {**ENCODER, **{model.model_type: Converter(_config_of, _weights_of) for model in ours}}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The last layer's output.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S) bool or int; nonzero takes part. None: all do.
            token_type_ids: (B, S) int64; None: 0.

        Returns:
            (B, S, d_model) in the dtype of the parameters.

        Raises:
            ValueError, TypeError: an argument is not as described; the message names it.
        """
        check_tokens("input_ids", input_ids)
        padding = padding_of("attention_mask", attention_mask, input_ids)
        out: Tensor = self.transformer(self.embeddings(input_ids, token_type_ids), src_key_padding_mask=padding)
        return out

    encode = forward


class _Embeddings(torch.nn.Module):
    """What the first layer sees: embeddings of token, its type and its position, their sum normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        c = config
        self.words = TokenEmbedding(c.vocab_size, c.d_model, c.pad_token_id, scale=c.scale_embedding)
        self.token_types = torch.nn.Embedding(c.token_types, c.d_model) if c.token_types else None
        self.skip, self.max_length = c.pad_token_id if c.skip_padding else None, c.max_length
        self.positions: PositionalEncoding
        if c.max_length is None:
            self.positions = SinusoidalPositionalEncoding(c.d_model, 0.0, batch_first=True)
        else:
            self.positions = LearnedPositionalEncoding(c.max_length, c.d_model, 0.0, True, padding_idx=self.skip)
        self.norm = torch.nn.LayerNorm(c.d_model, c.layer_norm_eps) if c.embedding_norm else None
        self.dropout = torch.nn.Dropout(c.dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        x = self.words(input_ids)
        if token_type_ids is not None:
            check_tokens("token_type_ids", token_type_ids)
            check_like_tokens("token_type_ids", token_type_ids, input_ids)
            if self.token_types is None:
                raise ValueError("token_type_ids: got a tensor, expected None: the config has no token_types")
            x = x + self.token_types(token_type_ids)
        elif self.token_types is not None:
            x = x + self.token_types.weight[0]
        offset: int | Tensor = 0
        if self.skip is not None:
            most = None if self.max_length is None else self.max_length - self.skip - 1
            if most is not None and input_ids.size(1) > most:
                raise ValueError(f"input_ids: got {input_ids.size(1)} tokens, expected at most {most}")
            is_token = input_ids != self.skip
            offset = is_token.cumsum(1) * is_token + self.skip
        x = self.positions(x, offset)
        out: Tensor = self.dropout(x if self.norm is None else layer_norm(x, self.norm))
        return out


class WithEncoder(PretrainedModel):
    """A model whose ``encoder`` is an :class:`Encoder` of the same config."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(_config_of(vars(config)))

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, S, d_model), the encoder's output; arguments as of :meth:`Encoder.forward`."""
        out: Tensor = self.encoder(input_ids, attention_mask, token_type_ids)
        return out


class MaskedLanguageModel(WithEncoder):
    """An encoder that predicts tokens from those around them, as BERT is trained.

    Logits come from a linear layer, the activation, a norm, and the embedding's weights with a bias of their own.

    To train it, mask tokens by :func:`fusedformer.transformer.models.mask_tokens` and compare the logits with the
    labels by :func:`fusedformer.transformer.loss.cross_entropy` (or torch's).

    Args:
        config: what it is made of.

    Source: section 3.1, "Masked LM", of "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al., 2019).
    """

    config_class = EncoderConfig
    model_type = "fusedformer-masked-lm"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.head = _Head(config)
        start(self.head, config.initializer_range)
        if config.tie_embeddings:
            self.head.output.weight = self.encoder.embeddings.words.weight

    @classmethod
    def converters(cls) -> Mapping[str, Converter]:
        from .huggingface_encoder import MASKED_LANGUAGE_MODEL

        return MASKED_LANGUAGE_MODEL

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        predict: Tensor | None = None,
    ) -> Tensor:
        """The logits of the token at each position, or at those to predict alone.

        Args:
            input_ids, attention_mask, token_type_ids: as of :meth:`Encoder.forward`.
            predict: the positions to predict: (B, S) bool, such as ``labels != -100``, whose number the host waits for;
                or (B, K) int64, as many in each row.

        Returns:
            (B, S, vocab_size); for a bool ``predict`` (n, vocab_size), row by row; for an int64 one
            (B, K, vocab_size).

        Raises:
            ValueError, TypeError: an argument is not as described; the message names it.
        """
        check_tokens("input_ids", input_ids)
        if predict is not None:
            _check_predict(predict, input_ids)
        x = self.encode(input_ids, attention_mask, token_type_ids)
        if predict is not None:
            is_mask = predict.dtype == torch.bool
            x = x[predict] if is_mask else x.gather(1, predict[..., None].expand(-1, -1, x.size(2)))
        logits: Tensor = self.head(x)
        return logits


class _Head(torch.nn.Module):
    """From the encoder's output to logits."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation = activation_function(config.activation)
        self.dense = torch.nn.Linear(config.d_model, config.d_model)
        self.norm = torch.nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.output = torch.nn.Linear(config.d_model, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(apply_linear(x, self.dense))
        return apply_linear(layer_norm(x, self.norm), self.output)


def start(module: torch.nn.Module, std: float) -> None:
    """BERT's weights before training: matrices from a normal distribution, biases zero, norms the identity."""
    for name, x in module.named_parameters():
        if x.dim() > 1:
            torch.nn.init.normal_(x, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(x)
    for part in module.modules():
        if isinstance(part, TokenEmbedding):
            part._fill_padding_idx_with_zero()


def _config_of(config: Mapping[str, Any]) -> EncoderConfig:
    names = [field.name for field in fields(EncoderConfig)]
    return EncoderConfig(**{name: config[name] for name in names if name in config})


def _weights_of(weights: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    prefix = "encoder."
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def _check_predict(predict: Tensor, tokens: Tensor) -> None:
    check_tensor("predict", predict, device=tokens.device)
    if predict.dtype not in (torch.bool, torch.int64):
        raise TypeError(f"predict: got {dtype_name(predict.dtype)}, expected bool, or int64 positions")
    expected = tuple(tokens.shape) if predict.dtype == torch.bool else (len(tokens), "any")
    if predict.dim() != 2 or len(predict) != len(tokens) or expected[1] not in ("any", predict.size(1)):
        raise ValueError(f"predict: got shape {tuple(predict.shape)}, expected {expected}")
