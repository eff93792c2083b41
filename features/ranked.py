"""Which of the facts that are live at t ranks first: what least, greatest and newest values are taken from.

N facts, each live for enter ≤ t < leave, with a rank of its own among them; Q instants, sorted by key. All int64.
"""

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from features.steps import as_of, order_of, starts
from pipelines.clock import NEVER


def first_live(
    code: np.ndarray, enter: np.ndarray, leave: np.ndarray, ranks: Sequence[np.ndarray],
    at: np.ndarray, t: np.ndarray, entered: np.ndarray, live: np.ndarray, keys: int,
) -> list[np.ndarray]:  # fmt: skip
    """For each rank (N, −1: takes no part) and instant the position of the live fact of greatest rank, −1 where none (Q).

    An instant is a key code `at` and `t`; `entered`: how many of its key's facts have entered by then, `live` of them live.
    """
    order = order_of(code, enter)
    order = order[enter[order] < leave[order]]
    code, enter, leave = code[order], enter[order], leave[order]
    torn = np.zeros(keys, bool)  # keys where a fact leaves before one that came earlier, such as a corrected one
    torn[code[1:][(code[1:] == code[:-1]) & (leave[1:] < leave[:-1])]] = True
    plain = np.flatnonzero(~torn[at] & (live > 0))  # facts leave in the order in which they came: the live ones are neighbours
    hi = starts(code, keys)[at[plain]] + entered[plain]
    lo, some = hi - live[plain], np.flatnonzero(torn[code])
    swept = np.flatnonzero(torn[at]) if len(some) else some
    every = []
    for rank in (rank[order] for rank in ranks):
        found = np.full(len(t), -1)
        if len(order):
            found[plain] = _greatest(code, rank, lo, hi)
        if len(some):
            ranked = some[rank[some] >= 0]
            changed, since, winner = changes(code[ranked], enter[ranked], leave[ranked], rank[ranked])
            newest = as_of(starts(changed, keys), since, at[swept], t[swept])
            found[swept] = np.append(np.append(ranked, -1)[winner], -1)[newest]
        every.append(np.append(order, -1)[found])
    return every


def _greatest(code: np.ndarray, rank: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Where the greatest rank is among the neighbours lo ≤ i < hi, −1 where none of them has one (Q)."""
    if (rank >= 0).all() and ((rank[1:] > rank[:-1]) | (code[1:] != code[:-1])).all():
        return hi - 1
    place = np.full(int(rank.max()) + 2, -1)
    place[rank] = np.arange(len(rank))
    place[-1] = -1
    found, best, width = np.empty(len(lo), np.int64), rank, hi - lo
    for level in range(int(width.max(initial=0)).bit_length()):  # best: greatest rank of 2^level neighbours
        here = np.flatnonzero((width >> level) == 1)
        found[here] = place[np.maximum(best[lo[here]], best[hi[here] - (1 << level)])]
        best = np.maximum(best[: -(1 << level)], best[1 << level :]) if len(best) > 1 << level else best
    return found


def changes(
    code: np.ndarray, enter: np.ndarray, leave: np.ndarray, rank: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Key, time and position of the winner (−1: none) at each instant at which it changes. Sorted by key and time."""
    found: list[tuple[int, int, int]] = []
    order = order_of(code, enter)
    for group in np.split(order, np.flatnonzero(np.diff(code[order])) + 1) if len(order) else []:
        key, best, new = int(code[group[0]]), -1, 0
        heap: list[tuple[int, int]] = []  # greatest rank first; what has left is dropped when it comes up
        row, begins, ends, ranks = group.tolist(), enter[group].tolist(), leave[group].tolist(), rank[group].tolist()
        for t in sorted({*begins, *ends} - {NEVER}):
            while new < len(begins) and begins[new] <= t:
                heappush(heap, (-ranks[new], new))
                new += 1
            while heap and ends[heap[0][1]] <= t:
                heappop(heap)
            if (winner := heap[0][1] if heap else -1) != best:
                best = winner
                found.append((key, t, row[best] if heap else -1))
    codes, times, winners = np.array(found, np.int64).reshape(-1, 3).T
    return codes, times, winners
