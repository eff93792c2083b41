"""The one stored form, a step function of t for each key, and the one merge function, `as_of`.

All times are int64 µs UTC, all sums int64. Shapes: N rows, Q queries, K keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from features.facts import Columns
from pipelines.clock import MISSING

KEY = "_key"  # of stored views: text of the key. Names of ours begin with _, as no column of a source should
TIME = "_time"  # of stored views: when a step, or a state of a sequence, begins
LIMIT = 2**62  # sums of window values must stay below


@dataclass(frozen=True)
class Steps:
    """Step functions by key: key `i` has the rows start[i]:start[i+1], with increasing `t`."""

    keys: pa.Array
    start: np.ndarray
    t: np.ndarray
    columns: Columns


def order_of(codes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Positions that sort by (code, t), stable. Fast where the two fit into one integer and are nearly sorted."""
    if not len(t):
        return np.zeros(0, np.int64)
    low, high = int(t.min()), int(t.max())
    if max(int(codes.max()) + 1, 1) * (high - low + 1) < LIMIT:
        return np.argsort(codes * (high - low + 1) + (t - low), kind="stable")
    return np.lexsort((t, codes))


def starts(code: np.ndarray, count: int) -> np.ndarray:
    """Where each of `count` keys begins among sorted codes (count + 1)."""
    return np.append(0, np.cumsum(np.bincount(code, minlength=count)))


def is_newest(start: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Which facts, in the order of key and known-at, are at least as new as all before of their key (bool, N)."""
    newest = np.ones(len(event), bool)
    if not len(event):
        return newest
    low = int(event.min())
    width = int(event.max()) - low + 1
    step = max(LIMIT // width, 1)
    for key in range(0, len(start) - 1, step):  # as many keys as fit into one line of integers
        part = slice(start[key], start[min(key + step, len(start) - 1)])
        runs = np.diff(start[key : key + step + 1])
        line = np.repeat(np.arange(len(runs)) * width, runs) + (event[part] - low)
        newest[part] = np.maximum.accumulate(line) == line
    return newest


def bisect(start: np.ndarray, values: np.ndarray, codes: np.ndarray, x: np.ndarray, *, right: bool) -> np.ndarray:
    """Where x[q] goes into the run of its code: values[start[code]:start[code + 1]] are sorted (Q, codes ≥ 0)."""
    side: Literal["left", "right"] = "right" if right else "left"
    if len(x) == 1:
        lo, hi = start[codes[0]], start[codes[0] + 1]
        return lo + np.searchsorted(values[lo:hi], x, side=side)
    if not len(values):
        return start[codes]
    low, high = int(values.min()), int(values.max())
    width = high - low + 3  # room for "before all" and "after all"
    if (len(start) - 1) * width < LIMIT:
        line = np.repeat(np.arange(len(start) - 1) * width, np.diff(start)) + (values - low)
        return np.searchsorted(line, codes * width + (np.clip(x, low - 1, high + 1) - low), side=side)
    lo, hi = start[codes], start[codes + 1]
    while (active := lo < hi).any():
        middle = (lo + hi) >> 1
        at = values[np.minimum(middle, len(values) - 1)]
        below = active & ((at <= x) if right else (at < x))
        lo, hi = np.where(below, middle + 1, lo), np.where(active & ~below, middle, hi)
    return lo


def as_of(start: np.ndarray, step_t: np.ndarray, codes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The merge function: for each (key code, t) the row of the newest step with step_t ≤ t, −1 where none (Q)."""
    if len(start) < 2:
        return np.full(len(t), -1)
    if len(t) == 1 and (code := int(codes[0])) >= 0:
        lo, hi = start[code : code + 2].tolist()
        after = int(step_t[lo:hi].searchsorted(t[0], side="right"))
        return np.array([lo + after - 1 if after else -1])
    safe = np.maximum(codes, 0)
    at = bisect(start, step_t, safe, t, right=True) - 1
    return np.where((codes >= 0) & (at >= start[safe]), at, -1)


def previous(
    start: np.ndarray, order: np.ndarray, live_from: np.ndarray, live_to: np.ndarray,
    codes: np.ndarray, t: np.ndarray, own: np.ndarray, within: int,
) -> np.ndarray:  # fmt: skip
    """For each (chain, t, own order) the row of the newest live plan with own − within ≤ order < own, −1 if none."""
    found = np.full(len(t), -1)
    if len(start) < 2:
        return found
    known, safe = (codes >= 0) & (own != MISSING), np.maximum(codes, 0)
    lo = start[safe]
    at = bisect(start, order, safe, own, right=False) - 1
    todo = np.flatnonzero(known & (at >= lo))
    while len(todo):
        i = at[todo]
        near = order[i] >= own[todo] - within
        live = near & (live_from[i] <= t[todo]) & (t[todo] < live_to[i])
        found[todo[live]] = i[live]
        at[todo] -= 1
        todo = todo[near & ~live & (at[todo] >= lo[todo])]
    return found


Move = tuple[np.ndarray, np.ndarray, Columns]


def accumulate(keys: pa.Array, codes: np.ndarray, moves: Sequence[Move]) -> Steps:
    """Steps of running sums. Each move is (t (N), where it counts (N), name → int64 (N) that is added from t on)."""
    code = np.concatenate([codes[counts] for _, counts, _ in moves])
    t = np.concatenate([t[counts] for t, counts, _ in moves])
    order = order_of(code, t)
    code, t = code[order], t[order]
    last = np.append((code[1:] != code[:-1]) | (t[1:] != t[:-1]), True) if len(t) else np.zeros(0, bool)
    code, t = code[last], t[last]
    start = starts(code, len(keys))
    lengths = np.diff(start)
    columns: Columns = {}
    for name in dict.fromkeys(name for _, _, values in moves for name in values):
        parts = [values[name][counts] if name in values else np.zeros(np.count_nonzero(counts), np.int64)
                 for _, counts, values in moves]  # fmt: skip
        # int64 wraps around, and the difference of two wrapped sums is right as long as it fits itself
        total = np.concatenate(parts)[order].cumsum()[last]
        columns[name] = total - np.append(0, total)[start[:-1]].repeat(lengths)
    return Steps(keys, start, t, columns)
