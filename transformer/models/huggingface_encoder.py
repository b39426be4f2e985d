"""Hugging Face's BERT, RoBERTa and DistilBERT checkpoints as our encoder models."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .classifiers import ClassifierConfig, SequenceClassifierConfig
from .encoder import EncoderConfig
from .pretrained import ACTIVATIONS, Converter, check_supported

Config = Mapping[str, Any]
HEADS = {"head", "pooler", "classifier", "unused"}  # of our names; "unused": what no model of ours has
PARTS = ("self_attn.query", "self_attn.key", "self_attn.value")  # the rows of in_proj, in this order
BUFFERS = ("position_ids", "token_type_ids")  # saved by older versions; they hold no weights

EMBEDDINGS = {
    "embeddings.word_embeddings": "encoder.embeddings.words",
    "embeddings.position_embeddings": "encoder.embeddings.positions",
    "embeddings.token_type_embeddings": "encoder.embeddings.token_types",
    "embeddings.LayerNorm": "encoder.embeddings.norm",
}
BERT = {
    **EMBEDDINGS,
    "pooler.dense": "pooler",
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "cls.predictions.decoder": "head.output",
    "cls.predictions": "head",
    "cls.seq_relationship": "unused",
    "classifier": "classifier",
}
ROBERTA = {
    **EMBEDDINGS,
    "pooler.dense": "unused",  # its classifier has a pooler of its own
    "lm_head.dense": "head.dense",
    "lm_head.layer_norm": "head.norm",
    "lm_head.decoder": "head.output",
    "lm_head": "head",
    "classifier.dense": "pooler",
    "classifier.out_proj": "classifier",
    "classifier": "classifier",
}
DISTILBERT = {
    **EMBEDDINGS,
    "vocab_transform": "head.dense",
    "vocab_layer_norm": "head.norm",
    "vocab_projector": "head.output",
    "pre_classifier": "pooler",
    "classifier": "classifier",
}
LAYER = {
    "attention.self.query": "self_attn.query",
    "attention.self.key": "self_attn.key",
    "attention.self.value": "self_attn.value",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}
DISTILBERT_LAYER = {
    "attention.q_lin": "self_attn.query",
    "attention.k_lin": "self_attn.key",
    "attention.v_lin": "self_attn.value",
    "attention.out_lin": "self_attn.out_proj",
    "sa_layer_norm": "norm1",
    "ffn.lin1": "linear1",
    "ffn.lin2": "linear2",
    "output_layer_norm": "norm2",
}


@dataclass(frozen=True)
class Family:
    """Checkpoints that are written alike.

    Attributes:
        prefix: of the encoder's weights, in checkpoints of models that have a head.
        names: theirs and ours, of all but the layers.
        layers: the prefix of a layer's weights, before its number.
        layer: names within a layer.
        encoder, sequence_classifier, token_classifier: from their config, the fields of :class:`EncoderConfig`, and
            those that a classifier's config has besides.
    """

    prefix: str
    names: Mapping[str, str]
    layers: str
    layer: Mapping[str, str]
    encoder: Callable[[Config], dict[str, Any]]
    sequence_classifier: Callable[[Config], dict[str, Any]]
    token_classifier: Callable[[Config], dict[str, Any]]

    def weights(self, heads: Collection[str], theirs: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
        """By our names; query, key and value of a layer in one tensor, heads that the model has not left out."""
        ours: dict[str, Tensor] = {}
        for name, x in theirs.items():
            known = self._name(name)
            head = known.partition(".")[0]
            if head in HEADS.difference(heads) or name.endswith(BUFFERS):
                continue
            ours[known] = x
        if "head.bias" in ours:  # tied to the bias that is added, unless that is there too
            ours.setdefault("head.output.bias", ours.pop("head.bias"))
        for name in [name for name in ours if PARTS[0] in name]:
            parts = [name.replace(PARTS[0], part) for part in PARTS]
            if all(part in ours for part in parts):
                ours[name.replace(f"{PARTS[0]}.", "self_attn.in_proj_")] = torch.cat([ours.pop(part) for part in parts])
        if not heads:
            return {name.removeprefix("encoder."): x for name, x in ours.items()}
        return ours

    def _name(self, theirs: str) -> str:
        """Ours; theirs where it is not known, which is then reported as unexpected."""
        stem, _, leaf = theirs.removeprefix(self.prefix).rpartition(".")
        leaf = {"gamma": "weight", "beta": "bias"}.get(leaf, leaf)  # a norm's, as TensorFlow calls them
        layer = re.fullmatch(rf"{self.layers}\.(\d+)\.(.+)", stem)
        if layer is None:
            return f"{self.names[stem]}.{leaf}" if stem in self.names else theirs
        if layer[2] not in self.layer:
            return theirs
        return f"encoder.transformer.layers.{layer[1]}.{self.layer[layer[2]]}.{leaf}"


def _require(config: Config, *names: str) -> None:
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ValueError(f"the Hugging Face config lacks {', '.join(missing)}")


def _encoder(theirs: Config, sizes: Mapping[str, str], **others: Any) -> dict[str, Any]:
    """Fields of our config; ``sizes`` has their names for ours that must be there."""
    _require(theirs, *sizes.values())
    return {
        **{ours: theirs[name] for ours, name in sizes.items()},
        "pad_token_id": theirs.get("pad_token_id"),
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "initializer_range": theirs.get("initializer_range", 0.02),
        **others,
    }


def _bert(theirs: Config) -> dict[str, Any]:
    check_supported(
        theirs,
        {
            "hidden_act": ACTIVATIONS,
            "position_embedding_type": ["absolute", None],
            "is_decoder": [False],
            "add_cross_attention": [False],
            "pruned_heads": [{}, None],
        },
    )
    sizes = {
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "nhead": "num_attention_heads",
        "num_layers": "num_hidden_layers",
        "dim_feedforward": "intermediate_size",
        "max_length": "max_position_embeddings",
        "token_types": "type_vocab_size",
    }
    return _encoder(
        theirs,
        sizes,
        activation=ACTIVATIONS[theirs.get("hidden_act", "gelu")],
        dropout=theirs.get("hidden_dropout_prob", 0.1),
        attention_dropout=theirs.get("attention_probs_dropout_prob", 0.1),
        layer_norm_eps=theirs.get("layer_norm_eps", 1e-12),
    )


def _roberta(theirs: Config) -> dict[str, Any]:
    # The head of its masked language model has this activation whatever the config says.
    check_supported(theirs, {"hidden_act": ["gelu"]})
    return {**_bert(theirs), "skip_padding": True}


def _distilbert(theirs: Config) -> dict[str, Any]:
    check_supported(theirs, {"activation": ACTIVATIONS, "sinusoidal_pos_embds": [False], "pruned_heads": [{}, None]})
    sizes = {
        "vocab_size": "vocab_size",
        "d_model": "dim",
        "nhead": "n_heads",
        "num_layers": "n_layers",
        "dim_feedforward": "hidden_dim",
        "max_length": "max_position_embeddings",
    }
    return _encoder(
        theirs,
        sizes,
        activation=ACTIVATIONS[theirs.get("activation", "gelu")],
        dropout=theirs.get("dropout", 0.1),
        attention_dropout=theirs.get("attention_dropout", 0.1),
        token_types=0,
    )


def _labels(theirs: Config) -> dict[str, Any]:
    names = theirs.get("id2label")
    if not names:
        return {"num_labels": theirs.get("num_labels", 2)}
    ordered = sorted(names.items(), key=lambda item: int(item[0]))
    return {"num_labels": len(ordered), "label_names": tuple(name for _, name in ordered)}


def _bert_classifier(theirs: Config) -> dict[str, Any]:
    dropout = theirs.get("classifier_dropout")
    return {
        **_labels(theirs),
        "classifier_dropout": theirs.get("hidden_dropout_prob", 0.1) if dropout is None else dropout,
    }


def _roberta_sequence_classifier(theirs: Config) -> dict[str, Any]:
    fields = _bert_classifier(theirs)
    return {**fields, "pooler_dropout": fields["classifier_dropout"]}


def _distilbert_sequence_classifier(theirs: Config) -> dict[str, Any]:
    return {**_labels(theirs), "classifier_dropout": theirs.get("seq_classif_dropout", 0.2), "pooler": "relu"}


def _distilbert_token_classifier(theirs: Config) -> dict[str, Any]:
    return {**_labels(theirs), "classifier_dropout": theirs.get("dropout", 0.1)}


_BERT = Family("bert.", BERT, "encoder.layer", LAYER, _bert, _bert_classifier, _bert_classifier)
_ROBERTA = Family("roberta.", ROBERTA, "encoder.layer", LAYER, _roberta, _roberta_sequence_classifier, _bert_classifier)
FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Family(
        "distilbert.",
        DISTILBERT,
        "transformer.layer",
        DISTILBERT_LAYER,
        _distilbert,
        _distilbert_sequence_classifier,
        _distilbert_token_classifier,
    ),
}


def _converters(config: Callable[[Family, Config], EncoderConfig], *heads: str) -> dict[str, Converter]:
    return {
        kind: Converter(partial(config, family), partial(family.weights, heads)) for kind, family in FAMILIES.items()
    }


ENCODER = _converters(lambda family, theirs: EncoderConfig(**family.encoder(theirs)))
MASKED_LANGUAGE_MODEL = _converters(lambda family, theirs: EncoderConfig(**family.encoder(theirs)), "head")
SEQUENCE_CLASSIFIER = _converters(
    lambda family, theirs: SequenceClassifierConfig(**family.encoder(theirs), **family.sequence_classifier(theirs)),
    "pooler",
    "classifier",
)
TOKEN_CLASSIFIER = _converters(
    lambda family, theirs: ClassifierConfig(**family.encoder(theirs), **family.token_classifier(theirs)), "classifier"
)
