"""Where the packed rows of a served store lie: SQLite in the home, Redis or Postgres. One value per view and key.

A feed replaces everything at once, and readers see the state before or after it, never between; of two feeds at once the
second sees what the first has written. Views whose names begin with `feast:` are Feast's own: `put` writes them key by
key, and a feed leaves them alone.
"""

import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pipelines.errors import MillraceError

Meta = dict[str, str]
Cell = tuple[str, str, bytes]  # view, key, packed rows
Newer = Callable[[bytes, bytes], bool]  # whether packed rows may replace what is held
FEAST = "feast:"
Decide = Callable[[Meta], tuple[Meta, Iterator[Cell]] | None]  # from what is there: what replaces it, or None


class StoreDown(MillraceError):
    """The server that holds the served store does not answer."""

    def __init__(self, place: str, error: Exception) -> None:
        super().__init__(f"the served store at {place} does not answer ({str(error).strip()[:120]}); start it")


class Held(Protocol):
    """What one served store holds."""

    def meta(self) -> Meta:
        """What the last feed wrote about itself; empty before the first."""

    def reading(self) -> AbstractContextManager[None]:
        """One state of the store for everything that is read inside."""

    def get(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, bytes]]:
        """For each view and its keys the packed rows of those keys that are there."""

    def keys(self, view: str) -> list[str]:
        """Every key of a view, in order."""


class Cells(Held, Protocol):
    """One served store, to be written too."""

    def feed(self, decide: Decide) -> bool:
        """Replaces everything by what `decide` gives; False where that is None."""

    def put(self, view: str, packed: dict[str, bytes], newer: Newer) -> None:
        """Writes keys of a view of Feast's: those that are not held, and those that may replace what is."""

    def drop(self, view: str) -> None:
        """Removes a view of Feast's."""

    def purge(self) -> None:
        """Removes all views of Feast's, and what deleted rows have left behind."""


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


def open_cells(store: Path | str) -> Held:
    """What a store holds, for a reader. Folders and URLs are as in `writable_cells`."""
    folder = _folder(store)
    if folder is None:
        return _remote(str(store))
    made = SqliteCells(folder, write=False) if (folder / SqliteCells.FILE).exists() else None
    return made if made is not None and made.is_made() else NoCells({})


def writable_cells(store: Path | str) -> Cells:
    """The cells in a folder, or behind a URL that ends in `#NAME`; $NAMES in a URL are taken from the environment."""
    folder = _folder(store)
    return _remote(str(store)) if folder is None else SqliteCells(folder, write=True)


def place_of(store: Path | str) -> str:
    """A store as a message names it: without user and password."""
    if _folder(store) is not None:
        return str(store)
    at = urlsplit(str(store))
    return f"{at.scheme}://{at.hostname or ''}{f':{at.port}' if at.port else ''}{at.path}"


def _folder(store: Path | str) -> Path | None:
    return None if "://" in str(store) else Path(store)


def _remote(store: str) -> Cells:
    url, _, name = os.path.expandvars(store).rpartition("#")
    return RedisCells(url, name) if url.startswith("redis") else PostgresCells(url, name)


class SqliteCells:
    """A file in a folder. Not shared between threads."""

    FILE = "store.sqlite"

    def __init__(self, folder: Path, *, write: bool) -> None:
        path = folder / self.FILE
        if not write:
            self.db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10, check_same_thread=False)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(path, timeout=60, isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        for table in ("cells (view TEXT, key TEXT, packed BLOB, PRIMARY KEY (view, key))",
                      "meta (name TEXT PRIMARY KEY, value TEXT)"):  # fmt: skip
            self.db.execute(f"CREATE TABLE IF NOT EXISTS {table} WITHOUT ROWID")

    def is_made(self) -> bool:
        """Whether the file has its tables: a writer that was killed may have left it without."""
        return bool(self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchall())

    def meta(self) -> Meta:
        return dict(self.db.execute("SELECT name, value FROM meta").fetchall())

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.execute("ROLLBACK")

    def get(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, bytes]]:
        found: list[dict[str, bytes]] = []
        for view, keys in wanted:
            found.append({})
            for begin in range(0, len(keys), 10_000):  # SQLite takes 32,766 at once
                some = keys[begin : begin + 10_000]
                query = f"SELECT key, packed FROM cells WHERE view = ? AND key IN ({','.join('?' * len(some))})"
                found[-1].update(self.db.execute(query, (view, *some)).fetchall())
        return found

    def keys(self, view: str) -> list[str]:
        return [key for (key,) in self.db.execute("SELECT key FROM cells WHERE view = ? ORDER BY key", (view,))]

    def feed(self, decide: Decide) -> bool:
        with closing(self.db), self._writing():
            new = decide(self.meta())
            if new is None:
                return False
            self.db.execute("DELETE FROM cells WHERE view NOT LIKE ?", (f"{FEAST}%",))
            self.db.executemany("INSERT INTO cells VALUES (?, ?, ?)", new[1])
            self.db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", new[0].items())
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

    def purge(self) -> None:
        with closing(self.db):
            self.db.execute("DELETE FROM cells WHERE view LIKE ?", (f"{FEAST}%",))
            self.db.execute("VACUUM")
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


