"""Which of the facts that are live at t ranks first: what least, greatest and newest values are taken from.

N facts, each live for enter ≤ t < leave, with a rank of its own among them; Q instants. All int64.
"""

from heapq import heappop, heappush

import numpy as np

from features.steps import as_of, bisect, order_of, starts
from pipelines.clock import NEVER


def first_live(
    code: np.ndarray, enter: np.ndarray, leave: np.ndarray, rank: np.ndarray, at: np.ndarray, t: np.ndarray, keys: int
) -> np.ndarray:  # fmt: skip
    """For each instant (key code `at`, `t`) the position of the live fact of greatest rank, −1 where none is (Q)."""
    found = np.full(len(t), -1)
    order = order_of(code, enter)
    order = order[enter[order] < leave[order]]
    if not len(order):
        return found
    code, enter, leave, rank = code[order], enter[order], leave[order], rank[order]
    torn = np.zeros(keys, bool)  # keys where a fact leaves before one that came earlier, such as a corrected one
    torn[code[1:][(code[1:] == code[:-1]) & (leave[1:] < leave[:-1])]] = True
    plain = ~torn[at]
    found[plain] = _in_turn(code, enter, leave, rank, at[plain], t[plain], torn)
    if not plain.all():
        some = np.flatnonzero(torn[code])
        changed, since, winner = changes(code[some], enter[some], leave[some], rank[some])
        newest = as_of(starts(changed, keys), since, at[~plain], t[~plain])
        found[~plain] = np.where(newest >= 0, np.append(some, -1)[winner[newest]], -1) if len(winner) else -1
    return np.where(found >= 0, order[found], -1)


def _in_turn(
    code: np.ndarray, enter: np.ndarray, leave: np.ndarray, rank: np.ndarray, at: np.ndarray, t: np.ndarray, torn: np.ndarray
) -> np.ndarray:  # fmt: skip
    """The same for keys whose facts leave in the order in which they came: those live at t are neighbours."""
    start = starts(code, len(torn))
    hi = bisect(start, enter, at, t, right=True)
    # bisect takes sorted runs: those of torn keys are not asked for
    lo = bisect(start, np.where(torn[code], enter, leave), at, t, right=True)
    some = np.flatnonzero(lo < hi)
    lo, hi = lo[some], hi[some]
    found = np.full(len(t), -1)
    place = np.empty(int(rank.max()) + 1, np.int64)
    place[rank] = np.arange(len(rank))
    width, best = hi - lo, rank
    for level in range(int(width.max(initial=0)).bit_length()):  # best: greatest rank of 2^level neighbours
        here = np.flatnonzero((width >> level) == 1)
        found[some[here]] = place[np.maximum(best[lo[here]], best[hi[here] - (1 << level)])]
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
