"""Where the packed rows of a served store lie: SQLite in the home, Redis or Postgres. One value per view and key.

A feed replaces everything at once, and readers see the state before or after it, never between; of two feeds at once the
second sees what the first has written. Views whose names begin with `feast:` are Feast's own: `put` writes them key by
key, and a feed leaves them alone.
"""

import json
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from pipelines.clock import DAY_US, NEVER, wall_us
from pipelines.errors import MillraceError

T = TypeVar("T")
Meta = dict[str, str]
Change = tuple[str, str, bytes | None]  # view, key, packed rows; None: the key is gone
Newer = Callable[[bytes, bytes], bool]  # whether packed rows may replace what is held
FEAST = "feast:"
FEW = 4_000  # keys that SQLite is asked for in one statement
LAST = NEVER  # a number that no event has
KEPT_US = 30 * DAY_US  # how long a pushed event is kept, and its id known
COPIES = 5  # attempts to copy a store in one state
WAIT_S = 30.0  # for an answer of a server
LONG_S = 600.0  # for a statement of Postgres that may go through the whole store, or wait for another writer
PAUSE_S = 0.005  # at most, of a writer to a server
PUSHED = "pushed"  # in the meta: number of the last event that the cells know


@dataclass(frozen=True)
class Event:
    """A pushed fact: the name under which it counts once, its source, its row as JSON, when it came (wall µs); and its
    number in the store, from 1."""

    id: str
    source: str
    row: str
    wall_us: int
    number: int = 0


@dataclass(frozen=True)
class Update:
    """What a feed writes at once: cells (`whole`: instead of all that were there), what it says of itself, and events."""

    meta: Meta
    cells: Iterable[Change]
    whole: bool = True
    events: Sequence[Event] = ()


Decide = Callable[[Meta], Update | None]  # from what is there: what is written, or None


class StoreDown(MillraceError):
    """The server that holds the served store does not answer."""

    def __init__(self, place: str, error: Exception) -> None:
        super().__init__(f"the served store at {place} does not answer ({str(error).strip()[:120]}); start it")


class Moved(Exception):
    """The store was fed while it was read: what was read before is of another state. Read again."""


class Held(Protocol):
    """What one served store holds."""

    def meta(self) -> Meta:
        """What the last feed wrote about itself; empty before the first."""

    def reading(self) -> AbstractContextManager[None]:
        """One state of the store for all that `meta` and `get` give inside; they raise Moved where a server has moved on."""

    def get(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, bytes]]:
        """For each view and its keys the packed rows of those keys that are there. On a server one round trip."""

    def keys(self, view: str) -> list[str]:
        """Every key of a view, in order."""

    def events(self, until: int | None = None) -> list[Event]:
        """The pushed events that are kept, in the order in which they were numbered, up to that number."""


class Cells(Held, Protocol):
    """One served store, to be written too."""

    def feed(self, decide: Decide) -> bool:
        """Writes what `decide` gives, in one transaction that it is called in; False where that is None.

        Events whose id is held are left out; the others are numbered, the last number is in the meta.
        """

    def seen(self, ids: Sequence[str]) -> set[str]:
        """Which of these events are held."""

    def put(self, view: str, packed: dict[str, bytes], newer: Newer) -> None:
        """Writes keys of a view of Feast's: those that are not held, and those that may replace what is."""

    def drop(self, view: str) -> None:
        """Removes a view of Feast's."""

    def purge(self, ids: Sequence[str]) -> None:
        """Removes these events, all views of Feast's, and what deleted rows have left behind."""


class NoCells:
    """Nothing but what was known of a store when it was read last; nothing at all where there is none."""

    def __init__(self, last: Meta) -> None:
        self.last = last

    def meta(self) -> Meta:
        return self.last

    @contextmanager
    def reading(self) -> Iterator[None]:
        yield

    def get(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, bytes]]:
        return [{} for _ in wanted]

    def keys(self, view: str) -> list[str]:
        return []

    def events(self, until: int | None = None) -> list[Event]:
        return []


def open_cells(store: Path | str, *, wait_s: float = WAIT_S) -> Held:
    """What a store holds, for a reader. Folders and URLs are as in `writable_cells`; `wait_s`: for a server's answer."""
    folder = _folder(store)
    if folder is None:
        return _remote(str(store), wait_s)
    return SqliteCells(folder, write=False) if (folder / SqliteCells.FILE).exists() else NoCells({})


