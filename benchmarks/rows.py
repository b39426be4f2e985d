"""Results as JSON lines: one row for each case and peer, complete in itself, appended as soon as it is known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .ceilings import Ceilings
from .machine import Machine
from .timing import Timing

FILE_NAME = "results.jsonl"
OURS = "fusedformer"  # among the peers of an attention case
STOCK_SDPA, FUSED = "stock sdpa", "fused"  # among the variants of the model


@dataclass(frozen=True)
class CaseRow:
    """One peer on one case.

    Attributes:
        status: "ok"; "wrong" (of ours, which then is not timed); "failed" (it raised); "not run". ``reason`` says why.
        family: what the case shares with those of the same sweep, which differ in ``length`` alone.
        timing: None where nothing was timed.
        error: largest absolute error against float64 over ``checked``, in the tensor where it is largest next to
            eager's; None where it could not be judged (``reason``).
        eager_error: that of torch's eager computation in the same dtype, in the same tensor.
        peak_bytes: of the forward and, unless it alone is timed, the backward.
        within_contract: None as ``error``.
        errors: the largest absolute error against float64 of each tensor judged.
        shares: of each ceiling of this machine, as ``Ceilings.shares`` names them.
        best_peer: the one with the least median; of ours alone.
        speedup: the best peer's median over this one's; of ours alone.
        ratio: the anchor's time over ours, the median over the rounds; of ours alone. The anchor is torch's own choice
            of an SDPA for attention, the best peer for other layers.
        floor: the least ratio that ours must reach; None where it is only reported.
        read_floor: the least share of the reading ceiling.
        backend: that ``auto`` chose for ours, or SDPA's; "" where there is no choice.
        level: the instruction set level of the native kernels, where ours is theirs.
        is_default: plain torch does this.
        explanation: of ours, why each other backend refused.
    """

    case: str
    peer: str
    dtype: str
    direction: str
    family: str
    length: int
    flops: float
    moved_bytes: int
    checked: str
    threads: int = 0
    status: str = "ok"
    reason: str = ""
    timing: Timing | None = None
    peak_bytes: int | None = None
    shares: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    eager_error: float | None = None
    within_contract: bool | None = None
    best_peer: str = ""
    speedup: float | None = None
    ratio: float | None = None
    floor: float | None = None
    read_floor: float | None = None
    backend: str = ""
    level: str = ""
    is_default: bool = False
    explanation: str = ""

    @property
    def is_ours(self) -> bool:
        return self.peer == OURS

    @property
    def title(self) -> str:
        return f"{self.case}, threads: {self.threads}"

    @property
    def reads_enough(self) -> bool:
        return self.read_floor is None or self.shares.get("read", 0.0) >= self.read_floor

    @property
    def met(self) -> bool | None:
        """Whether the native kernel reaches every floor of the case; None where there is none."""
        if self.floor is None or not self.is_ours:
            return None
        return reaches(self.ratio, self.floor, self.level) and self.reads_enough


@dataclass(frozen=True)
class AttentionRow(CaseRow):
    """Attention, whose default peer is the backend that plain ``scaled_dot_product_attention`` picks."""


@dataclass(frozen=True)
class LayerRow(CaseRow):
    """The feed-forward network, or a residual connection with its norm.

    Attributes:
        kept_bytes: what autograd keeps for the backward, inputs and parameters aside.
        kept_share: of what eager keeps; of ours alone.
        kept_most: the most that share may be; None where it is only reported.
    """

    kept_bytes: int | None = None
    kept_share: float | None = None
    kept_most: float | None = None

    @property
    def keeps_little(self) -> bool:
        return self.kept_most is None or (self.kept_share is not None and self.kept_share <= self.kept_most)

    @property
    def met(self) -> bool | None:
        """As in CaseRow, and little is kept."""
        met = super().met
        return met if met is None else met and self.keeps_little


@dataclass(frozen=True)
class TransformerRow(CaseRow):
    """A whole layer or model at work, next to its stock equal.

    Attributes:
        peak_share: of the stock equal's ``peak_bytes``; of ours alone.
        peak_most: the most that share may be; None where it is only reported.
    """

    peak_share: float | None = None
    peak_most: float | None = None

    @property
    def takes_little(self) -> bool:
        return self.peak_most is None or (self.peak_share is not None and self.peak_share <= self.peak_most)

    @property
    def met(self) -> bool | None:
        """Whether ours reaches all that the case asks for; None where that is nothing."""
        if not self.is_ours or (self.floor is self.read_floor is self.peak_most is None):
            return None
        is_fast = self.floor is None or reaches(self.ratio, self.floor, self.level)
        return is_fast and self.reads_enough and self.takes_little


@dataclass(frozen=True)
class ModelRow:
    """One variant of the main job's model.

    Attributes:
        workload: what it encodes.
        variant: "stock eager", "stock sdpa" or "fused".
        difference: the embeddings' largest to those of the stock model in fp32.
        error: their largest to those of the stock model in float64.
        peak_bytes: of the batch with the most padded tokens, weights aside.
        attention_share: of the time, in the variant "stock sdpa": what bounds the gain.
        ratio, floor, level: as in CaseRow, to the variant "stock sdpa".
        report: of ``fuse``.
    """

    model: str
    workload: str
    variant: str
    dtype: str
    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    peak_bytes: int | None = None
    difference: float | None = None
    error: float | None = None
    attention_share: float | None = None
    threads: int = 0
    status: str = "ok"
    reason: str = ""
    timing: Timing | None = None
    tokens_per_second: float | None = None
    speedup: float | None = None
    ratio: float | None = None
    floor: float | None = None
    backend: str = ""
    level: str = ""
    report: str = ""

    @property
    def is_ours(self) -> bool:
        return self.variant == FUSED

    @property
    def title(self) -> str:
        threads = f", threads: {self.threads}" if self.threads else ""
        return f"{self.model}, {self.workload}, in {self.dtype}{threads}"

    @property
    def met(self) -> bool | None:
        """As in CaseRow."""
        if self.floor is None or not self.is_ours:
            return None
        return reaches(self.ratio, self.floor, self.level)


def reaches(ratio: float | None, floor: float, level: str) -> bool:
    """A ratio counts where it is the native kernels'."""
    return ratio is not None and ratio >= floor and level != ""


