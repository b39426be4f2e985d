"""``generate`` against the naive way: every token from the whole sequence computed anew, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer.transformer import generation
from fusedformer.transformer.generation import PAGE
from fusedformer.transformer.models import (
    CausalConfig,
    CausalLanguageModel,
    Seq2SeqConfig,
    Seq2SeqTransformer,
)
from fusedformer.transformer.next_token import Beams, Continuation, Limits, Sampling

VOCABULARY, PAD, EOS, START = 23, 0, 2, 1
LENGTH, NEW = 7, 9
Model = CausalLanguageModel | Seq2SeqTransformer


def spread(model: torch.nn.Module) -> None:
    """Weights so far apart, and so exact, that what is computed in another order decides nothing."""
    model.eval().double()
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1:
                x.normal_(std=0.4)


def causal(**options: Any) -> CausalLanguageModel:
    sizes: dict[str, Any] = {"d_model": 24, "nhead": 4, "num_layers": 2, "max_length": 48}
    model = CausalLanguageModel(
        CausalConfig(VOCABULARY, **sizes | {"eos_token_id": EOS, "pad_token_id": PAD, "dropout": 0.3} | options)
    )
    spread(model)
    return model


def llama() -> CausalLanguageModel:
    ids: dict[str, Any] = {"eos_token_id": (EOS, 3), "pad_token_id": PAD}
    model = CausalLanguageModel(
        CausalConfig.llama(VOCABULARY, d_model=24, nhead=4, num_layers=1, num_kv_heads=2, **ids)
    )
    spread(model)
    return model


def seq2seq() -> Seq2SeqTransformer:
    sizes: dict[str, Any] = {"d_model": 24, "nhead": 4, "num_encoder_layers": 1, "num_decoder_layers": 2}
    model = Seq2SeqTransformer(Seq2SeqConfig(VOCABULARY, **sizes, dim_feedforward=32))
    spread(model)
    return model


MODELS: dict[str, Callable[[], Model]] = {"causal": causal, "llama": llama, "seq2seq": seq2seq}
each_model = pytest.mark.parametrize("kind", MODELS)


def prompts() -> tuple[Tensor, Tensor]:
    """Prompts of unequal length, padded on the left, on the right, within, and not at all."""
    mask = torch.ones(4, LENGTH, dtype=torch.int64)
    mask[0, :3], mask[1, 2:], mask[2, 3] = 0, 0, 0
    return torch.randint(4, VOCABULARY, (4, LENGTH)).masked_fill(mask == 0, PAD), mask


Logits = Callable[[list[list[int]]], Tensor]


def naive_logits(model: Model, ids: Tensor, mask: Tensor) -> Logits:
    """Logits after the new tokens of several continuations of one prompt, or target of one source."""
    if isinstance(model, CausalLanguageModel):
        alone = ids[mask != 0]
        return lambda new: model(torch.stack([torch.cat([alone, torch.tensor(x, dtype=torch.int64)]) for x in new]))[
            :, -1
        ]
    source = (ids[None], mask[None])

    def logits(new: list[list[int]]) -> Tensor:
        target = torch.tensor([[START, *x] for x in new])
        out: Tensor = model(source[0].expand(len(new), -1), target, source[1].expand(len(new), -1))
        return out[:, -1]

    return logits


def naive_greedy(logits: Logits, eos: tuple[int, ...], most: int = NEW, least: int = 0) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < most and not (tokens and tokens[-1] in eos):
        scores = logits([tokens])[0]
        if len(tokens) < least:
            scores[list(eos)] = -torch.inf
        tokens.append(int(scores.argmax()))
    return tokens


def naive_beams(
    logits: Logits,
    eos: tuple[int, ...],
    width: int,
    penalty: float,
    early: bool | str,
    least: int = 0,
) -> list[list[int]]:
    """Beam search on lists: what runs, what has ended, and when nothing that runs can beat what has ended."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, NEW + 1):
        scores = logits([tokens for _, tokens in running]).double().log_softmax(-1)
        if length <= least:
            scores[:, list(eos)] = -torch.inf
        grown = [
            (score + new, [*tokens, token])
            for (score, tokens), row in zip(running, scores.tolist(), strict=True)
            for token, new in enumerate(row)
        ]
        grown.sort(reverse=True)
        ends = [one for one in grown[:width] if one[1][-1] in eos or length == NEW]
        ended += [(score / length**penalty, tokens) for score, tokens in ends]
        ended = sorted(ended, reverse=True)[:width]
        running = [one for one in grown if one[1][-1] not in eos][:width]
        if len(ended) == width:
            longest = NEW if early == "never" and penalty > 0 else length
            if early is True or running[0][0] / longest**penalty <= ended[-1][0]:
                break
    return [tokens for _, tokens in ended]