class RedisCells:
    """Hashes of one generation, named by the meta hash; a feed writes the next generation and moves the name."""

    HELD_S = 3_600  # an unfinished generation, and one that is still being read, end by themselves
    LOCK_S = 300

    def __init__(self, url: str, name: str) -> None:
        import redis

        self.errors: Any = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
        self.name, self.place = f"millrace:{name}", place_of(url)
        self.db: Any = redis.Redis.from_url(url, socket_timeout=30, socket_connect_timeout=5)
        self.seen: Meta | None = None  # while `reading`

    def meta(self) -> Meta:
        if self.seen is not None:
            return self.seen
        with self._answering():
            return {k.decode(): v.decode() for k, v in self.db.hgetall(f"{self.name}:meta").items()}

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.seen = self.meta()
        try:
            yield
        finally:
            self.seen = None

    def get(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, bytes]]:
        meta = self.meta()
        asked = [(view, keys) for view, keys in wanted if keys]
        with self._answering(), self.db.pipeline(transaction=False) as pipe:
            for view, keys in asked:
                pipe.hmget(self._hash(meta, view), keys)
            answers = iter(pipe.execute())
        return [{k: v for k, v in zip(keys, next(answers), strict=True) if v is not None} if keys else {} for _, keys in wanted]

    def keys(self, view: str) -> list[str]:
        with self._answering():
            return sorted(k.decode() for k in self.db.hkeys(self._hash(self.meta(), view)))

    def feed(self, decide: Decide) -> bool:
        with self._writing():
            old = self.meta()
            new = decide(old)
            if new is None:
                return False
            generation, views = uuid.uuid4().hex, set()
            with self.db.pipeline(transaction=False) as pipe:
                for view, key, packed in new[1]:
                    hash_name = f"{self.name}:{generation}:{view}"
                    pipe.hset(hash_name, key, packed)
                    if view not in views:
                        views.add(view)
                        pipe.expire(hash_name, self.HELD_S)
                    if len(pipe) >= 2_000:
                        pipe.execute()
                pipe.execute()
            with self.db.pipeline(transaction=True) as pipe:
                for view in views:
                    pipe.persist(f"{self.name}:{generation}:{view}")
                pipe.hset(f"{self.name}:meta", mapping={**new[0], "generation": generation, "views": " ".join(sorted(views))})
                for view in old.get("views", "").split():
                    pipe.expire(f"{self.name}:{old['generation']}:{view}", 60)
                pipe.execute()
            return True

    def put(self, view: str, packed: dict[str, bytes], newer: Newer) -> None:
        with self._writing():
            if new := _newer(self.get([(view, [*packed])])[0], packed, newer):
                self.db.hset(self._hash({}, view), mapping=new)

    def drop(self, view: str) -> None:
        with self._answering():
            self.db.delete(self._hash({}, view))

    def purge(self) -> None:
        meta = self.meta()
        with self._answering():
            held = {f"{self.name}:{meta.get('generation', '')}:{view}".encode() for view in meta.get("views", "").split()}
            for name in self.db.scan_iter(f"{self.name}:*"):
                if name not in {*held, f"{self.name}:meta".encode(), f"{self.name}:lock".encode()}:
                    self.db.delete(name)

    def _hash(self, meta: Meta, view: str) -> str:
        return f"{self.name}:{view}" if view.startswith(FEAST) else f"{self.name}:{meta.get('generation', '')}:{view}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A while in which there is no other writer."""
        with self._answering(), self.db.lock(f"{self.name}:lock", timeout=self.LOCK_S, blocking_timeout=self.LOCK_S):
            yield

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except self.errors as error:
            raise StoreDown(self.place, error) from None


