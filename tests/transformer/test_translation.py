"""A first translation, trained from nothing: English numbers into German, which says the ones before the tens."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer.transformer.learning_rate import warmup_schedule
from fusedformer.transformer.loss import cross_entropy
from fusedformer.transformer.models import Seq2SeqConfig, Seq2SeqTransformer
from fusedformer.transformer.models.seq2seq import shift_right

ONES = {
    "one": "ein", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs", "seven": "sieben",
    "eight": "acht", "nine": "neun", "ten": "zehn", "eleven": "elf", "twelve": "zwölf", "thirteen": "dreizehn",
    "fourteen": "vierzehn", "fifteen": "fünfzehn", "sixteen": "sechzehn", "seventeen": "siebzehn",
    "eighteen": "achtzehn", "nineteen": "neunzehn",
}  # fmt: skip
TENS = {
    "twenty": "zwanzig", "thirty": "dreißig", "forty": "vierzig", "fifty": "fünfzig", "sixty": "sechzig",
    "seventy": "siebzig", "eighty": "achtzig", "ninety": "neunzig",
}  # fmt: skip
PAD, SOS, EOS = range(3)
WORDS = ["<pad>", "<sos>", "<eos>", *ONES, *TENS, "hundred", "and", *ONES.values(), *TENS.values(), "hundert", "und"]
TRAINED, STEPS, BATCH, WARMUP = 700, 400, 64, 100


def english(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    words = [list(ONES)[hundreds - 1], "hundred"] if hundreds else []
    if hundreds and rest:
        words.append("and")
    if rest >= 20:
        words.append(list(TENS)[rest // 10 - 2])
        rest %= 10
    return [*words, list(ONES)[rest - 1]] if rest else words


def german(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    words = [list(ONES.values())[hundreds - 1], "hundert"] if hundreds else []
    tens, ones = divmod(rest, 10) if rest >= 20 else (0, rest)
    if ones:
        words.append(list(ONES.values())[ones - 1])
    if tens:
        words += ["und"] if ones else []
        words.append(list(TENS.values())[tens - 2])
    return words


def padded(sentences: list[list[str]]) -> Tensor:
    """(sentences, words of the longest and <eos>) int64."""
    rows = [torch.tensor([*map(WORDS.index, words), EOS]) for words in sentences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def train(model: Seq2SeqTransformer, source: Tensor, target: Tensor) -> None:
    """As in section 5, in shorter."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_schedule(model.config.d_model, WARMUP))
    for _ in range(STEPS):
        rows = torch.randint(len(source), (BATCH,))
        inputs, labels = source[rows], target[rows]
        shifted = shift_right(labels, SOS, PAD)
        logits = model(inputs, shifted, attention_mask=inputs != PAD, decoder_attention_mask=shifted != PAD)
        loss = cross_entropy(logits, labels, label_smoothing=0.1, ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def test_held_out_numbers_are_translated(seed: int) -> None:
    numbers = (1 + torch.randperm(999)).tolist()
    source, target = (padded([language(number) for number in numbers]) for language in (english, german))
    config = Seq2SeqConfig(
        len(WORDS),
        d_model=64,
        nhead=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=128,
        pad_token_id=PAD,
        bos_token_id=SOS,
        eos_token_id=EOS,
        decoder_start_token_id=SOS,
    )
    model = Seq2SeqTransformer(config)
    train(model, source[:TRAINED], target[:TRAINED])

    model.eval()
    source, target = source[TRAINED:], target[TRAINED:]
    for num_beams in (1, 4):
        found = model.generate(source, source != PAD, max_new_tokens=target.size(1), num_beams=num_beams)[:, 1:]
        exact = (found == target[:, : found.size(1)]).all(1) & (target[:, found.size(1) :] == PAD).all(1)
        assert exact.double().mean() > 0.95, f"{num_beams} beams"
