"""The registry: who is asked, in what order, what a refusal says, and how far ``use_backend`` reaches."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from fusedformer import BackendRefused, use_backend
from fusedformer.kernels.common.backend import ORDER, Candidate, record_decisions, select


def candidates(**reasons: list[str]) -> dict[str, Candidate]:
    """Every backend; those named refuse with these reasons."""

    def refuse(name: str) -> Callable[[object, bool], list[str]]:
        return lambda problem, automatic: reasons.get(name, [])

    return {name: Candidate(refuse(name), lambda problem: 4096, lambda problem: ["a note"]) for name in ORDER}


def refusing(*names: str) -> dict[str, Candidate]:
    return candidates(**{name: [f"{name} cannot", "and will not"] for name in names})


def test_auto_takes_the_first_that_does_not_refuse() -> None:
    assert ORDER == ("cuda", "triton", "cpu", "torch", "reference")
    for number, name in enumerate(ORDER):
        assert select("op", refusing(*ORDER[:number]), "problem", "auto") == name


def test_auto_does_not_ask_further_than_it_must() -> None:
    def never(problem: object, automatic: bool) -> list[str]:
        raise AssertionError("asked although another one had taken the problem")

    asked = refusing("cuda") | {name: Candidate(never) for name in ("cpu", "torch", "reference")}
    assert select("op", asked, "problem", "auto") == "triton"


@pytest.mark.parametrize("name", ORDER)
def test_a_backend_asked_for_by_name_never_falls_back(name: str) -> None:
    assert select("op", refusing(*(other for other in ORDER if other != name)), "problem", name) == name
    with pytest.raises(BackendRefused) as caught:
        select("op", refusing(name), "the problem", name)
    lines = str(caught.value).splitlines()
    assert lines[0] == f'backend="{name}" refuses op(the problem):'
    assert lines[1:] == [
        f"  {other}: {f'{name} cannot; and will not' if other == name else 'could run'}" for other in ORDER
    ]


def test_the_error_lists_every_reason_of_every_backend() -> None:
    with pytest.raises(BackendRefused) as caught:
        select("op", refusing(*ORDER), "the problem", "auto")
    lines = str(caught.value).splitlines()
    assert lines == ["no backend takes op(the problem):", *(f"  {name}: {name} cannot; and will not" for name in ORDER)]


def test_a_candidate_knows_whether_it_was_asked_for_by_name() -> None:
    shy = Candidate(lambda problem, automatic: ["only by name"] if automatic else [])
    listed = candidates() | {"cuda": shy}
    assert select("op", listed, "problem", "auto") == "triton"
    assert select("op", listed, "problem", "cuda") == "cuda"
    with use_backend("cuda"):
        assert select("op", listed, "problem", "auto") == "cuda"


def test_an_unknown_name() -> None:
    expected = r"backend: got 'cudnn', expected one of \('auto', 'cuda', 'triton', 'cpu', 'torch', 'reference'\)"
    with pytest.raises(ValueError, match=expected):
        select("op", candidates(), "problem", "cudnn")
    with pytest.raises(ValueError, match=expected), use_backend("cudnn"):
        pass


def test_use_backend_is_scoped_and_nests() -> None:
    listed = candidates()
    with use_backend("reference"):
        assert select("op", listed, "problem", "auto") == "reference"
        assert select("op", listed, "problem", "torch") == "torch", "a name at the call wins"
        with use_backend("cpu"):
            assert select("op", listed, "problem", "auto") == "cpu"
        with use_backend("auto"):
            assert select("op", listed, "problem", "auto") == "cuda"
        assert select("op", listed, "problem", "auto") == "reference"
    assert select("op", listed, "problem", "auto") == "cuda"


def test_use_backend_ends_with_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert select("op", candidates(), "problem", "auto") == "cuda"


def test_use_backend_refuses_rather_than_falls_back() -> None:
    with use_backend("triton"), pytest.raises(BackendRefused, match='backend="triton" refuses'):
        select("op", refusing("triton"), "problem", "auto")


def test_use_backend_is_of_one_thread() -> None:
    seen: dict[str, str] = {}
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(10)
        seen["other"] = select("op", candidates(), "problem", "auto")
        with use_backend("cpu"):
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with use_backend("reference"):
        inside.set()
        done.wait(10)
        seen["this"] = select("op", candidates(), "problem", "auto")
    thread.join(10)
    assert seen == {"other": "cuda", "this": "reference"}


def test_decisions_are_recorded_with_every_reason() -> None:
    with record_decisions() as explanation:
        select("one", refusing("cuda"), "problem A", "auto")
        select("two", candidates(), "problem B", "torch")
        with pytest.raises(BackendRefused):
            select("three", refusing("cpu"), "problem C", "cpu")
    one, two, three = explanation.decisions
    assert (one.chosen, two.chosen, three.chosen) == ("triton", "torch", None)
    assert (one.requested, two.requested) == ("auto", "torch")
    assert one.refusals["cuda"] == ["cuda cannot", "and will not"]
    assert (one.workspace_bytes, one.notes) == (4096, ["a note"])
    assert (three.workspace_bytes, three.notes) == (0, [])
    assert explanation.backend == "triton"
    assert str(one).splitlines() == [
        "one(problem A)",
        "  requested: auto",
        "  cuda       refuses: cuda cannot",
        "  cuda       refuses: and will not",
        "  triton     chosen, workspace 4,096 bytes",
        "             note: a note",
        "  cpu        could run",
        "  torch      could run",
        "  reference  could run",
    ]


def test_nothing_is_recorded_outside() -> None:
    with record_decisions() as explanation:
        pass
    select("op", candidates(), "problem", "auto")
    assert explanation.decisions == []
    assert explanation.backend is None
    assert str(explanation) == "no fusedformer operation was called"
