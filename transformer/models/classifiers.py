"""Encoders that classify: whole sequences, or each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.common.checks import check_probability
from ..linear import apply_linear
from .checks import check_choice, check_size
from .encoder import EncoderConfig, WithEncoder, start
from .pretrained import Converter


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """What a :class:`TokenClassifier` is made of.

    Args:
        num_labels: classes.
        label_names: their names, if they have any; nothing is computed from them.
        classifier_dropout: of what the last linear layer sees.

    The others are those of :class:`EncoderConfig`.
    """

    num_labels: int = 2
    label_names: tuple[str, ...] = ()
    classifier_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("num_labels", self.num_labels)
        if self.label_names and len(self.label_names) != self.num_labels:
            raise ValueError(f"label_names: got {len(self.label_names)}, expected num_labels = {self.num_labels}")
        check_probability("classifier_dropout", self.classifier_dropout)


@dataclass(frozen=True)
class SequenceClassifierConfig(ClassifierConfig):
    """What a :class:`SequenceClassifier` is made of.

    Args:
        pooling: a sequence's vector: "first", that of its first token, or "mean", over the tokens that take part.
        pooler: the activation behind a linear layer of that vector, "tanh" as in BERT, or "relu"; None: no such layer.
        pooler_dropout: of what the pooler sees.

    The others are those of :class:`ClassifierConfig`.
    """

    pooling: str = "first"
    pooler: str | None = "tanh"
    pooler_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pooling", self.pooling, ("first", "mean"))
        check_choice("pooler", self.pooler, ("tanh", "relu", None))
        check_probability("pooler_dropout", self.pooler_dropout)


class SequenceClassifier(WithEncoder):
    """An encoder and a classifier of whole sequences, as BERT's for sentences and pairs of them.

    To fine-tune a trained encoder, set ``encoder`` to it, such as ``Encoder.from_pretrained(folder)``.

    Args:
        config: what it is made of.

    Source: section 4.1 of "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al., 2019).
    """

    config_class = SequenceClassifierConfig
    model_type = "fusedformer-sequence-classifier"
    config: SequenceClassifierConfig

    def __init__(self, config: SequenceClassifierConfig) -> None:
        super().__init__(config)
        c = config
        self.pooler = torch.nn.Linear(c.d_model, c.d_model) if c.pooler else None
        self.pooler_dropout, self.dropout = torch.nn.Dropout(c.pooler_dropout), torch.nn.Dropout(c.classifier_dropout)
        self.classifier = torch.nn.Linear(c.d_model, c.num_labels)
        for part in (self.pooler, self.classifier):
            if part is not None:
                start(part, c.initializer_range)

    @classmethod
    def converters(cls) -> Mapping[str, Converter]:
        from .huggingface_encoder import SEQUENCE_CLASSIFIER

        return SEQUENCE_CLASSIFIER

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, num_labels), the logits; arguments as of :meth:`Encoder.forward`."""
        x = self._pool(self.encode(input_ids, attention_mask, token_type_ids), attention_mask)
        if self.pooler is not None:
            x = apply_linear(self.pooler_dropout(x), self.pooler)
            x = torch.tanh(x) if self.config.pooler == "tanh" else torch.relu(x)
        return apply_linear(self.dropout(x), self.classifier)

    def _pool(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.config.pooling == "first":
            return x[:, 0]
        if attention_mask is None:
            return x.mean(1)
        padding = (attention_mask == 0)[..., None]
        return x.masked_fill(padding, 0.0).sum(1) / (~padding).sum(1).clamp(min=1)


class TokenClassifier(WithEncoder):
    """An encoder and a classifier of each token, as BERT's for named entities.

    To fine-tune a trained encoder, set ``encoder`` to it, such as ``Encoder.from_pretrained(folder)``.

    Args:
        config: what it is made of.

    Source: section 5.3 of "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al., 2019).
    """

    config_class = ClassifierConfig
    model_type = "fusedformer-token-classifier"
    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.dropout = torch.nn.Dropout(config.classifier_dropout)
        self.classifier = torch.nn.Linear(config.d_model, config.num_labels)
        start(self.classifier, config.initializer_range)

    @classmethod
    def converters(cls) -> Mapping[str, Converter]:
        from .huggingface_encoder import TOKEN_CLASSIFIER

        return TOKEN_CLASSIFIER

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, S, num_labels), the logits; arguments as of :meth:`Encoder.forward`."""
        x = self.encode(input_ids, attention_mask, token_type_ids)
        return apply_linear(self.dropout(x), self.classifier)
