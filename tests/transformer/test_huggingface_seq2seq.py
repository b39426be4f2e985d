"""BART and Marian, built small and random: our model with their weights computes what they do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.transformer.models import Seq2SeqTransformer
from fusedformer.transformer.models.huggingface_seq2seq import CONVERTERS
from fusedformer.transformer.models.seq2seq import shift_right
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract
from tests.transformer.reordering import Reordering

transformers = pytest.importorskip("transformers")
VOCABULARY = 41
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 17,
    "init_std": 0.1,
}
FEATURES = ("d_model", "encoder_attention_heads", "encoder_ffn_dim")
BART: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
MARIAN: dict[str, Any] = {
    "pad_token_id": 40,
    "eos_token_id": 0,
    "decoder_start_token_id": 40,
    "activation_function": "swish",
}


def stock(kind: str, **options: Any) -> Any:
    given = {"Bart": BART, "Marian": MARIAN}[kind] | SIZES | options
    model = getattr(transformers, "BartForConditionalGeneration" if kind == "Bart" else "MarianMTModel")(
        getattr(transformers, f"{kind}Config")(**given)
    )
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                x.add_(torch.randn_like(x) / 4)
        if kind == "Marian":
            model.final_logits_bias.normal_()
    return model.eval()


def drawn(model: Any) -> dict[str, Tensor]:
    """Sources and targets with padding, a source's at its front too."""
    ids = torch.randint(3, VOCABULARY - 1, (3, 9))
    labels = torch.randint(3, VOCABULARY - 1, (3, 7))
    mask, target_mask = torch.ones_like(ids), torch.ones_like(labels)
    mask[1, 5:], mask[2, :2], target_mask[0, 4:] = 0, 0, 0
    c = model.config
    return {
        "input_ids": ids.where(mask != 0, c.pad_token_id),
        "decoder_input_ids": shift_right(labels, c.decoder_start_token_id),
        "attention_mask": mask,
        "decoder_attention_mask": target_mask,
    }


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Bart", {}),
        ("Bart", {"scale_embedding": True, "activation_function": "gelu_new"}),
        ("Marian", {"scale_embedding": True}),
    ],
    ids=["bart", "bart-scaled", "marian"],
)
def test_logits_and_gradients_are_theirs(kind: str, options: dict[str, Any], seed: int) -> None:
    theirs = stock(kind, **options)
    ours = Seq2SeqTransformer.from_huggingface(theirs)
    inputs = drawn(theirs)
    grad_out = torch.randn(3, 7, VOCABULARY)
    weights = CONVERTERS[kind.lower()].weights

    def run(model: Any, order: Tensor) -> dict[str, Tensor]:
        logits = model(**{name: x[order] for name, x in inputs.items()}).logits
        logits.backward(grad_out[order].to(model.dtype))
        grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        return {"logits": logits.detach()[order.argsort()], **grads}

    def named_as_ours(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": results.pop("logits"), **weights(results, ours.config)}

    def reordered(attention: str) -> dict[str, Tensor]:
        """The same sums in another order."""
        model, features = copy.deepcopy(theirs), Reordering(*(SIZES[name] for name in FEATURES))
        model.set_attn_implementation(attention)
        features.model(model)
        results = run(model, torch.randperm(3))
        return named_as_ours({name: features.undone(x) for name, x in results.items()})

    eager = [reordered(attention) for attention in ("eager", "sdpa") for _ in range(4)]
    truth = named_as_ours(run(copy.deepcopy(theirs).double(), torch.arange(3)))
    logits = ours(**inputs)
    logits.backward(grad_out)
    found = {"logits": logits, **{name: x.grad for name, x in ours.named_parameters()}}
    assert set(truth) == set(found) - {"output.bias"}  # a buffer in theirs
    for name, expected in truth.items():
        assert found[name] is not None, name
        for attempt in eager:
            assert_no_mistake(attempt[name], expected, f"reordered {name}")
        assert_within_contract(found[name], expected, [attempt[name] for attempt in eager], name)


def test_a_folder_of_theirs_is_read(tmp_path: Path, seed: int) -> None:
    theirs = stock("Marian")
    theirs.save_pretrained(tmp_path)
    read, copied = Seq2SeqTransformer.from_pretrained(tmp_path), Seq2SeqTransformer.from_huggingface(theirs)
    assert read.config == copied.config
    for (name, x), y in zip(read.state_dict().items(), copied.state_dict().values(), strict=True):
        assert_equal_bits(x, y, name)


def test_what_is_not_computed_is_refused(seed: int) -> None:
    refused = {
        "encoder_layerdrop": 0.5,
        "encoder_ffn_dim": 8,
        "activation_function": "tanh",
        "tie_word_embeddings": False,
    }
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"{name}: got {value!r} in the Hugging Face config"):
            Seq2SeqTransformer.from_huggingface(stock("Bart", **{name: value}))
    biased = stock("Bart")
    biased.final_logits_bias[0, 0] = 1.0
    with pytest.raises(ValueError, match="final_logits_bias: got a bias"):
        Seq2SeqTransformer.from_huggingface(biased)
    with pytest.raises(ValueError, match="share_encoder_decoder_embeddings: got False"):
        Seq2SeqTransformer.from_huggingface(stock("Marian", share_encoder_decoder_embeddings=False))
    config = stock("Bart").config
    classifier = transformers.BartForSequenceClassification(config)
    with pytest.raises(ValueError, match="unexpected classification_head"):
        Seq2SeqTransformer.from_huggingface(classifier)


def test_the_decoders_input_is_theirs(seed: int) -> None:
    labels = torch.randint(3, 9, (3, 5)).index_fill(1, torch.tensor([4]), -100)[:, [0, 4, 1, 2, 3]]
    theirs = transformers.models.bart.modeling_bart.shift_tokens_right(labels, 1, 2)
    assert torch.equal(shift_right(labels, 2, 1), theirs)
