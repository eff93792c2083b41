"""Push: facts that are in the served store within a second, each once, and that training sees as well.

An event is a fact with an id. It is kept in the served store in the same transaction as the cells that it changes, so after
any crash it counted once or not at all; `land_pushed` writes what was pushed among the landing files before a run looks at
them, where a fact that arrives there by another way too counts once.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from features.cells import PUSHED, Change, Event, Meta, Update, open_cells, writable_cells
from features.erased import marks, without_erased
from features.facts import int_times
from features.feed import Tables, changed_cells, recent
from features.ingest import (
    ARROW,
    Snapshot,
    extended,
    facts_since,
    grew_from,
    in_order,
    known_at,
    newest,
    read_snapshot,
    read_table,
    write_facts,
)  # fmt: skip
from features.keys import KNOWN, codes_of, key_arrays, one_chunk, rows_among, text_keys
from features.packed import layout_digest
from features.quarantine import own_reasons
from pipelines.clock import MISSING, iso
from pipelines.errors import MillraceError, nearest
from pipelines.home import Home
from pipelines.manifest import digest_of, write_atomic
from pipelines.spec import Source, Spec

MANY = 0.1  # share of new facts from which on a store is written whole


class BadEvent(MillraceError):
    """An event that is not taken, and why."""


@dataclass(frozen=True)
class Receipt:
    """What became of events: how many were taken, those known already by their ids, and which number the last one has."""

    taken: int
    again: int
    last: int
    ids: frozenset[str] = frozenset()  # of those that were taken


class Pusher:
    """Takes events into one served store. One per process; not shared between threads."""

    def __init__(self, spec: Spec, home: Home, store: Path | str) -> None:
        self.spec, self.home, self.cells = spec, home, writable_cells(store)
        self.tables: Tables = {}
        self.at = ("", 0, 0)  # snapshot, number of the last event, and how many erasures, that the tables know of

    def push(self, events: Sequence[Event], now: int) -> Receipt:
        """Takes events whose facts are known by `now` (µs). All or none: raises BadEvent for one that cannot be taken."""
        _refuse(self.spec, self.home, events, now)
        done: list[tuple[Tables, Receipt]] = []

        def decide(held: Meta) -> Update | None:
            self._catch_up(held)
            known = self.cells.seen([event.id for event in events])
            fresh = list({event.id: event for event in events if event.id not in known}.values())
            tables, new = with_events(self.spec, self.tables, fresh)
            self._refuse_dangling(held["snapshot"], tables, new)
            last = int(held.get(PUSHED, 0)) + len(fresh)
            ids = frozenset(event.id for event in fresh)
            done[:] = [(tables, Receipt(len(fresh), len(events) - len(fresh), last, ids))]
            if not fresh:
                return None
            upto = json.loads(held.get("newest", "{}"))
            for source, table in new.items():
                upto[source] = max(upto.get(source, MISSING), newest(table) or MISSING)
            cells = _told(changed_cells(self.spec, tables, new, int(held["data_us"])))
            return Update({"newest": json.dumps(upto)}, cells, whole=False, events=fresh)

        self.cells.feed(decide)
        self.tables, receipt = done[0]
        self.at = (self.at[0], receipt.last, self.at[2])
        return receipt

    def _refuse_dangling(self, snapshot: str, tables: Tables, new: Tables) -> None:
        """Raises BadEvent for a fact that refers to none, where all rows must: a contract would refuse what it lands in."""
        for name, rows in new.items():
            for reference in (r for r in self.spec.sources[name].references if r.share == 1):
                left = _dangling(rows, reference.columns, tables[reference.to])
                if left.num_rows:  # what is old lies in the snapshot alone
                    left = _dangling(left, reference.columns, self._whole(snapshot, reference.to))
                if left.num_rows:
                    lost = {column: str(value) for column, value in left.slice(0, 1).to_pylist()[0].items()}
                    raise BadEvent(
                        f"source {name!r}: no fact of {reference.to!r} has {lost}, which an event refers to: push that first"
                    )

    def _whole(self, snapshot: str, name: str) -> pa.Table:
        return read_table(self.spec, self.home, read_snapshot(self.home, self.spec.pipeline, snapshot), name)

    def _catch_up(self, held: Meta) -> None:
        """Brings the tables to what the store was fed, and to the events of other writers."""
        if not held or held["format"] != layout_digest(self.spec):
            raise MillraceError(f"the served store is not fed: run `millrace run {self.spec.pipeline}`")
        now = (held["snapshot"], int(held.get(PUSHED, 0)), len(marks(self.home, self.spec.pipeline)))
        if self.at == now:
            return
        if (self.at[0], self.at[2]) != (now[0], now[2]):
            snapshot = read_snapshot(self.home, self.spec.pipeline, held["snapshot"])
            whole = {name: read_table(self.spec, self.home, snapshot, name) for name in self.spec.sources}
            self.tables = recent(self.spec, whole, int(held["data_us"]))
        tables = with_events(self.spec, self.tables, self.cells.events())[0]
        self.tables = {name: without_erased(self.home, self.spec.pipeline, table) for name, table in tables.items()}
        self.at = now


def _dangling(rows: pa.Table, columns: Sequence[str], to: pa.Table) -> pa.Table:
    """Rows whose columns, none of them null, are those of no row of `to`; these columns alone."""
    rows = rows.select([*columns]).drop_null()
    there = to.take(pa.array(rows_among(to, columns, rows)))
    asked, known = (text_keys(key_arrays(t, columns), t.num_rows) for t in (rows, there))
    return rows.filter(pa.array(codes_of(asked, one_chunk(known)) < 0))


def _told(cells: Iterable[Change]) -> Iterator[Change]:
    """Cells that are made when they are asked for; what cannot be made of an event is said of it."""
    try:
        yield from cells
    except MillraceError as error:
        raise BadEvent(str(error)) from None


def with_events(spec: Spec, tables: Tables, events: Iterable[Event], *, landed_wins: bool = False) -> tuple[Tables, Tables]:
    """Facts with those of events among them, and the events' facts that were not there (source → rows).

    Raises BadEvent where one contradicts another fact of the same key and known-at, unless such an event is left out.
    """
    found, new = dict(tables), {}
    for name, rows in event_tables(spec, events).items():
        source, before = spec.sources[name], tables[name]
        if landed_wins:  # the same fact, or one that landed after the event came and says otherwise
            there, asked = (text_keys(key_arrays(t, [*source.key, KNOWN]), t.num_rows) for t in (before, rows))
            rows = rows.filter(pa.array(codes_of(asked, one_chunk(there)) < 0))
        table, order, equal, clash = in_order(pa.concat_tables([before, rows.select(before.column_names)]), source)
        if clash.any():
            at = int(np.flatnonzero(clash)[0])
            key = {k: str(table[k][at]) for k in source.key}
            raise BadEvent(
                f"source {name!r}: {key} known at {table[KNOWN][at]} is there with other values: "
                "a correction needs a later known-at"
            )
        found[name] = table.filter(pa.array(~equal)).combine_chunks()
        fresh = table.filter(pa.array(~equal & (order >= before.num_rows)))
        if fresh.num_rows:
            new[name] = fresh.combine_chunks()
    return found, new


def event_tables(spec: Spec, events: Iterable[Event]) -> dict[str, pa.Table]:
    """The facts of events by source, as `read_table` gives them but in the order of the events."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        rows.setdefault(event.source, []).append(json.loads(event.row))
    return {name: _table(spec.sources[name], listed) for name, listed in rows.items() if name in spec.sources}