@dataclass(frozen=True)
class NumericsRow:
    """One backend's error on one problem; ``status`` as in CaseRow, "refused" with ``reason``."""

    case: str
    dtype: str
    backend: str
    status: str = "ok"
    reason: str = ""
    tensor: str = ""
    error: float | None = None
    eager_error: float | None = None


Row = AttentionRow | LayerRow | TransformerRow | ModelRow | NumericsRow | Ceilings
KINDS: dict[str, type[Any]] = {
    "attention": AttentionRow,
    "layer": LayerRow,
    "transformer": TransformerRow,
    "model": ModelRow,
    "numerics": NumericsRow,
    "ceilings": Ceilings,
}
RowType = TypeVar("RowType", AttentionRow, LayerRow, TransformerRow, ModelRow, NumericsRow, Ceilings)


OurRow = AttentionRow | LayerRow | TransformerRow | ModelRow


class Writer:
    """Appends rows to ``folder/results.jsonl``, replacing what an earlier run left there."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / FILE_NAME).open("w")
        self._machine = asdict(machine)

    def write_all(self, rows: Iterable[RowType]) -> list[RowType]:
        """Writes each row as it comes."""
        written = []
        for row in rows:
            self.write(row)
            written.append(row)
        return written

    def write(self, row: Row) -> None:
        kind = next(name for name, type_ in KINDS.items() if isinstance(row, type_))
        entry = {"kind": kind, **asdict(row), "run": self._machine}
        entry |= {
            name: None for name, x in entry.items() if isinstance(x, float) and not math.isfinite(x)
        }  # not in JSON
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Results:
    """What one or more results files hold."""

    machines: list[Machine]
    rows: list[Row]

    def of(self, type_: type[RowType]) -> list[RowType]:
        return [row for row in self.rows if isinstance(row, type_)]


def read(folder: Path) -> Results:
    """Every results file of a folder and of those in it.

    Raises:
        ValueError: a line is no row, with its place.
        FileNotFoundError: there is no results file.
    """
    paths = sorted(folder.rglob(FILE_NAME))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {FILE_NAME} in it")
    machines: dict[str, Machine] = {}
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                entry = json.loads(line)
                type_ = KINDS[entry.pop("kind")]
                machine = Machine(**entry.pop("run"))
                if entry.get("timing") is not None:
                    entry["timing"] = Timing(**entry["timing"])
                rows.append(type_(**entry))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a row: {error!r}; expected one of {schema()}") from error
            machines[str(machine)] = machine
    return Results(list(machines.values()), rows)


def schema() -> dict[str, list[str]]:
    return {kind: [each.name for each in fields(type_)] for kind, type_ in KINDS.items()}
