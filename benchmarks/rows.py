"""Results as JSON lines: one row for each case and peer, complete in itself, appended as soon as it is known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .ceilings import Ceilings
from .machine import Machine
from .timing import Timing

FILE_NAME = "results.jsonl"
OURS = "fusedformer"  # among the peers of an attention case
FUSED = "fused"  # among the variants of the model


@dataclass(frozen=True)
class AttentionRow:
    """One peer on one case.

    Attributes:
        status: "ok"; "wrong" (of ours, which then is not timed); "failed" (it raised); "not run". ``reason`` says why.
        timing: None where nothing was timed.
        error: largest absolute error against float64 over ``checked``, in the tensor where it is largest next to
            eager's; None where it could not be judged (``reason``).
        eager_error: that of torch's eager computation in the same dtype, in the same tensor.
        peak_bytes: of the forward and, unless it alone is timed, the backward.
        within_contract: None as ``error``.
        ceiling_share: the least time this machine's ceilings allow, over the median.
        speedup: the best peer's median over this one's; of ours alone.
        backend: that ``auto`` chose for ours, or SDPA's; "" where there is no choice.
        is_default: plain ``scaled_dot_product_attention`` picks this backend.
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
    ceiling_share: float | None = None
    error: float | None = None
    eager_error: float | None = None
    within_contract: bool | None = None
    best_peer: str = ""
    speedup: float | None = None
    backend: str = ""
    is_default: bool = False
    explanation: str = ""

    @property
    def is_ours(self) -> bool:
        return self.peer == OURS

    @property
    def title(self) -> str:
        return f"{self.case}, threads: {self.threads}"


@dataclass(frozen=True)
class ModelRow:
    """One variant of the main job's model.

    Attributes:
        variant: "stock eager", "stock sdpa" or "fused".
        difference: the embeddings' largest to those of the stock model in fp32.
        error: their largest to those of the stock model in float64.
        peak_bytes: of the batch with the most padded tokens, weights aside.
        attention_share: of the time, in the variant "stock sdpa": what bounds the gain.
        report: of ``fuse``.
    """

    model: str
    variant: str
    dtype: str
    sentences: int
    tokens: int
    padded_tokens: int
    peak_bytes: int
    difference: float
    error: float
    attention_share: float
    threads: int = 0
    status: str = "ok"
    reason: str = ""
    timing: Timing | None = None
    tokens_per_second: float | None = None
    speedup: float | None = None
    backend: str = ""
    report: str = ""

    @property
    def is_ours(self) -> bool:
        return self.variant == FUSED

    @property
    def title(self) -> str:
        return f"{self.model} in {self.dtype}, threads: {self.threads}"


@dataclass(frozen=True)
class NumericsRow:
    """One backend's error on one problem; ``status`` as in AttentionRow, "refused" with ``reason``."""

    case: str
    dtype: str
    backend: str
    status: str = "ok"
    reason: str = ""
    tensor: str = ""
    error: float | None = None
    eager_error: float | None = None


Row = AttentionRow | ModelRow | NumericsRow | Ceilings
KINDS: dict[str, type[Any]] = {
    "attention": AttentionRow,
    "model": ModelRow,
    "numerics": NumericsRow,
    "ceilings": Ceilings,
}
RowType = TypeVar("RowType", AttentionRow, ModelRow, NumericsRow, Ceilings)


OurRow = AttentionRow | ModelRow


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
    return {kind: [field.name for field in fields(type_)] for kind, type_ in KINDS.items()}
