"""The paper's model: encoder and decoder over one embedding, whose weights are the softmax's too (figure 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.common.activations import ACTIVATIONS, activation_function
from ...kernels.common.checks import check_number, check_probability
from ..cache import KVCache
from ..decoder import TransformerDecoder, TransformerDecoderLayer
from ..embedding import TokenEmbedding
from ..encoder import TransformerEncoder, TransformerEncoderLayer
from ..generation import GenerationMixin
from ..linear import apply_linear
from ..positional_encoding import LearnedPositionalEncoding, PositionalEncoding, SinusoidalPositionalEncoding
from .checks import check_choice, check_size, check_token, check_tokens, padding_of
from .pretrained import Converter, PretrainedModel


@dataclass(frozen=True)
class Seq2SeqConfig:
    """What a :class:`Seq2SeqTransformer` is made of; the defaults are the paper's base model.

    Args:
        vocab_size: tokens of the vocabulary that both languages share.
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, layer_norm_eps, norm_first: as of
            ``torch.nn.Transformer``.
        activation: a name that ``fusedformer.functional.feed_forward`` knows.
        dropout: of each sublayer's output, and of the sums of embeddings and positions.
        attention_dropout: of the attention weights. None in the paper; in ``torch.nn.Transformer`` as ``dropout``.
        activation_dropout: of the hidden features; likewise.
        final_norm: a norm behind the last layer of encoder and decoder, as in ``torch.nn.Transformer``.
        positions: "sinusoidal", for any length, or "learned", a table for the encoder and one for the decoder.
        max_length: of a learned table, and only of one.
        scale_embedding: multiply embeddings by sqrt(d_model).
        embedding_norm: a norm of the sums of embeddings and positions, as in BART.
        tie_embeddings: the softmax's weights are the embedding's.
        output_bias: the softmax has a bias.
        pad_token_id: its embedding is no weight of the input: zero at first, and without a gradient from there.
        bos_token_id, eos_token_id: as ``generate`` takes them.
        decoder_start_token_id: stands in front of every target.

    Raises:
        ValueError, TypeError: a field is not as described; the message names it.

    Source: table 3 of "Attention Is All You Need" (Vaswani et al., 2017).
    """

    vocab_size: int
    d_model: int = 512
    nhead: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dim_feedforward: int = 2048
    activation: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    norm_first: bool = False
    final_norm: bool = False
    layer_norm_eps: float = 1e-5
    positions: str = "sinusoidal"
    max_length: int | None = None
    scale_embedding: bool = True
    embedding_norm: bool = False
    tie_embeddings: bool = True
    output_bias: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    decoder_start_token_id: int = 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "dim_feedforward"):
            check_size(name, getattr(self, name))
        if self.d_model % self.nhead:
            raise ValueError(f"nhead: got {self.nhead}, expected a divisor of d_model = {self.d_model}")
        check_choice("activation", self.activation, ACTIVATIONS)
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            check_probability(name, getattr(self, name))
        check_number("layer_norm_eps", self.layer_norm_eps)
        check_choice("positions", self.positions, ("sinusoidal", "learned"))
        if self.positions == "learned":
            check_size("max_length", self.max_length)
        elif self.max_length is not None:
            raise ValueError(f"max_length: got {self.max_length}, expected None, as sinusoidal positions have no end")
        check_token("decoder_start_token_id", self.decoder_start_token_id, self.vocab_size)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is not None:
                check_token(name, getattr(self, name), self.vocab_size)

    @classmethod
    def base(cls, vocab_size: int, **others: Any) -> Seq2SeqConfig:
        """The paper's base model, 65 million parameters with its vocabulary of 37,000; other fields as given."""
        return cls(vocab_size, **others)

    @classmethod
    def big(cls, vocab_size: int, **others: Any) -> Seq2SeqConfig:
        """The paper's big model, 213 million parameters with its vocabulary of 37,000; other fields as given."""
        return cls(vocab_size, **{"d_model": 1024, "nhead": 16, "dim_feedforward": 4096, "dropout": 0.3, **others})