class PostgresCells:
    """Two tables for all stores. A feed is one transaction; readers keep the state at which they began."""

    TABLES = """
        CREATE TABLE IF NOT EXISTS millrace_cells (store text, view text, key bytea, packed bytea,
                                                   PRIMARY KEY (store, view, key));
        CREATE TABLE IF NOT EXISTS millrace_meta (store text PRIMARY KEY, meta jsonb NOT NULL)
    """

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name, self.place = url, name, place_of(url)
        self.db: Any = None
        self.inside = False  # a transaction of reads

    def meta(self) -> Meta:
        found = self._ask("SELECT meta FROM millrace_meta WHERE store = %s", (self.name,))
        return dict(found[0][0]) if found else {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        self._ask("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        self.inside = True
        try:
            yield
        finally:
            if self.db is not None:
                self._ask("ROLLBACK")
            self.inside = False

    def get(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, bytes]]:
        found: list[dict[str, bytes]] = [{} for _ in wanted]
        places = {view: i for i, (view, _) in enumerate(wanted)}
        pairs = [(view, key.encode()) for view, keys in wanted for key in keys]
        query = (
            "SELECT c.view, c.key, c.packed FROM unnest(%s::text[], %s::bytea[]) AS w(view, key) "
            "JOIN millrace_cells c ON c.store = %s AND c.view = w.view AND c.key = w.key"
        )
        for view, key, packed in self._ask(query, ([v for v, _ in pairs], [k for _, k in pairs], self.name)) if pairs else ():
            found[places[view]][bytes(key).decode()] = bytes(packed)
        return found

    def keys(self, view: str) -> list[str]:
        found = self._ask("SELECT key FROM millrace_cells WHERE store = %s AND view = %s ORDER BY key", (self.name, view))
        return [bytes(key).decode() for (key,) in found]

    def feed(self, decide: Decide) -> bool:
        from psycopg.types.json import Jsonb

        with self._writing() as db:
            held = db.execute("SELECT meta FROM millrace_meta WHERE store = %s", (self.name,)).fetchone()
            new = decide(dict(held[0]) if held else {})
            if new is None:
                return False
            db.execute("DELETE FROM millrace_cells WHERE store = %s AND NOT starts_with(view, %s)", (self.name, FEAST))
            with db.cursor().copy("COPY millrace_cells FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(["text", "text", "bytea", "bytea"])
                for view, key, packed in new[1]:
                    copy.write_row((self.name, view, key.encode(), packed))
            upsert = "INSERT INTO millrace_meta VALUES (%s, %s) ON CONFLICT (store) DO UPDATE SET meta = excluded.meta"
            db.execute(upsert, (self.name, Jsonb(new[0])))
            return True

    def put(self, view: str, packed: dict[str, bytes], newer: Newer) -> None:
        with self._writing() as db:
            new = _newer(self.get([(view, [*packed])])[0], packed, newer)
            upsert = (
                "INSERT INTO millrace_cells SELECT %s, %s, * FROM unnest(%s::bytea[], %s::bytea[]) "
                "ON CONFLICT (store, view, key) DO UPDATE SET packed = excluded.packed"
            )
            db.execute(upsert, (self.name, view, [key.encode() for key in new], [*new.values()]))

    def drop(self, view: str) -> None:
        self._ask("DELETE FROM millrace_cells WHERE store = %s AND view = %s", (self.name, view))

    def purge(self) -> None:
        self._ask("DELETE FROM millrace_cells WHERE store = %s AND starts_with(view, %s)", (self.name, FEAST))
        self._ask("VACUUM millrace_cells")

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """A transaction that no other writer of the store is in."""
        import psycopg

        try:
            with psycopg.connect(self.url, connect_timeout=5) as db:
                db.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (self.name,))
                db.execute(self.TABLES)
                yield db
        except psycopg.OperationalError as error:
            raise StoreDown(self.place, error) from None

    def _ask(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query. A connection that was lost since the last one is made again."""
        import psycopg

        held = self.db is not None
        try:
            if self.db is None:
                self.db = psycopg.connect(self.url, connect_timeout=5, autocommit=True)
            cursor = self.db.execute(query, values or None)
            return list(cursor.fetchall()) if cursor.description else []
        except psycopg.errors.UndefinedTable:
            return []
        except psycopg.OperationalError as error:
            self.db = None
            if held and not self.inside:
                return self._ask(query, values)
            raise StoreDown(self.place, error) from None


def _newer(held: dict[str, bytes], packed: dict[str, bytes], newer: Newer) -> dict[str, bytes]:
    return {key: rows for key, rows in packed.items() if key not in held or newer(rows, held[key])}
