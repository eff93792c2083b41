"""Batch scoring of what can still be asked: every row that the served store knows and no fact has closed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.judge import answer
from deploy.rollout import bento_spec, champion
from features.keys import SEPARATOR
from features.online import OnlineStore, serve_features, served_store
from features.packed import ROWS
from pipelines.clock import MISSING, Clock, iso
from pipelines.errors import MillraceError
from pipelines.home import Home
from pipelines.manifest import write_page
from pipelines.spec import Spec

CHUNK = 1_000


@dataclass(frozen=True)
class Scored:
    """Where the scores lie (home-relative), for how many rows, as of when."""

    pipeline: str
    release: str
    path: str
    rows: int
    line: str


def score_open(home: Home, pipeline: str, *, at: str = "") -> Scored:
    """Scores every open row at the clock's now with the champion; the same instant gives the same file.

    `at`: the server that holds the served store, where that is not the home.

    Raises MillraceError without a champion.
    """
    release = champion(home, pipeline)
    if release is None:
        raise MillraceError(f"{pipeline} has no champion: type `millrace run {pipeline}`")
    spec = bento_spec(home, release)
    store = OnlineStore(spec, served_store(at, pipeline, home.online(pipeline, release.defs_digest)))
    clock = spec.clock
    now = Clock(clock.kind, clock.speed, clock.offset, store.anchor()).now_us() if clock else 0
    known = known_rows(spec, store)
    names, scores = [], []
    for begin in range(0, len(known), CHUNK):
        rows = known[begin : begin + CHUNK]
        served = serve_features(store, rows, now)
        open_rows = np.flatnonzero((served.looked.closed_at > now) & ~served.looked.unknown)
        if spec.predict_at is not None:
            due = served.looked.own[spec.predict_at.column][open_rows]
            open_rows = open_rows[(due != MISSING) & (due - spec.predict_at.lead + spec.predict_at.tolerance >= now)]
        if len(open_rows):
            scores.append(answer(home, release, {n: v[open_rows] for n, v in served.frame.items()}))
            names += [rows[i] for i in open_rows.tolist()]
    found = np.concatenate(scores) if scores else np.zeros(0)
    table = key_table(spec, names).append_column("score", pa.array(found))
    stamp = iso(now).replace(":", "") if spec.timed else "all"
    path = home.root / "scores" / pipeline / release.release.partition(":")[2] / f"{stamp}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    pq.write_table(table, scratch)
    scratch.replace(path)
    line = f"{len(found):,} open rows scored by {release.release}" + (f" at {iso(now)}" if spec.timed else "")
    _page(path, pipeline, line, found)
    return Scored(pipeline, release.release, home.relative(path), len(found), line)


def known_rows(spec: Spec, store: OnlineStore) -> list[dict[str, object]]:
    """The keys of the rows that a served store holds, times as int µs."""
    read: dict[str, Callable[[str], object]] = {"string": str, "bool": "true".__eq__}
    types = {name: read.get(kind, int) for name, kind in _types(spec).items()}

    def row(key: str) -> dict[str, object]:
        return {name: kind(value) for (name, kind), value in zip(types.items(), key.split(SEPARATOR), strict=True)}

    return [row(key) for key in store.cells.keys(ROWS)]


def key_table(spec: Spec, rows: list[dict[str, object]]) -> pa.Table:
    """The key columns of rows, in the spec's types."""
    columns = {name: [row[name] for row in rows] for name in spec.row_key}
    stamps = {name: kind == "timestamp" for name, kind in _types(spec).items()}
    return pa.table({n: pa.array(v, pa.int64()).cast(pa.timestamp("us", "UTC")) if stamps[n] else pa.array(v)
                     for n, v in columns.items()})  # fmt: skip


def _types(spec: Spec) -> dict[str, str]:
    columns = spec.row_source.columns
    return {name: columns[name].type if name in columns else "string" for name in spec.row_key}


def _page(path: Path, pipeline: str, line: str, scores: np.ndarray) -> None:
    shares = [(f"above {edge:.0%}", f"{(scores > edge).sum():,}") for edge in (0.25, 0.5, 0.75)]
    write_page(path.with_suffix(".md"), f"{pipeline}: scores", [(line, shares)])