class Seq2SeqTransformer(GenerationMixin, PretrainedModel):
    """The transformer of "Attention Is All You Need": it reads one sequence of tokens and writes another.

    Its ``encoder`` and ``decoder`` are those of ``fusedformer.nn``. Weights start as in the paper's successors
    (tensor2tensor, fairseq): matrices from Glorot's uniform distribution, as in ``torch.nn.Transformer``, biases zero,
    the embedding from a normal one of standard deviation d_model^-0.5, so that scaled embeddings as well as logits are
    of order 1.

    To train it, feed ``decoder_input_ids = shift_right(labels, ...)`` and compare logits with labels by
    :func:`fusedformer.transformer.loss.cross_entropy` (or torch's), at the rate of
    :func:`fusedformer.transformer.learning_rate.warmup_schedule`.

    Args:
        config: what it is made of.

    Source: section 3 of "Attention Is All You Need" (Vaswani et al., 2017).
    """

    config_class = Seq2SeqConfig
    model_type = "fusedformer-seq2seq"
    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        c = config
        activation = activation_function(c.activation)
        sizes = (c.d_model, c.nhead, c.dim_feedforward, c.dropout, activation, c.layer_norm_eps, True, c.norm_first)
        encoder_layer, decoder_layer = TransformerEncoderLayer(*sizes), TransformerDecoderLayer(*sizes)
        encoder_norm, decoder_norm = (
            torch.nn.LayerNorm(c.d_model, c.layer_norm_eps) if c.final_norm else None for _ in range(2)
        )
        for layer in (encoder_layer, decoder_layer):
            layer.dropout.p, layer.self_attn.dropout = c.activation_dropout, c.attention_dropout
        decoder_layer.multihead_attn.dropout = c.attention_dropout
        self.embedding = TokenEmbedding(c.vocab_size, c.d_model, c.pad_token_id, scale=c.scale_embedding)
        self.encoder_input, self.decoder_input = _Input(c), _Input(c)
        self.encoder = TransformerEncoder(encoder_layer, c.num_encoder_layers, encoder_norm, enable_nested_tensor=False)
        self.decoder = TransformerDecoder(decoder_layer, c.num_decoder_layers, decoder_norm)
        self.output = torch.nn.Linear(c.d_model, c.vocab_size, bias=c.output_bias)
        if c.tie_embeddings:
            self.output.weight = self.embedding.weight
        self.reset_parameters()

    @classmethod
    def converters(cls) -> Mapping[str, Converter]:
        from .huggingface_seq2seq import CONVERTERS

        return CONVERTERS

    def reset_parameters(self) -> None:
        """The weights at the start of a training."""
        for name, x in self.named_parameters():
            if name.endswith("positions.weight"):
                torch.nn.init.normal_(x, std=self.config.d_model**-0.5)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(x)
            elif x.dim() > 1:
                torch.nn.init.xavier_uniform_(x)
        self.embedding.reset_parameters()  # last, as the softmax may share it

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The logits of each next target token.

        Args:
            input_ids: (B, S) int64, the source.
            decoder_input_ids: (B, L) int64, the target, shifted right; position i sees those up to i.
            attention_mask: (B, S) bool or int; nonzero takes part. None: all do.
            decoder_attention_mask: (B, L), likewise.

        Returns:
            (B, L, vocab_size), in the dtype of the parameters.

        Raises:
            ValueError, TypeError: an argument is not as described; the message names it.
        """
        check_tokens("input_ids", input_ids)
        check_tokens("decoder_input_ids", decoder_input_ids)
        if len(decoder_input_ids) != len(input_ids):
            raise ValueError(f"decoder_input_ids: got a batch of {len(decoder_input_ids)}, expected {len(input_ids)}")
        source_padding = padding_of("attention_mask", attention_mask, input_ids)
        target_padding = padding_of("decoder_attention_mask", decoder_attention_mask, decoder_input_ids)
        # One look-up for both: the gradient of the embedding is as large as the vocabulary, whatever was looked up.
        both = self.embedding(torch.cat([input_ids, decoder_input_ids], 1))
        source, target = both.split([input_ids.size(1), decoder_input_ids.size(1)], 1)
        memory = self.encoder(self.encoder_input(source), src_key_padding_mask=source_padding)
        out = self.decoder(
            self.decoder_input(target),
            memory,
            tgt_key_padding_mask=target_padding,
            memory_key_padding_mask=source_padding,
            tgt_is_causal=True,
        )
        return self._logits(out)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, S, d_model), what the decoder attends to; arguments as of :meth:`forward`."""
        check_tokens("input_ids", input_ids)
        padding = padding_of("attention_mask", attention_mask, input_ids)
        memory: Tensor = self.encoder(self.encoder_input(self.embedding(input_ids)), src_key_padding_mask=padding)
        return memory

    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None, capacity: int, *, page: int | None = None
    ) -> KVCache:
        """A cache for ``capacity`` target tokens that holds the keys and values of the encoded source."""
        memory = self.encode(input_ids, attention_mask)
        cache = self.new_cache(len(input_ids), capacity, page=page)
        self.decoder.remember(memory, cache, None if attention_mask is None else attention_mask != 0)
        return cache

    def new_cache(self, batch: int, capacity: int, *, page: int | None = None) -> KVCache:
        """An empty cache for ``capacity`` target tokens in each of ``batch`` rows, without a source."""
        c, weight = self.config, self.embedding.weight
        heads, head_dim = c.nhead, c.d_model // c.nhead
        return KVCache(
            c.num_decoder_layers, batch, heads, head_dim, capacity, dtype=weight.dtype, device=weight.device, page=page
        )

    def decode(self, tokens: Tensor, cache: KVCache, count: Tensor | None = None) -> Tensor:
        """The logits after the tokens that follow those in the cache, which takes them in.

        Args:
            tokens: (B, L) int64.
            cache: of :meth:`start`.
            count: (B,), how many of each row's tokens count, at least 1; None: all.

        Returns:
            (B, vocab_size), of each row's last token that counts.
        """
        length = tokens.size(1)
        x = self.decoder.decode(self.decoder_input(self.embedding(tokens), cache.offset(length)), cache)
        if count is None:
            last = x[:, -1]
        else:
            last = x.gather(1, (count.long() - 1)[:, None, None].expand(-1, 1, x.size(2)))[:, 0]
        cache.advance(length if count is None else count)
        return self._logits(last)

    def _logits(self, x: Tensor) -> Tensor:
        return apply_linear(x, self.output)


