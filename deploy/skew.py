"""The skew check: logged answers against what training computes for them, cell by cell.

Each answer is recomputed with the spec in the bento of the release that gave it, as known at its clock's now, from the
snapshot that the served store held then. A cell that differs is *skewed*: serving and training disagree. From the newest
snapshot it is computed once more: a cell that changes is *late*, because a fact known by then landed after the feed.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deploy.rollout import bento_folder, bento_spec, find_release, take_in
from features.cells import Event, open_cells, place_of
from features.facts import Columns, int_times
from features.frame import as_array, feature_list
from features.ingest import read_snapshot
from features.online import served_store
from features.push import known_times, snapshot_with
from features.skew import Asked, different, known_features
from features.store import defs_digest
from pipelines.clock import DAY_US, NEVER, iso, parse_time
from pipelines.errors import MillraceError, Refused
from pipelines.home import Home
from pipelines.predlog import FEATURE, newest_hour, read_log
from pipelines.spec import Spec

ROWS = 1_000
STATES = 20  # of a store that events are pushed into: each is built anew to be compared
SAMPLES = 5
UNNAMED = "no snapshot named: the store was down, fields that were given are not logged, or an older log"


@dataclass(frozen=True)
class Skew:
    """What was compared (`answers` × features = `cells`), what differs by view and feature, and samples of it.

    `late_cells`: cells that facts which landed after the feed would have changed; None where landing is refused now.
    `unchecked`: reason → answers that could not be recomputed.
    """

    pipeline: str
    answers: int
    since: str
    until: str
    cells: int
    skewed_cells: int
    late_cells: int | None
    by_view: dict[str, int]
    by_feature: dict[str, int]
    late_by_view: dict[str, int]
    samples: tuple[dict[str, Any], ...]
    unchecked: dict[str, int]
    line: str


def check_skew(
    home: Home, pipeline: str, *, since: int | None = None, until: int | None = None, rows: int = ROWS,
    release: str | None = None,
) -> Skew:  # fmt: skip
    """Compares up to `rows` logged answers, spread evenly over since ≤ clock ≤ until (µs); by default the last day of them.

    Raises MillraceError where nothing is logged then, or can be recomputed; for an unknown release; for a broken log.
    """
    return compare(home, pipeline, choose(home, pipeline, since, until, rows, release))


def choose(
    home: Home, pipeline: str, since: int | None, until: int | None, rows: int, release: str | None
) -> pa.Table:  # fmt: skip
    """The logged answers to compare, in order of time."""
    root = home.predictions(pipeline)
    newest = newest_hour(root)
    if newest is None:
        raise MillraceError(
            f"no predictions of {pipeline} are logged yet: type `millrace serve {pipeline}` and ask its /predict, then try again"
        )
    until = NEVER if until is None else until
    since = min(newest, until) - DAY_US if since is None else since
    log = read_log(root, since=since, until=until)
    asked = pc.equal(log["route"], "predict")
    log = log.filter(asked if release is None else pc.and_(asked, pc.equal(log["release"], release)))
    if not log.num_rows:
        span = f"since {iso(since)}" + (f" until {iso(until)}" if until < NEVER else "")
        raise MillraceError(
            f"no answers of {pipeline} to named rows are logged {span} (the newest hour with predictions is {iso(newest)}): "
            "choose another time with --since and --until"
        )
    log = log.sort_by([("clock", "ascending"), ("request_id", "ascending"), ("row", "ascending")])
    return log.take(pa.array(np.unique(np.linspace(0, log.num_rows - 1, rows).astype(np.int64)))).combine_chunks()


def compare(home: Home, pipeline: str, log: pa.Table) -> Skew:
    """Compares answers of the log, whichever releases gave them."""
    unchecked: Counter[str] = Counter()
    found = [
        _of_release(home, pipeline, name, log.filter(pc.equal(log["release"], name)), unchecked)
        for name in log["release"].unique().to_pylist()
    ]
    answers = sum(one.log.num_rows for one in found)
    if not answers:
        raise MillraceError(f"none of the {log.num_rows:,} logged answers can be compared: {_counted(unchecked)}")
    skewed, late, views, late_views = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for one in found:
        for feature, group in one.features.items():
            skewed[feature] += (wrong := int(one.skewed[feature].sum()))
            views[group] += wrong
            late[feature] += (moved := int(one.late[feature].sum()) if one.late else 0)
            late_views[group] += moved
    cells = sum(one.log.num_rows * len(one.features) for one in found)
    known = all(one.late is not None for one in found)
    line = f"{cells:,} cells of {answers:,} answers compared, {skewed.total():,} skewed; "
    line += f"facts that landed later change {late.total():,}" if known else "whether facts landed later is not known"
    line += f"; not compared: {_counted(unchecked)}" if unchecked.total() else ""
    clock = int_times(log["clock"])
    return Skew(pipeline, answers, iso(int(clock[0])), iso(int(clock[-1])), cells, skewed.total(),
                late.total() if known else None, _most(views), _most(skewed), _most(late_views),
                tuple(sample for one in found for sample in one.samples())[:SAMPLES], dict(+unchecked), line)  # fmt: skip


@dataclass(frozen=True)
class _Compared:
    """Answers of one release (N), and where their cells (bool, N) are skewed or late; `features`: name → view."""

    log: pa.Table
    features: dict[str, str]
    served: Columns
    offline: Columns
    skewed: Columns
    late: Columns | None

    def samples(self) -> Iterator[dict[str, Any]]:
        """For each of the most skewed features the first answer that shows it."""
        for name in _most(Counter({name: int(wrong.sum()) for name, wrong in self.skewed.items()})):
            i = int(np.flatnonzero(self.skewed[name])[0])
            row = self.log.slice(i, 1).to_pylist()[0]
            yield {
                "request_id": row["request_id"], "row": row["row"], "key": json.loads(row["key"]),
                "at": iso(int(int_times(self.log["clock"])[i])), "release": row["release"], "view": self.features[name],
                "feature": name, "served": _shown(self.served[name][i]), "offline": _shown(self.offline[name][i]),
            }  # fmt: skip


def _of_release(home: Home, pipeline: str, name: str, log: pa.Table, unchecked: Counter[str]) -> _Compared:
    """Answers of one release. Those that cannot be recomputed are counted by reason in `unchecked`."""
    release = find_release(home, pipeline, name)
    if not (bento_folder(home, release) / "src/bundle/spec.json").is_file():
        raise MillraceError(f"the bento of {name} is not in the home: what its features mean is not known without it")
    spec = bento_spec(home, release)
    features = {f.name: f.group for f in feature_list(spec) if spec.serve.shown(f.name)}
    lacking = [f for f in features if FEATURE + f not in log.column_names]
    if lacking:
        raise MillraceError(
            f"the prediction log has no {', '.join(lacking[:3])} of {name}: its endpoint ran another version of Millrace; "
            "check that version out, or choose another time with --since and --until"
        )
    parts = [log.slice(0, 0)]
    frames: list[Columns] = [{f.name: np.zeros(0, np.float64 if f.kind == "number" else object) for f in feature_list(spec)}]
    for digest in log["snapshot"].unique().to_pylist():
        part = log.filter(pc.is_null(log["snapshot"]) if digest is None else pc.equal(log["snapshot"], digest))
        if digest is None or not (home.snapshots(pipeline) / f"{digest}.json").is_file():
            gone = f"snapshot {digest[:12]} is not in the home" if digest else ""
            unchecked[gone or UNNAMED] += part.num_rows
            continue
        snapshot = read_snapshot(home, pipeline, digest)
        for events, some in _by_pushed(spec, home, part, unchecked):
            then = snapshot_with(spec, home, snapshot, events)
            known = known_features(spec, home, then, requests(spec, some), _times(spec, some))
            unchecked["rows older than the served store keeps"] += int((~known.kept).sum())
            parts.append(some.filter(pa.array(known.kept)))
            frames.append({f: values[known.kept] for f, values in known.frame.items()})
    log = pa.concat_tables(parts).combine_chunks()
    offline = {f: np.concatenate([frame[f] for frame in frames]) for f in features}
    served = {f: as_array(log[FEATURE + f], "string" if offline[f].dtype == object else "float64") for f in features}
    return _Compared(log, features, served, offline, different(served, offline), _late(spec, home, log, offline))


def _by_pushed(
    spec: Spec, home: Home, log: pa.Table, unchecked: Counter[str]
) -> Iterator[tuple[list[Event], pa.Table]]:  # fmt: skip
    """Answers of one snapshot by the pushed events that the store held too. Of more than STATES states some are compared."""
    number = pc.fill_null(log["pushed"], 0).to_numpy() if "pushed" in log.column_names else np.zeros(log.num_rows, np.int64)
    if not number.any():
        yield [], log
        return
    store = served_store(spec.serve.store, spec.pipeline, home.online(spec.pipeline, defs_digest(spec)))
    events = [event for event in open_cells(store).events(int(number.max())) if event.source in spec.sources]
    if not events or events[-1].number < number.max():
        unchecked[f"pushed events that {place_of(store)} does not hold"] += log.num_rows
        return
    numbers, known = np.array([event.number for event in events]), known_times(spec, events)
    # no later event was known by then: the state with all events says the same
    later = np.append(np.minimum.accumulate(known[::-1])[::-1], NEVER)[np.searchsorted(numbers, number, side="right")]
    state = np.where(later > _times(spec, log), number.max(), number)
    states = np.unique(state)
    for one in states[np.unique(np.linspace(0, len(states) - 1, STATES).astype(np.int64))].tolist():
        yield [event for event in events if event.number <= one], log.filter(pa.array(state == one))
        state[state == one] = -1
    unchecked["answers between other pushes"] += int((state >= 0).sum())


def _late(spec: Spec, home: Home, log: pa.Table, offline: Columns) -> Columns | None:
    """Where cells change with what landed since, None where the landing is refused now."""
    try:
        newest = take_in(spec, home)
    except Refused:
        return None
    if log["snapshot"].unique().to_pylist() in ([], [newest.digest]):
        return {name: np.zeros(log.num_rows, bool) for name in offline}
    return different(offline, known_features(spec, home, newest, requests(spec, log), _times(spec, log)).frame)


def requests(spec: Spec, log: pa.Table) -> Asked:
    """The rows that were asked for, as the endpoint parsed them (timestamps as int µs)."""
    stamps = [c for c, column in spec.row_source.columns.items() if column.type == "timestamp"]
    found = []
    for key, given in zip(log["key"].to_pylist(), log["request"].to_pylist(), strict=True):
        row = {**json.loads(given), **json.loads(key)}
        found.append(row | {c: parse_time(row[c]) for c in stamps if row.get(c) is not None})
    return found


def _times(spec: Spec, log: pa.Table) -> np.ndarray:
    return int_times(log["clock"]) if spec.timed else np.zeros(log.num_rows, np.int64)


def _most(counts: Counter[str]) -> dict[str, int]:
    return dict((+counts).most_common())


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count:,} ({reason})" for reason, count in (+reasons).items())


def _shown(value: Any) -> str | float | None:
    """A cell as JSON can hold it: null where missing."""
    if value is None or value != value:
        return None
    return value if isinstance(value, str) else float(value) if np.isfinite(value) else str(value)