def writable_cells(store: Path | str, *, durable: bool = True) -> Cells:
    """The cells in a folder, or behind a URL that ends in `#NAME`; $NAMES in a URL are taken from the environment.

    Not `durable`: a file may lose what was written last with the power, as a whole; it can be fed again.
    """
    folder = _folder(store)
    return _remote(str(store)) if folder is None else SqliteCells(folder, write=True, durable=durable)


def copy_cells(store: Path | str, folder: Path, views: Sequence[str]) -> None:
    """Fills a new folder with a copy of a store in one state of it: what these views and the meta hold.

    Raises MillraceError where a server's store is fed again and again meanwhile.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    held = open_cells(store)
    if isinstance(held, SqliteCells):
        held.db.execute("VACUUM INTO ?", (str(folder / SqliteCells.FILE),))
        return
    new = SqliteCells(folder, write=True, durable=False)
    for _ in range(COPIES):
        with suppress(Moved), held.reading(), new._writing():
            for view in views:
                for keys in _batches(held.keys(view)):
                    new.db.executemany("INSERT INTO cells VALUES (?, ?, ?)",
                                       ((view, *cell) for cell in held.get([(view, keys)])[0].items()))  # fmt: skip
            new.db.executemany("INSERT INTO meta VALUES (?, ?)", held.meta().items())
            return
    raise MillraceError(f"{place_of(store)} was fed {COPIES} times while it was copied: try again when less is pushed")


def place_of(store: Path | str) -> str:
    """A store as a message names it: without user and password."""
    if _folder(store) is not None:
        return str(store)
    at = urlsplit(str(store))
    return f"{at.scheme}://{at.hostname or ''}{f':{at.port}' if at.port else ''}{at.path}"


def _folder(store: Path | str) -> Path | None:
    return None if "://" in str(store) else Path(store)


def _remote(store: str, wait_s: float = WAIT_S) -> Cells:
    url, _, name = os.path.expandvars(store).rpartition("#")
    return RedisCells(url, name, wait_s) if url.startswith("redis") else PostgresCells(url, name, wait_s)


@contextmanager
def cleared(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """What is deleted from a SQLite file inside leaves no byte in it or its log. Raises MillraceError while another uses it."""
    try:
        db.execute("PRAGMA secure_delete = ON")
        yield
        db.execute("VACUUM")
        ((busy, _, _),) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if busy:
            raise sqlite3.OperationalError("the log is locked by a reader")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        raise MillraceError(f"{path} is in use by another process, and may still hold what was deleted: try again") from None


class SqliteCells:
    """A file in a folder. Not shared between threads."""

    FILE = "store.sqlite"
    WAIT_S = 60  # for another writer, or for readers of what is to be deleted

    def __init__(self, folder: Path, *, write: bool, durable: bool = True) -> None:
        path = self.path = folder / self.FILE
        self.pinned: list[Meta] | None = None  # within one state of the store what it says of itself, once it was asked
        if not write:
            self.db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10, check_same_thread=False)
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # whole or not there: a reader cannot mend what a killed writer leaves
            scratch = folder / f".{self.FILE}.{uuid.uuid4().hex}"
            self._made(scratch).close()
            with suppress(FileExistsError):
                os.link(scratch, path)
            scratch.unlink()
        self.db = self._made(path)
        if not durable:
            self.db.execute("PRAGMA synchronous = NORMAL")

    def __del__(self) -> None:
        """Lets go of the file at once: a connection is in a cycle with its statements, and would live until the next gc."""
        with suppress(AttributeError):  # it was never opened
            self.db.close()

    @classmethod
    def _made(cls, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=cls.WAIT_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        for table in ("cells (view TEXT, key TEXT, packed BLOB, PRIMARY KEY (view, key)) WITHOUT ROWID",
                      "events (number INTEGER PRIMARY KEY, id TEXT UNIQUE, source TEXT, row TEXT, wall_us INTEGER)",
                      "meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID"):  # fmt: skip
            db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        return db

    def has(self, table: str) -> bool:
        """Whether the file has a table: those of older versions lack some."""
        return bool(self.db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchall())

    def meta(self) -> Meta:
        if self.pinned:
            return self.pinned[0]
        found = dict(self.db.execute("SELECT name, value FROM meta").fetchall())
        if self.pinned is not None:
            self.pinned.append(found)
        return found

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.db.execute("BEGIN")
        self.pinned = []
        try:
            yield
        finally:
            self.pinned = None
            self.db.execute("ROLLBACK")

    def get(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, bytes]]:
        if len(wanted) > 1 and 0 < (count := sum(len(keys) for _, keys in wanted)) <= FEW:
            return self._get_few(wanted, count)
        found: list[dict[str, bytes]] = []
        for view, keys in wanted:
            found.append({})
            for begin in range(0, len(keys), 10_000):  # SQLite takes 32,766 at once
                some = keys[begin : begin + 10_000]
                query = f"SELECT key, packed FROM cells WHERE view = ? AND key IN ({','.join('?' * len(some))})"
                found[-1].update(self.db.execute(query, (view, *some)).fetchall())
        return found

    def _get_few(self, wanted: Sequence[tuple[str, Sequence[str]]], count: int) -> list[dict[str, bytes]]:
        """All in one statement: for one row it costs half of one for each view."""
        asked = ",".join(["(?, ?)"] * count)  # joined in this order: each is looked up by the table's own key
        query = f"SELECT view, key, packed FROM (VALUES {asked}) CROSS JOIN cells ON view = column1 AND key = column2"
        given = [value for view, keys in wanted for key in keys for value in (view, key)]
        found: dict[str, dict[str, bytes]] = {view: {} for view, _ in wanted}
        for view, key, packed in self.db.execute(query, given):
            found[view][key] = packed
        return [found[view] for view, _ in wanted]

    def keys(self, view: str) -> list[str]:
        return [key for (key,) in self.db.execute("SELECT key FROM cells WHERE view = ? ORDER BY key", (view,))]

    def events(self, until: int | None = None) -> list[Event]:
        query = "SELECT id, source, row, wall_us, number FROM events WHERE number <= ? ORDER BY number"
        return [Event(*row) for row in self.db.execute(query, (LAST if until is None else until,))] if self.has("events") else []

    def seen(self, ids: Sequence[str]) -> set[str]:
        query = "SELECT id FROM events WHERE id IN (SELECT value FROM json_each(?))"
        return {i for (i,) in self.db.execute(query, (json.dumps(ids),))} if ids else set()

    def feed(self, decide: Decide) -> bool:
        with self._writing():
            held = self.meta()
            new = decide(held)
            if new is None:
                return False
            if new.whole:
                self.db.execute("DELETE FROM cells WHERE view NOT LIKE ?", (f"{FEAST}%",))
            for some in _batches(new.cells):
                self.db.executemany("DELETE FROM cells WHERE view = ? AND key = ?", [c[:2] for c in some if c[2] is None])
                self.db.executemany("INSERT OR REPLACE INTO cells VALUES (?, ?, ?)", [c for c in some if c[2] is not None])
            fresh, meta = _numbered(new, held, self.seen([e.id for e in new.events]))
            rows = [(e.number, e.id, e.source, e.row, e.wall_us) for e in fresh]
            self.db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
            self.db.execute("DELETE FROM events WHERE wall_us < ?", (wall_us() - KEPT_US,))
            self.db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())
            return True

    def put(self, view: str, packed: dict[str, bytes], newer: Newer) -> None:
        with self._writing():
            new = _newer(self.get([(view, [*packed])])[0], packed, newer)
            self.db.executemany("INSERT OR REPLACE INTO cells VALUES (?, ?, ?)", ((view, k, b) for k, b in new.items()))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction that no other writer is in."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        finally:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")

    def drop(self, view: str) -> None:
        self.db.execute("DELETE FROM cells WHERE view = ?", (view,))

    def purge(self, ids: Sequence[str]) -> None:
        with cleared(self.db, self.path):
            self.db.execute("DELETE FROM cells WHERE view LIKE ?", (f"{FEAST}%",))
            self.db.execute("DELETE FROM events WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(ids),))


class RedisCells:
    """Hashes of one generation, named by the meta hash; a feed writes the next generation and moves the name."""

    HELD_S = 3_600  # an unfinished generation ends by itself
    LOCK_S = 30  # after which a writer that was killed keeps others out no longer
    LOOK = """
        local meta = redis.call('HGETALL', KEYS[1] .. ':meta')
        local generation, found, at = redis.call('HGET', KEYS[1] .. ':meta', 'generation') or '', {meta}, 1
        while at <= #ARGV do
            local view, last, values = ARGV[at], at + 1 + tonumber(ARGV[at + 1]), {}
            local hash = KEYS[1] .. (string.sub(view, 1, #'feast:') == 'feast:' and ':' or ':' .. generation .. ':') .. view
            for i = at + 2, last, 5000 do
                for _, value in ipairs(redis.call('HMGET', hash, unpack(ARGV, i, math.min(i + 4999, last)))) do
                    values[#values + 1] = value
                end
            end
            found[#found + 1], at = values, last + 1
        end
        return found
    """

    def __init__(self, url: str, name: str, wait_s: float = WAIT_S) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        again = {} if wait_s == WAIT_S else {"retry": Retry(NoBackoff(), 1, (redis.exceptions.ConnectionError,))}
        self.errors: Any = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
        self.lost: Any = redis.exceptions.LockError
        self.name, self.place = f"millrace:{name}", place_of(url)
        self.db: Any = redis.Redis.from_url(url, socket_timeout=wait_s, socket_connect_timeout=min(5.0, wait_s), **again)
        self.look: Any = self.db.register_script(self.LOOK)
        self.lost_look: Any = (redis.exceptions.ConnectionError, redis.exceptions.NoScriptError)
        self.line: Any = None  # a connection that is kept for looks: the client tries one out before each command
        self.state = _State()

    def meta(self) -> Meta:
        if self.state.pinned is None:
            with self._answering():
                self.state.see(_texts(self.db.hgetall(f"{self.name}:meta")))
        return self.state.meta

    def reading(self) -> AbstractContextManager[None]:
        return self.state.reading()

    def events(self, until: int | None = None) -> list[Event]:
        with self._answering():
            found = self.db.zrangebyscore(f"{self.name}:events", 0, "+inf" if until is None else until, withscores=True)
        return [replace(Event(*json.loads(event)), number=int(number)) for event, number in found]

    def seen(self, ids: Sequence[str]) -> set[str]:
        with self._answering():
            held = self.db.hmget(f"{self.name}:ids", ids) if ids else []
        return {i for i, number in zip(ids, held, strict=True) if number is not None}

    def get(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, bytes]]:
        asked = [word for view, keys in wanted for word in (view, len(keys), *keys)]
        with self._answering():
            meta, *answers = self._looked(asked)
        self.state.see(_texts(dict(zip(meta[::2], meta[1::2], strict=True))))
        found = zip(wanted, answers, strict=True)
        return [{k: v for k, v in zip(keys, values, strict=True) if v is not None} for (_, keys), values in found]

    def _looked(self, asked: Sequence[Any]) -> Any:
        """What the script answers. A line that fails is given up, and the client asks, with its own retries."""
        if self.line is not None:
            try:
                self.line.send_command("EVALSHA", self.look.sha, 1, self.name, *asked)
                return self.line.read_response()
            except self.lost_look:
                self.db.connection_pool.release(self.line)
                self.line = None
        found = self.look(keys=[self.name], args=asked)
        self.line = self.db.connection_pool.get_connection()
        return found

    def keys(self, view: str) -> list[str]:
        with self._answering():
            return sorted(k.decode() for k in self.db.hkeys(self._hash(self.meta(), view)))

    def feed(self, decide: Decide) -> bool:
        with self._writing():
            old = self.meta()
            new = decide(old)
            if new is None:
                return False
            fresh, meta = _numbered(new, old, self.seen([e.id for e in new.events]))
            if new.whole:
                meta |= self._next_generation(new.cells)
            with self.db.pipeline(transaction=True) as pipe:
                if new.whole:
                    for view in meta["views"].split():
                        pipe.persist(self._hash(meta, view))
                    for view in old.get("views", "").split():
                        pipe.expire(self._hash(old, view), 60)
                else:
                    changes = list(new.cells)
                    for view, key, packed in changes:
                        where = self._hash(old, view)
                        _ = pipe.hdel(where, key) if packed is None else pipe.hset(where, key, packed)
                    meta["views"] = " ".join(sorted({*old.get("views", "").split(), *(view for view, _, _ in changes)}))
                for e in fresh:
                    pipe.hset(f"{self.name}:ids", e.id, e.number)
                    pipe.zadd(f"{self.name}:events", {json.dumps([e.id, e.source, e.row, e.wall_us]): e.number})
                pipe.hset(f"{self.name}:meta", mapping=meta)
                pipe.execute()
            self._forget()
            return True

    def _next_generation(self, cells: Iterable[Change]) -> Meta:
        """Writes cells where no reader looks yet."""
        generation: Meta = {"generation": uuid.uuid4().hex}
        views = set()
        for some in _giving_way(cells):
            with self.db.pipeline(transaction=False) as pipe:
                for view, key, packed in some:
                    where = self._hash(generation, view)
                    pipe.hset(where, key, packed)
                    if view not in views:
                        views.add(view)
                        pipe.expire(where, self.HELD_S)
                pipe.execute()
        return {**generation, "views": " ".join(sorted(views))}

    def _forget(self) -> None:
        """Removes events that were kept long enough."""
        with self.db.pipeline(transaction=True) as pipe:
            for event in self.db.zrange(f"{self.name}:events", 0, 1_000):
                if json.loads(event)[3] < wall_us() - KEPT_US:
                    pipe.zrem(f"{self.name}:events", event)
                    pipe.hdel(f"{self.name}:ids", json.loads(event)[0])
            pipe.execute()

    def put(self, view: str, packed: dict[str, bytes], newer: Newer) -> None:
        with self._writing():
            if new := _newer(self.get([(view, [*packed])])[0], packed, newer):
                self.db.hset(self._hash({}, view), mapping=new)

    def drop(self, view: str) -> None:
        with self._answering():
            self.db.delete(self._hash({}, view))

    def purge(self, ids: Sequence[str]) -> None:
        meta, gone = self.meta(), set(ids)
        with self._answering():
            held = {self._hash(meta, view) for view in meta.get("views", "").split()}
            held |= {f"{self.name}:{own}" for own in ("meta", "lock", "events", "ids")}
            for name in self.db.scan_iter(f"{self.name}:*"):
                if name.decode() not in held:
                    self.db.delete(name)
            for event in self.db.zrange(f"{self.name}:events", 0, -1):
                if json.loads(event)[0] in gone:
                    self.db.zrem(f"{self.name}:events", event)
                    self.db.hdel(f"{self.name}:ids", json.loads(event)[0])

    def _hash(self, meta: Meta, view: str) -> str:
        return f"{self.name}:{view}" if view.startswith(FEAST) else f"{self.name}:{meta.get('generation', '')}:{view}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A while in which there is no other writer."""
        lock, over = self.db.lock(f"{self.name}:lock", timeout=self.LOCK_S, thread_local=False), threading.Event()

        def hold() -> None:
            while not over.wait(self.LOCK_S / 3):
                with suppress(*self.errors, self.lost):  # whoever writes finds out
                    lock.reacquire()

        with self._answering(), lock:
            holder = threading.Thread(target=hold, daemon=True)
            holder.start()
            try:
                yield
            finally:
                over.set()
                holder.join()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except self.errors as error:
            raise StoreDown(self.place, error) from None


class PostgresCells:
    """Three tables for all stores. A feed is one transaction, and what is read at once one statement."""

    TABLES = """
        CREATE TABLE IF NOT EXISTS millrace_cells (store text, view text, key bytea, packed bytea,
                                                   PRIMARY KEY (store, view, key));
        CREATE TABLE IF NOT EXISTS millrace_events (store text, number bigint, id text, source text, row text, wall_us bigint,
                                                    PRIMARY KEY (store, id));
        CREATE TABLE IF NOT EXISTS millrace_meta (store text PRIMARY KEY, meta jsonb NOT NULL)
    """
    REPLACE = "ON CONFLICT (store, view, key) DO UPDATE SET packed = excluded.packed"
    PLAN = """
        SET plan_cache_mode = force_generic_plan;  -- planning anew costs more than the look itself
        SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off  -- also where it was empty at first
    """

    def __init__(self, url: str, name: str, wait_s: float = WAIT_S) -> None:
        self.url, self.name, self.place, self.wait_s = url, name, place_of(url), wait_s
        self.db: Any = None
        self.state = _State()

    def meta(self) -> Meta:
        if self.state.pinned is None:
            found = self._ask("SELECT meta FROM millrace_meta WHERE store = %s", (self.name,))
            self.state.see(dict(found[0][0]) if found else {})
        return self.state.meta

    def reading(self) -> AbstractContextManager[None]:
        return self.state.reading()

    def get(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, bytes]]:
        views = [view for view, keys in wanted for _ in keys]
        texts = [key.encode() for _, keys in wanted for key in keys]
        query = (
            "SELECT NULL, NULL, NULL, meta FROM millrace_meta WHERE store = %s UNION ALL "
            "SELECT c.view, c.key, c.packed, NULL FROM unnest(%b::text[], %b::bytea[]) AS w(view, key) "
            "JOIN millrace_cells c ON c.store = %s AND c.view = w.view AND c.key = w.key"
        )
        meta, found = Meta(), {view: dict[str, bytes]() for view, _ in wanted}
        for view, key, packed, told in self._ask(query, (self.name, views, texts, self.name)):
            if view is None:
                meta = told
            else:
                found[view][key.decode()] = packed
        self.state.see(meta)
        return [found[view] for view, _ in wanted]

    def keys(self, view: str) -> list[str]:
        found = self._ask("SELECT key FROM millrace_cells WHERE store = %s AND view = %s ORDER BY key", (self.name, view))
        return [bytes(key).decode() for (key,) in found]

    def events(self, until: int | None = None) -> list[Event]:
        query = "SELECT id, source, row, wall_us, number FROM millrace_events WHERE store = %s AND number <= %s ORDER BY number"
        return [Event(*row) for row in self._ask(query, (self.name, LAST if until is None else until))]

    def seen(self, ids: Sequence[str]) -> set[str]:
        found = self._ask("SELECT id FROM millrace_events WHERE store = %s AND id = ANY(%s)", (self.name, [*ids])) if ids else []
        return {i for (i,) in found}

    def feed(self, decide: Decide) -> bool:
        from psycopg.types.json import Jsonb

        with self._writing() as db:
            row = db.execute("SELECT meta FROM millrace_meta WHERE store = %s", (self.name,)).fetchone()
            held = dict(row[0]) if row else {}
            new = decide(held)
            if new is None:
                return False
            if new.whole:
                db.execute("DELETE FROM millrace_cells WHERE store = %s AND NOT starts_with(view, %s)", (self.name, FEAST))
                for some in _giving_way(new.cells):
                    self._insert(db, some)
            else:
                for some in _giving_way(new.cells):
                    gone = [(view, key) for view, key, packed in some if packed is None]
                    db.execute(
                        "DELETE FROM millrace_cells c USING unnest(%s::text[], %s::bytea[]) AS w(view, key) "
                        "WHERE c.store = %s AND c.view = w.view AND c.key = w.key",
                        ([view for view, _ in gone], [key.encode() for _, key in gone], self.name),
                    )
                    self._insert(db, [cell for cell in some if cell[2] is not None], self.REPLACE)
            fresh, meta = _numbered(new, held, self.seen([e.id for e in new.events]))
            if rows := [(self.name, e.number, e.id, e.source, e.row, e.wall_us) for e in fresh]:
                with db.cursor() as cursor:
                    cursor.executemany("INSERT INTO millrace_events VALUES (%s, %s, %s, %s, %s, %s)", rows)
            db.execute("DELETE FROM millrace_events WHERE store = %s AND wall_us < %s", (self.name, wall_us() - KEPT_US))
            upsert = "INSERT INTO millrace_meta VALUES (%s, %s) ON CONFLICT (store) DO UPDATE SET meta = excluded.meta"
            db.execute(upsert, (self.name, Jsonb({**held, **meta})))
            return True

    def put(self, view: str, packed: dict[str, bytes], newer: Newer) -> None:
        with self._writing() as db:
            new = _newer(self.get([(view, [*packed])])[0], packed, newer)
            self._insert(db, [(view, key, rows) for key, rows in new.items()], self.REPLACE)

    def _insert(self, db: Any, cells: Sequence[Change], held: str = "") -> None:
        """Writes cells by one statement; `held` says what becomes of those that are there."""
        query = "INSERT INTO millrace_cells SELECT %b, * FROM unnest(%b::text[], %b::bytea[], %b::bytea[]) " + held
        db.execute(query, (self.name, [c[0] for c in cells], [c[1].encode() for c in cells], [c[2] for c in cells]))

    def drop(self, view: str) -> None:
        self._ask("DELETE FROM millrace_cells WHERE store = %s AND view = %s", (self.name, view))

    def purge(self, ids: Sequence[str]) -> None:
        self._ask("DELETE FROM millrace_cells WHERE store = %s AND starts_with(view, %s)", (self.name, FEAST))
        self._ask("DELETE FROM millrace_events WHERE store = %s AND id = ANY(%s)", (self.name, [*ids]))
        self._ask("VACUUM millrace_cells")
        self._ask("VACUUM millrace_events")

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """A transaction that no other writer of the store is in."""
        import psycopg

        try:
            with _bounded(psycopg.Connection, LONG_S).connect(self.url, connect_timeout=5) as db:
                db.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (self.name,))
                db.execute(self.TABLES)
                yield db
        except psycopg.OperationalError as error:
            raise StoreDown(self.place, error) from None

    def _ask(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query. A connection that was lost since the last one is made again; one that lets wait is given up."""
        import psycopg

        held = self.db is not None
        try:
            if self.db is None:
                self.db = self._connected()
            cursor = self.db.execute(query, values or None, binary=True)
            return list(cursor.fetchall()) if cursor.rownumber is not None else []
        except psycopg.errors.UndefinedTable:
            return []
        except psycopg.OperationalError as error:
            db, self.db = self.db, None
            if db is not None:
                db.close()
            if held and not isinstance(error, psycopg.errors.ConnectionTimeout | psycopg.errors.QueryCanceled):
                return self._ask(query, values)
            raise StoreDown(self.place, error) from None

    def _connected(self) -> Any:
        """A connection for what is read, which waits no longer than it is told to."""
        import psycopg

        patient = self.wait_s == WAIT_S
        limit = "" if patient else f"-c statement_timeout={self.wait_s * 1e3:.0f}"
        kind = _bounded(psycopg.Connection, LONG_S if patient else self.wait_s)
        db = kind.connect(self.url, connect_timeout=5, autocommit=True, options=limit or None)
        db.execute(self.PLAN)
        return db


def _bounded(kind: Any, wait_s: float) -> Any:
    """A class of psycopg's connections that gives up a server which takes a connection, or a question, and says nothing."""
    import psycopg

    def soon(steps: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        until = time.monotonic() + wait_s
        try:
            wanted = next(steps)
            while True:
                wanted = steps.send((yield wanted))
                if time.monotonic() > until:
                    raise psycopg.errors.ConnectionTimeout(f"no answer within {wait_s:g} s")
        except StopIteration as end:
            return end.value

    class Bounded(kind):
        @classmethod
        def _connect_gen(cls, *given: Any, **named: Any) -> Any:
            return soon(super()._connect_gen(*given, **named))

        def wait(self, steps: Any, *given: Any, **named: Any) -> Any:
            return super().wait(soon(steps), *given, **named)

    return Bounded


class _State:
    """The state of a server's store that was seen first since reading began: what is read later must be of it too."""

    def __init__(self) -> None:
        self.inside, self.meta = False, Meta()
        self.pinned: Meta | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.inside, self.pinned = True, None
        try:
            yield
        finally:
            self.inside, self.pinned = False, None

    def see(self, meta: Meta) -> None:
        """Takes what a feed said of the state that was read. Raises Moved where that is another one."""
        if self.pinned is not None and meta != self.pinned:
            raise Moved
        self.meta = meta
        if self.inside:
            self.pinned = meta


def _texts(told: dict[bytes, bytes]) -> Meta:
    return {name.decode(): value.decode() for name, value in told.items()}


def _numbered(update: Update, held: Meta, seen: set[str]) -> tuple[list[Event], Meta]:
    """The events that are not held yet, each once, with their numbers; and the meta that names the last of these."""
    fresh = list({event.id: event for event in reversed(update.events) if event.id not in seen}.values())[::-1]
    last = int(held.get(PUSHED, 0))
    numbered = [replace(event, number=last + i) for i, event in enumerate(fresh, 1)]
    return numbered, {**update.meta, PUSHED: str(last + len(fresh))}


def _batches(cells: Iterable[T], size: int = 2_000) -> Iterator[list[T]]:
    found = iter(cells)
    while some := list(islice(found, size)):
        yield some


def _giving_way(cells: Iterable[Change]) -> Iterator[list[Change]]:
    """Batches for a server that answers others meanwhile: short ones, and after each a pause of one and a half times what it
    took, at most PAUSE_S. Without it a read waits for its turn on a core, some milliseconds, where there are few."""
    began = time.perf_counter()
    for some in _batches(cells, 200):
        yield some
        time.sleep(min(1.5 * (time.perf_counter() - began), PAUSE_S))
        began = time.perf_counter()


def _newer(held: dict[str, bytes], packed: dict[str, bytes], newer: Newer) -> dict[str, bytes]:
    return {key: rows for key, rows in packed.items() if key not in held or newer(rows, held[key])}