def known_times(spec: Spec, events: Sequence[Event]) -> np.ndarray:
    """When the fact of each event became known, µs (N)."""
    found = np.empty(len(events), np.int64)
    for name in {event.source for event in events}:
        at = [i for i, event in enumerate(events) if event.source == name]
        found[at] = int_times(event_tables(spec, [events[i] for i in at])[name][KNOWN])
    return found


def _table(source: Source, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = {}
    for name, column in sorted(source.columns.items()):
        kind = pa.int64() if column.type == "timestamp" else ARROW[column.type]
        columns[name] = pa.array([row.get(name) for row in rows], kind).cast(ARROW[column.type])
    table = pa.table(columns)
    return table.append_column(KNOWN, known_at(table, source, 0))


def _refuse(spec: Spec, home: Home, events: Sequence[Event], now: int) -> None:
    """Raises BadEvent for what the contract would refuse row by row, for facts from the future, and for what was erased."""
    by_source: dict[str, list[Event]] = {}
    for event in events:
        source = spec.sources.get(event.source)
        if source is None:
            raise BadEvent(f"event {event.id!r}: source {event.source!r} is not one of {', '.join(spec.sources)}")
        if source.known_at is None or source.known_at.arrival:
            raise BadEvent(f"event {event.id!r}: source {event.source!r} has no known_at column or lag: land its files instead")
        if unknown := sorted(json.loads(event.row).keys() - source.columns.keys()):
            near = nearest(unknown[0], [*source.columns])
            raise BadEvent(f"event {event.id!r}: source {event.source!r} has no column {unknown[0]!r}{near}")
        by_source.setdefault(event.source, []).append(event)
    for name, table in event_tables(spec, events).items():
        listed = by_source[name]
        for (rule, column), wrong in own_reasons(spec.sources[name], table):
            if rule != "key" and wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                found = {c: json.loads(listed[at].row).get(c) for c in column.split(", ") if c in table.column_names}
                raise BadEvent(f"event {listed[at].id!r} breaks a rule of its source ({rule}: {column}): {json.dumps(found)}")
        known = int_times(table[KNOWN])
        if (known > now).any():
            at = int(known.argmax())
            when = f"known at {iso(int(known[at]))}, and now it is {iso(now)}"
            raise BadEvent(f"event {listed[at].id!r} is from the future: {when}")
        if without_erased(home, spec.pipeline, table).num_rows < table.num_rows:
            raise BadEvent(f"source {name!r}: an event is about an entity that was erased")


def pushed_events(stores: Iterable[Path | str]) -> list[Event]:
    """The events that are kept in some served stores, each once, in the order in which they came."""
    found: dict[str, Event] = {}
    for store in stores:
        found |= {event.id: event for event in open_cells(store).events() if event.id not in found}
    return sorted(found.values(), key=lambda event: event.wall_us)


def snapshot_with(spec: Spec, home: Home, snapshot: Snapshot, events: Sequence[Event]) -> Snapshot:
    """A snapshot that knows the facts of events too; the same one where it knows them already."""
    tables = {name: read_table(spec, home, snapshot, name) for name in {event.source for event in events} & spec.sources.keys()}
    _, new = with_events(spec, tables, [event for event in events if event.source in tables])
    if not new:
        return snapshot
    return extended(home, snapshot, {name: table.drop_columns([KNOWN]) for name, table in new.items()})


def land_pushed(spec: Spec, home: Home, events: Sequence[Event]) -> int:
    """Writes the facts of events that were not landed yet among the landing files; how many. Repeating it lands none."""
    index = home.landing(spec.pipeline) / ".pushed"
    done = set(index.read_text().split("\n")) if index.exists() else set()
    fresh = [event for event in events if digest_of(event.id) not in done and event.source in spec.sources]
    for name, table in event_tables(spec, fresh).items():
        ids = digest_of(sorted(event.id for event in fresh if event.source == name))
        path = home.landing(spec.pipeline) / name / f"pushed-{fresh[0].wall_us}-{ids[:12]}.parquet"
        write_facts(table.drop_columns([KNOWN]), path)  # the same events again get the same name
    if fresh:
        write_atomic(index, "\n".join(sorted(digest_of(event.id) for event in events)))
    return len(fresh)


@dataclass
class Delivery:
    """The facts that a snapshot brings to served stores, right from `since_us` on, with what was pushed into any of them.

    Read when they are asked for: a store that is written whole needs them only where something was pushed.
    """

    spec: Spec
    home: Home
    snapshot: Snapshot
    since_us: int
    stores: Sequence[Path | str]

    @cached_property
    def tables(self) -> Tables:
        return {name: read_table(self.spec, self.home, self.snapshot, name) for name in self.spec.sources}

    @property
    def newest(self) -> dict[str, int]:
        """Known-at of the newest fact by source, µs."""
        return {name: us for name, table in self.tables.items() if (us := newest(table)) is not None}

    def read_since(self, old: Snapshot) -> bool:
        """Looks up what is new since a snapshot that a store holds; False where it lacks facts of that, or brings many."""
        if not grew_from(self.home, self.snapshot, old):
            return False
        self.new = {name: facts_since(self.spec, self.home, self.snapshot, old, name, t) for name, t in self.tables.items()}
        return sum(table.num_rows for table in self.new.values()) <= MANY * sum(self.snapshot.rows.values())

    def pushed(self) -> tuple[Sequence[Event], Iterable[Change]]:
        """Pushed events, and the cells that those of them change which the snapshot lacks."""
        events = pushed_events(self.stores)
        if not events:
            return (), ()
        tables, new = with_events(self.spec, self.tables, events, landed_wins=True)
        return events, changed_cells(self.spec, tables, new, self.since_us)

    def fresh(self) -> tuple[Sequence[Event], Iterable[Change]]:
        """Pushed events, and the cells that change with them and with what is new since the snapshot of `read_since`."""
        events = pushed_events(self.stores)
        tables, new = with_events(self.spec, self.tables, events, landed_wins=True)
        both = [pa.concat_tables([t.select(self.tables[n].column_names) for t in (self.new[n], new.get(n)) if t is not None])
                for n in self.spec.sources]  # fmt: skip
        return events, changed_cells(self.spec, tables, dict(zip(self.spec.sources, both, strict=True)), self.since_us)
