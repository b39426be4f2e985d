"""Pairwise covering: few assignments that hold every pair of values of any two factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

Assignment = dict[str, str]


def covering(
    factors: Mapping[str, Sequence[str]], allowed: Callable[[Assignment], bool], start: Sequence[Assignment] = ()
) -> list[Assignment]:
    """Assignments of a value to every factor, so that each two values of two factors meet in one of them.

    Greedy (after Cohen et al., "The AETG system", 1997) and without chance: the same list every time.

    Args:
        factors: the values of each factor.
        allowed: whether an assignment, of all factors or of some, may be made; a pair that it refuses is left out. An
            allowed assignment of some factors must be one that can be completed.
        start: assignments that the list begins with.
    """
    names = sorted(factors, key=lambda name: -len(factors[name]))  # the ones with most to cover choose first
    missing = {
        frozenset(((a, x), (b, y)))
        for a, b in combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
        if allowed({a: x, b: y})
    }
    made: list[Assignment] = []

    def make(assignment: Assignment) -> None:
        made.append(assignment)
        missing.difference_update(map(frozenset, combinations(assignment.items(), 2)))

    for assignment in start:
        make(assignment)
    while missing:
        chosen: Assignment = dict(sorted(min(missing, key=sorted)))

        def newly_covered(name: str, value: str, chosen: Assignment = chosen) -> int:
            return sum(frozenset((pair, (name, value))) in missing for pair in chosen.items())

        for name in names:
            if name not in chosen:
                values = [value for value in factors[name] if allowed({**chosen, name: value})]
                chosen[name] = max(values, key=lambda value: newly_covered(name, value))
        make({name: chosen[name] for name in factors})
    return made