def expected(model: Model, ids: Tensor, continuations: list[list[int]], pad: int = PAD) -> Tensor:
    """What generate returns for these new tokens of each row."""
    width = max(map(len, continuations))
    new = torch.tensor([[*tokens, *[pad] * (width - len(tokens))] for tokens in continuations])
    given = ids if isinstance(model, CausalLanguageModel) else torch.full((len(ids), 1), START)
    return torch.cat([given.repeat_interleave(len(new) // len(ids), 0), new], 1)


def eos_of(model: Model) -> tuple[int, ...]:
    eos = model.config.eos_token_id
    return eos if isinstance(eos, tuple) else (cast(int, eos),)


@each_model
@pytest.mark.parametrize("page", [None, 4])
@torch.no_grad()
def test_greedy(kind: str, page: int | None) -> None:
    model, (ids, mask) = MODELS[kind](), prompts()
    for least, most in ((0, NEW), (4, NEW), (0, 1), (3, 3)):
        naive = [
            naive_greedy(naive_logits(model, *row), eos_of(model), most, least) for row in zip(ids, mask, strict=True)
        ]
        actual = model.generate(ids, mask, max_new_tokens=most, min_new_tokens=least, page=page)
        assert torch.equal(actual, expected(model, ids, naive))


@torch.no_grad()
def test_each_row_ends_at_its_own_token() -> None:
    """A third of the vocabulary ends a row: they end at different steps."""
    torch.manual_seed(1)
    model, (ids, mask) = causal(), prompts()
    eos = tuple(range(2, 10))
    ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
    ids[:, 1] = torch.randint(4, VOCABULARY, (8,))
    mask[:, 1] = 1
    naive = [naive_greedy(naive_logits(model, *row), eos, 20) for row in zip(ids, mask, strict=True)]
    assert len({len(tokens) for tokens in naive}) > 2
    actual = model.generate(ids, mask, max_new_tokens=20, eos_token_id=eos, pad_token_id=11)
    assert torch.equal(actual, expected(model, ids, naive, pad=11))
    unending = model.generate(ids, mask, max_new_tokens=8, eos_token_id=[])
    assert unending.shape == (8, LENGTH + 8)


@each_model
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@torch.no_grad()
def test_beam_search(kind: str, early_stopping: bool | str) -> None:
    model, (ids, mask) = MODELS[kind](), prompts()
    eos = (EOS, 5, 9)
    for penalty, width, least in ((1.0, 4, 0), (0.0, 3, 3), (2.0, 2, 0), (-1.0, 4, 0)):
        naive = [
            naive_beams(naive_logits(model, *row), eos, width, penalty, early_stopping, least)
            for row in zip(ids, mask, strict=True)
        ]
        actual = model.generate(
            ids,
            mask,
            max_new_tokens=NEW,
            min_new_tokens=least,
            num_beams=width,
            length_penalty=penalty,
            early_stopping=early_stopping,
            num_return_sequences=2,
            eos_token_id=eos,
        )
        assert torch.equal(actual, expected(model, ids, [tokens for row in naive for tokens in row[:2]]))


def naive_draw(scores: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: Any) -> Tensor:
    """One token of each row of scores, the probabilities filtered one by one."""
    probabilities = (scores / temperature).softmax(-1)
    for row in probabilities:
        best = row.argsort(descending=True).tolist()
        row[best[top_k:] if top_k else []] = 0.0
        row /= row.sum()
        mass = 0.0
        for token in best:
            if top_p is not None and mass >= top_p:
                row[token] = 0.0
            mass += row[token].item()
        row /= row.sum()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


FILTERS = [(1.0, None, None), (0.6, 4, None), (1.7, None, 0.8), (1.0, 7, 0.5), (1.0, 1000, 1.0), (1.0, 3, 1e-9)]


@pytest.mark.parametrize(
    ("kind", "filters"), [*(("causal", x) for x in FILTERS), ("llama", FILTERS[3]), ("seq2seq", FILTERS[3])], ids=str
)
@torch.no_grad()
def test_sampling(kind: str, filters: tuple[float, int | None, float | None], seed: int) -> None:
    model, (ids, mask) = MODELS[kind](), prompts()
    copies, eos = 3, eos_of(model)
    rows = [naive_logits(model, *row) for row in zip(ids, mask, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    naive: list[list[int]] = [[] for _ in range(copies * len(rows))]
    for step in range(NEW):
        scores = torch.cat([logits(naive[copies * b : copies * (b + 1)]) for b, logits in enumerate(rows)])
        if step < 2:
            scores[:, list(eos)] = -torch.inf
        for tokens, token in zip(naive, naive_draw(scores, *filters, generator).tolist(), strict=True):
            tokens.append(PAD if set(tokens) & set(eos) else token)
    stop = max(next((i for i, x in enumerate(tokens) if x in eos), NEW - 1) for tokens in naive) + 1
    actual = model.generate(
        ids,
        mask,
        max_new_tokens=NEW,
        min_new_tokens=2,
        do_sample=True,
        temperature=filters[0],
        top_k=filters[1],
        top_p=filters[2],
        num_return_sequences=copies,
        generator=generator.manual_seed(seed),
    )
    assert torch.equal(actual, expected(model, ids, [tokens[:stop] for tokens in naive]))


def test_torchs_generator_draws_where_none_is_given(seed: int) -> None:
    model, (ids, mask) = causal(), prompts()
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 3.0}
    torch.manual_seed(seed)
    first, second = (model.generate(ids, mask, **options) for _ in range(2))
    torch.manual_seed(seed)
    assert torch.equal(model.generate(ids, mask, **options), first)
    assert not torch.equal(second, first)


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
}
each_search = pytest.mark.parametrize("search", SEARCHES)


def generate(model: Model, ids: Tensor, mask: Tensor | None, search: str, **options: Any) -> Tensor:
    if search == "sampling":
        options = {"generator": torch.Generator().manual_seed(3), **options}
    return model.generate(ids, mask, **{"max_new_tokens": NEW, **SEARCHES[search], **options})


@each_search
@each_model
def test_what_changes_nothing(kind: str, search: str) -> None:
    """How the cache is laid out, training mode, the mask's dtype, and none where a prompt's padding says it all."""
    model, (ids, mask) = MODELS[kind](), prompts()
    reference = generate(model, ids, mask, search)
    for page in (1, 3, 64):
        assert torch.equal(generate(model, ids, mask, search, page=page), reference)
    model.train()
    assert torch.equal(generate(model, ids, mask.bool(), search), reference)
    assert all(module.training for module in model.modules())
    if kind == "seq2seq":
        reference = generate(model, ids, torch.ones_like(ids), search)
    assert torch.equal(generate(model, ids, None, search), reference)


@each_search
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_steps_after_the_end_change_nothing(
    early_stopping: bool | str, search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host would have to wait for the answer it asks less often whether all rows have ended."""
    torch.manual_seed(1)  # rows might also go on and on
    model, (ids, mask) = causal(), prompts()
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": list(range(2, VOCABULARY - 2))}
    if search == "beams":
        options["early_stopping"] = early_stopping
    reference = generate(model, ids, mask, search, **options)
    assert reference.size(1) < LENGTH + 20
    monkeypatch.setattr(generation, "STEPS_BETWEEN", {"cpu": 11})
    assert torch.equal(generate(model, ids, mask, search, **options), reference)


def test_half_precision() -> None:
    model, (ids, mask) = causal().bfloat16(), prompts()
    for search in SEARCHES:
        tokens = generate(model, ids, mask, search)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, generate(model, ids, mask, search))


class NoWaiting(TorchDispatchMode):
    """Fails where the host would have to wait for a device: for a number, or to know how large a result is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(x is None or x.dtype not in (torch.bool, torch.uint8) for x in args[1]), name
        return func(*args, **kwargs or {})


def started(model: Model, search: str, page: int | None) -> tuple[Any, Continuation | Beams]:
    """A cache and what chooses, after the first token."""
    device = next(model.parameters()).device
    ids = torch.arange(4, 14, device=device).view(2, 5)
    limits = Limits(NEW, 2, torch.tensor([EOS, 3], device=device), PAD)
    if isinstance(model, CausalLanguageModel):
        cache, tokens = model.new_cache(2, 20, page=page), ids
    else:
        cache, tokens = model.start(ids, None, 20, page=page), torch.full((2, 1), START, device=device)
    logits = model.decode(tokens, cache).repeat_interleave(3, 0)
    cache.repeat(3)
    choice = Beams(cache, 3, limits) if search == "beams" else Continuation(cache, limits)
    if search == "sampling":
        choice = Continuation(cache, limits, Sampling(0.7, 5, 0.9))
    choice.choose(logits)
    return cache, choice


@each_search
@each_model
@pytest.mark.parametrize("page", [None, PAGE])
@torch.no_grad()
def test_a_step_can_be_captured(page: int | None, kind: str, search: str) -> None:
    """What a CUDA graph needs: the host waits for nothing, and what lasts stays where it is."""
    model = MODELS[kind]()
    cache, choice = started(model, search, page)

    def lasting() -> dict[str, int]:
        holders = (cache, choice)
        found = {name: x for holder in holders for name, x in vars(holder).items() if isinstance(x, Tensor)}
        found |= {f"{name} {i}": x for name in ("keys", "values") for i, x in enumerate(getattr(cache, name))}
        found |= {f"memory {i}": x for i, pair in enumerate(cache.memory) for x in pair}
        return {name: x.data_ptr() for name, x in found.items()}

    before = lasting()
    assert {"tokens", "lengths", "keys 0", "_step"} <= before.keys()
    for _ in range(4):
        with NoWaiting():
            choice.choose(model.decode(choice.tokens, cache))
    assert lasting() == before


@each_model
@pytest.mark.parametrize("search", ["greedy", "beams"])
@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_step(search: str, kind: str) -> None:
    model = MODELS[kind]().float().cuda()
    eager_cache, eager = started(model, search, PAGE)
    for _ in range(5):
        eager.choose(model.decode(eager.tokens, eager_cache))
    cache, choice = started(model, search, PAGE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        choice.choose(model.decode(choice.tokens, cache))
    for _ in range(5):
        graph.replay()
    assert torch.equal(choice.tokens, eager.tokens)
    assert torch.equal(choice.sequences(), eager.sequences())
    assert torch.equal(cache.lengths, eager_cache.lengths)


MISTAKES: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "input_ids: got list, expected a Tensor": (TypeError, {"input_ids": [[1, 2]]}),
    "input_ids: got float32, expected int64": (TypeError, {"input_ids": torch.ones(2, 3)}),
    r"input_ids: got shape \(3,\)": (ValueError, {"input_ids": torch.ones(3, dtype=torch.int64)}),
    r"input_ids: got shape \(2, 0\)": (ValueError, {"input_ids": torch.ones(2, 0, dtype=torch.int64)}),
    "input_ids: got tokens from 4 to 23": (ValueError, {"input_ids": torch.tensor([[4, 23]])}),
    "input_ids: got tokens from -100 to 5": (ValueError, {"input_ids": torch.tensor([[5, -100]])}),
    "input_ids: got row 1 with nothing but padding": (ValueError, {"input_ids": torch.tensor([[5, 6], [PAD, PAD]])}),
    "attention_mask: got row 0 with": (ValueError, {"attention_mask": torch.tensor([[0, 0], [0, 1]])}),
    r"attention_mask: got shape \(2,\), expected \(2, 2\)": (ValueError, {"attention_mask": torch.ones(2).long()}),
    "attention_mask: got float32": (TypeError, {"attention_mask": torch.ones(2, 2)}),
    "max_new_tokens: got 0, expected at least 1": (ValueError, {"max_new_tokens": 0}),
    "max_new_tokens: got float": (TypeError, {"max_new_tokens": 3.0}),
    "max_new_tokens: got 47 behind 2 tokens, expected at most 48": (ValueError, {"max_new_tokens": 47}),
    "min_new_tokens: got 4, expected at most max_new_tokens = 3": (ValueError, {"min_new_tokens": 4}),
    "num_beams: got 0": (ValueError, {"num_beams": 0}),
    "do_sample: got True with num_beams = 2": (ValueError, {"num_beams": 2, "do_sample": True}),
    "length_penalty: got 2.0 without beams": (ValueError, {"length_penalty": 2.0}),
    "length_penalty: got str": (TypeError, {"length_penalty": "1", "num_beams": 2}),
    "early_stopping: got True without beams": (ValueError, {"early_stopping": True}),
    "early_stopping: got 'always'": (ValueError, {"early_stopping": "always", "num_beams": 2}),
    "temperature: got 0.0": (ValueError, {"temperature": 0.0, "do_sample": True}),
    "temperature: got 0.5 without do_sample=True": (ValueError, {"temperature": 0.5}),
    "top_k: got 0": (ValueError, {"top_k": 0, "do_sample": True}),
    "top_k: got 3 without do_sample=True": (ValueError, {"top_k": 3}),
    "top_p: got 1.5": (ValueError, {"top_p": 1.5, "do_sample": True}),
    "top_p: got 0.5 without do_sample=True": (ValueError, {"top_p": 0.5}),
    "generator: got int": (TypeError, {"generator": 3, "do_sample": True}),
    "num_return_sequences: got 2, expected at most num_beams = 1": (ValueError, {"num_return_sequences": 2}),
    "num_return_sequences: got 3, expected at most num_beams = 2": (
        ValueError,
        {"num_return_sequences": 3, "num_beams": 2},
    ),
    r"eos_token_id: got 23, expected a token of \[0, 23\)": (ValueError, {"eos_token_id": [2, 23]}),
    "eos_token_id: got str": (TypeError, {"eos_token_id": ["a"]}),
    "eos_token_id: got .* expected to leave beams": (ValueError, {"eos_token_id": list(range(23)), "num_beams": 2}),
    "pad_token_id: got -1": (ValueError, {"pad_token_id": -1}),
    "page: got 0": (ValueError, {"page": 0}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message: str) -> None:
    error, options = MISTAKES[message]
    given = {"input_ids": torch.tensor([[4, 5], [6, 7]]), "max_new_tokens": 3, **options}
    model = causal()
    with pytest.raises(error, match=message):
        model.generate(**given)


def test_positions_end() -> None:
    sizes: dict[str, Any] = {"d_model": 8, "nhead": 1, "num_encoder_layers": 1, "num_decoder_layers": 1}
    model = Seq2SeqTransformer(Seq2SeqConfig(VOCABULARY, **sizes, positions="learned", max_length=6))
    source = torch.full((1, 6), 4)
    assert model.generate(source, max_new_tokens=5, eos_token_id=[]).shape == (1, 6)
    with pytest.raises(ValueError, match="max_new_tokens: got 6 behind 1 tokens, expected at most 6 together"):
        model.generate(source, max_new_tokens=6)
    with pytest.raises(ValueError, match="input_ids: got 7 tokens, expected at most 6"):
        model.generate(torch.full((1, 7), 4), max_new_tokens=2)
    short = causal(max_length=9)
    mask = torch.tensor([[0] * 8 + [1] * 2])
    assert short.generate(torch.full((1, 10), 4), mask, max_new_tokens=7, eos_token_id=[]).shape == (1, 17)
