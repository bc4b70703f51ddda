"""Tandem repeats in a sequence of tokens: where ``s[i] == s[i + p]`` holds over at least two periods.

    a b c b c b c b c d   ->   Repeat(start=1, period=2, stop=9)

numpy compares the whole sequence with itself shifted by each candidate period, so the search is linear per period.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Up to this many nodes every period is tried; beyond, only distances between equal tokens can be periods.
EXHAUSTIVE = 2048
#: How often one token may occur in an iteration for its distances to be considered.
MAX_OCCURRENCES = 24


@dataclass(frozen=True)
class Repeat:
    start: int
    period: int
    stop: int

    @property
    def count(self) -> int:
        return (self.stop - self.start) // self.period

    @property
    def covered(self) -> int:
        return self.count * self.period


def find_repeats(tokens: Sequence[int]) -> list[Repeat]:
    """All maximal repeats, those that cover most first, and of equal ones the shortest period first."""
    s = np.asarray(tokens, dtype=np.int64)
    found = [r for p in _periods(s) for r in _runs(s, p)]
    found.sort(key=lambda r: (-r.covered, r.period, r.start))
    return found


def _periods(s: np.ndarray) -> list[int]:
    n = len(s)
    if n <= EXHAUSTIVE:
        return list(range(1, n // 2 + 1))
    order = np.argsort(s, kind="stable")
    same = s[order]
    candidates: set[int] = set()
    for lag in range(1, MAX_OCCURRENCES + 1):
        hit = same[lag:] == same[:-lag]
        distances, counts = np.unique((order[lag:] - order[:-lag])[hit], return_counts=True)
        # a period of T iterations shows the same distance many times
        candidates.update(int(d) for d, c in zip(distances, counts, strict=True) if c >= 2 and d <= n // 2)
    return sorted(candidates)


def _runs(s: np.ndarray, period: int) -> list[Repeat]:
    equal = s[:-period] == s[period:]
    if int(equal.sum()) < period:
        return []
    edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.view(np.int8), [0]))))
    runs = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start >= period:
            runs.append(Repeat(int(start), period, int(stop) + period))
    return runs
