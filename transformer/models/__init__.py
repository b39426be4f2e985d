"""Whole models, each from a small frozen config; saved, loaded and read from Hugging Face's checkpoints."""

from .causal import CausalConfig, CausalLanguageModel
from .classifiers import ClassifierConfig, SequenceClassifier, SequenceClassifierConfig, TokenClassifier
from .encoder import Encoder, EncoderConfig, MaskedLanguageModel
from .masking import mask_tokens
from .pretrained import Converter, PretrainedModel
from .seq2seq import Seq2SeqConfig, Seq2SeqTransformer

__all__ = [
    "CausalConfig",
    "CausalLanguageModel",
    "ClassifierConfig",
    "Converter",
    "Encoder",
    "EncoderConfig",
    "MaskedLanguageModel",
    "PretrainedModel",
    "Seq2SeqConfig",
    "Seq2SeqTransformer",
    "SequenceClassifier",
    "SequenceClassifierConfig",
    "TokenClassifier",
    "mask_tokens",
]