class _Input(torch.nn.Module):
    """From embeddings to what the first layer sees."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        c, last = config, 0.0 if config.embedding_norm else config.dropout
        self.positions: PositionalEncoding
        if c.positions == "sinusoidal":
            self.positions = SinusoidalPositionalEncoding(c.d_model, last, batch_first=True)
        else:
            assert c.max_length is not None
            self.positions = LearnedPositionalEncoding(c.max_length, c.d_model, last, batch_first=True)
        self.norm = torch.nn.LayerNorm(c.d_model, c.layer_norm_eps) if c.embedding_norm else None
        self.dropout = torch.nn.Dropout(c.dropout)

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        x = self.positions(x, offset)
        return x if self.norm is None else self.dropout(self.norm(x))


def shift_right(labels: Tensor, decoder_start_token_id: int, pad_token_id: int = 0) -> Tensor:
    """The decoder's input for these labels: each position holds the label before it, the first the start.

    Args:
        labels: (B, L) int64; -100, which ``cross_entropy`` ignores, becomes padding.
        decoder_start_token_id, pad_token_id: as in the model's config.

    Returns:
        (B, L) int64.

    Source: section 3.1 of "Attention Is All You Need" (Vaswani et al., 2017): "offset by one position".
    """
    start = labels.new_full((len(labels), 1), decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
