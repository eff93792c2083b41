"""Bounds from the past: what newly landed must resemble the days of the snapshot that was accepted before.

Past and new rows alone decide: the previous snapshot is pinned with the run, so a run made again judges the same. Each
figure may lie beyond the extremes of the past days by `tolerance` times their distance, and by what chance does to so few rows;
so bounds widen as the history does. Numbers of rows are compared by factors, and
with the 5 % and 95 % quantiles instead of the extremes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.keys import KNOWN, filled, one_chunk, text_keys
from pipelines.clock import DAY_US, iso
from pipelines.spec import Drift, Source

CHANCE = 5.0  # standard deviations of a figure over as many rows
MIXED = 50  # most distinct values of a column whose mix is judged
FEW = 10  # days of fewer rows say nothing of values
UPWARD = ("share of nulls", "share of new values", "change of mix")  # less of these is no fault


@dataclass(frozen=True)
class Judged:
    """One figure of what is new, and the bounds that the past gives it."""

    column: str  # empty: the table's rows
    figure: str
    value: float
    low: float
    high: float
    days: int
    when: str = ""

    @property
    def within(self) -> bool:
        return not self.value < self.low and not self.value > self.high


def judge_new(source: Source, drift: Drift, table: pa.Table, before: pa.Table, *, now: int, then: int) -> Iterator[Judged]:
    """Figures of the rows of `table` that are not in `before`, against the days of those that are; none with too few days.

    now, then: watermarks of the snapshots, µs.
    """
    known = _int(table[KNOWN])
    new = _is_new(source, table, before)
    if not new.any() and now // DAY_US == then // DAY_US:
        return
    yield from _rows(drift, known, new, now, then)
    past, day = np.unique(known[~new] // DAY_US, return_inverse=True)
    if len(past) < drift.days or not new.any():
        return
    group = np.full(table.num_rows, len(past))
    group[~new] = day
    stamp = source.known_at.column if source.known_at else None
    for name in drift.columns if drift.columns is not None else [c for c in source.columns if c != stamp]:
        for figure, values, noise in _figures(one_chunk(table[name]), group, known):
            yield from _against(drift, name, figure, values, noise, np.bincount(group))


def _rows(drift: Drift, known: np.ndarray, new: np.ndarray, now: int, then: int) -> Iterator[Judged]:
    """Rows of each day that is new or has new rows; of the day that has not ended, up to its time of day."""
    day, clock = known // DAY_US, known % DAY_US
    begin = int(day.min()) + 1  # the first day may have begun before its first row
    judged = np.unique(np.append(day[new], np.arange(then // DAY_US, now // DAY_US + 1)))
    past = np.setdiff1d(np.arange(begin, then // DAY_US), judged)
    if len(past) < drift.days:
        return
    whole = np.bincount(day - begin + 1, minlength=int(judged.max()) - begin + 2)
    so_far = np.bincount(day[clock <= now % DAY_US] - begin + 1, minlength=len(whole))
    for one in judged[judged >= begin]:
        counts = so_far if one == now // DAY_US else whole
        usual = counts[past - begin + 1]
        least, most = np.quantile(np.log1p(usual), [0.05, 0.95])  # by factors; one storm does not make every day possible
        slack = max(2 * drift.tolerance * (most - least), CHANCE / 2 / math.sqrt(max(1.0, usual.mean())))
        low, high = np.expm1([least - slack, most + slack])
        until = f" until {iso(now)[11:16]}" if one == now // DAY_US else ""
        when = iso(int(one) * DAY_US)[:10] + until
        yield Judged("", "rows", float(counts[one - begin + 1]), max(0.0, float(low)), float(high), len(past), when)


def _against(
    drift: Drift, name: str, figure: str, values: np.ndarray, noise: float, rows: np.ndarray
) -> Iterator[Judged]:  # fmt: skip
    """The last value against those before it, of days with enough rows."""
    past = values[:-1][rows[:-1] >= FEW]
    if figure in UPWARD[1:]:
        past = past[len(past) // 2 :]  # at first everything is new
    past = past[np.isfinite(past)]
    if len(past) < drift.days / 2 or not np.isfinite(values[-1]):
        return
    low, high = _bounds(past, drift.tolerance, noise)
    yield Judged(name, figure, float(values[-1]), -math.inf if figure in UPWARD else low, high, len(past))


def _bounds(past: np.ndarray, tolerance: float, noise: float) -> tuple[float, float]:
    low, high = float(past.min()), float(past.max())
    slack = tolerance * (high - low) + noise
    return low - slack, high + slack


def _figures(array: pa.Array, group: np.ndarray, known: np.ndarray) -> Iterator[tuple[str, np.ndarray, float]]:
    """Figure, its value for each group, and what chance does to the last one. Times count as minutes before known-at."""
    groups = int(group.max()) + 1
    there = array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(array.type):
        there &= np.isfinite(filled(array, np.nan))
    rows, valid = np.bincount(group, minlength=groups), np.bincount(group[there], minlength=groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        yield UPWARD[0], 1 - valid / rows, _chance(1 - valid[:-1].sum() / max(1, rows[:-1].sum()), rows[-1])
        group, last = group[there], int(valid[-1])
        if not last:
            return
        if pa.types.is_string(array.type):
            yield from _texts(array.filter(pa.array(there)).dictionary_encode(), group, valid)
            return
        if pa.types.is_timestamp(array.type):
            numbers = (known[there] - _int(array)[there]) / 60e6
        else:
            numbers = np.asarray(filled(array, 0), float)[there]
        noise = CHANCE * float(numbers[group < groups - 1].std()) / math.sqrt(last) if groups > 1 else 0.0
        order = np.lexsort([numbers, group])
        begin = np.cumsum(valid) - valid
        yield "mean", np.bincount(group, weights=numbers, minlength=groups) / valid, noise
        if not pa.types.is_boolean(array.type):
            for words, q in (("5 % quantile", 0.05), ("median", 0.5), ("95 % quantile", 0.95)):
                at = np.minimum(begin + np.floor(q * np.maximum(0, valid - 1)).astype(int), len(order) - 1)
                yield words, np.where(valid > 0, numbers[order][at], np.nan), noise


def _texts(array: pa.DictionaryArray, group: np.ndarray, valid: np.ndarray) -> Iterator[tuple[str, np.ndarray, float]]:
    codes, groups, kinds = array.indices.to_numpy(), len(valid), len(array.dictionary)
    first = np.full(kinds, groups)
    np.minimum.at(first, codes, group)
    unseen = np.bincount(group[first[codes] == group], minlength=groups) / valid
    yield UPWARD[1], unseen, _chance(float(np.nanmean(unseen[groups // 2 : -1])) if groups > 2 else 0.0, int(valid[-1]))
    if kinds <= MIXED:
        counts = np.bincount(group * kinds + codes, minlength=groups * kinds).reshape(groups, kinds)
        before = np.cumsum(counts, axis=0) - counts
        apart = np.abs(counts / valid[:, None] - before / before.sum(1, keepdims=True)).sum(1) / 2
        yield UPWARD[2], apart, CHANCE / 2 * math.sqrt(kinds / (2 * math.pi * int(valid[-1])))


def _chance(share: float, rows: int) -> float:
    """How far a share of so few rows may lie from its mean."""
    share = min(1.0, max(0.0, share))
    return CHANCE * math.sqrt(share * (1 - share) / rows) + CHANCE / rows


def _is_new(source: Source, table: pa.Table, before: pa.Table) -> np.ndarray:
    """Rows whose key and known-at are not in the table before."""
    names, seen = (text_keys([t[c] for c in (*source.key, KNOWN)], t.num_rows) for t in (table, before))
    return ~np.asarray(pc.is_in(names, value_set=seen).to_numpy(zero_copy_only=False), bool)


def _int(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return np.asarray(filled(one_chunk(column).cast(pa.timestamp("us", "UTC")).cast(pa.int64()), 0), np.int64)


def words_of(source: str, judged: Judged) -> tuple[str, str, str]:
    """What a person reads of a figure: the expectation, its limits, and what was found."""
    what = f"the {judged.figure} of {judged.column}" if judged.column else f"the rows of {source} on {judged.when}"
    words = f"{what} must be as {judged.days} past days let expect"
    if math.isinf(judged.low):
        return words, f"at most {judged.high:.4g}", f"{judged.value:.4g} in what is new"
    return words, f"between {judged.low:,.6g} and {judged.high:,.6g}", f"{judged.value:,.6g} in what is new"
