"""Writes the prediction log: a bounded queue and one thread, so that an answer never waits for the disk."""

import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.facts import Columns
from pipelines.manifest import sync, write_atomic
from pipelines.predlog import FEATURE, part_path, schema
from pipelines.spec import Spec

log = logging.getLogger("millrace.predictions")
CAPACITY = 20_000  # rows that may wait; beyond it requests are dropped, counted and said
SAID_S = 10.0  # between two lines about what is dropped


@dataclass(frozen=True)
class Private:
    """What of an answer is not kept, or only as a keyed hash: features, and fields of the request, by name."""

    dropped: frozenset[str] = frozenset()
    hashed: frozenset[str] = frozenset()
    key: bytes = b""

    @classmethod
    def of(cls, spec: Spec, path: Path) -> "Private":
        """What a spec says; the key of the hashes is in the file at `path`, which is made where it is needed."""
        if not spec.serve.log_hash:
            return cls(frozenset(spec.serve.log_drop))
        if not path.exists():
            scratch = path.with_name(f".{path.name}-{os.getpid()}")
            write_atomic(scratch, secrets.token_bytes(32), mode=0o600)
            with suppress(FileExistsError):  # another worker was first
                os.link(scratch, path)
            scratch.unlink()
        return cls(frozenset(spec.serve.log_drop), frozenset(spec.serve.log_hash), path.read_bytes())

    def hash(self, value: object) -> str | None:
        """16 hex digits, the same for the same value in one home; null stays null."""
        return None if value is None else hmac.new(self.key, str(value).encode(), hashlib.sha256).hexdigest()[:16]

    def given(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a request as they are kept."""
        return {n: self.hash(v) if n in self.hashed else v for n, v in fields.items() if n not in self.dropped}

    def hides(self, fields: Mapping[str, Any]) -> bool:
        """Whether what was asked can not be told again from what is kept."""
        return any(value is not None and (name in self.dropped or name in self.hashed) for name, value in fields.items())


@dataclass(frozen=True)
class Answered:
    """One answered request, ready to be written: a value of each column of the log for R rows, and their features: `numbers`
    float64 (R, F) with NaN, and the others by name (R)."""

    clock_us: int
    rows: Sequence[Mapping[str, object]]
    numbers: np.ndarray
    words: Columns


class PredictionLog:
    """Durable within `flush_us` of the answer, as long as the disk keeps up."""

    def __init__(
        self, root: Path, numbers: Sequence[str], words: Sequence[str], flush_us: int, private: Private | None = None
    ) -> None:  # fmt: skip
        self.root, self.private, self.place = root, private or Private(), {name: i for i, name in enumerate(numbers)}
        self.schema = schema(*([n for n in names if n not in self.private.dropped] for names in (numbers, words)))
        self.flush_s = flush_us / 1e6
        self.worker = f"{os.getpid()}-{time.monotonic_ns():x}"
        self.waiting = deque[Answered]()
        self.taken = self.written = 0  # rows, ever
        self.over = threading.Event()
        self.dropped = self.sequence = self.told = 0
        self.said = -SAID_S
        self.thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)
        self.thread.start()

    def put(self, one: Answered) -> None:
        """Takes a request, or counts its rows as dropped when the queue is full. Never blocks."""
        if self.taken - self.written + len(one.rows) > CAPACITY:
            self.dropped += len(one.rows)
            return
        self.taken += len(one.rows)
        self.waiting.append(one)

    def close(self) -> None:
        """Writes what is left."""
        self.over.set()
        self.thread.join(timeout=10)

    def _run(self) -> None:
        """Looks by itself what has come: to wake a thread for each answer costs a tenth of the answer."""
        ending = False
        while not ending:
            ending = self.over.wait(self.flush_s * 0.7)  # the rest is to write it
            if batch := [self.waiting.popleft() for _ in range(len(self.waiting))]:
                self._write(batch)
                self.written += sum(len(one.rows) for one in batch)
            self._tell()

    def _tell(self) -> None:
        """Says that rows were dropped, not more often than a person wants to read it."""
        if self.dropped > self.told and time.monotonic() - self.said > SAID_S:
            self.told, self.said = self.dropped, time.monotonic()
            log.warning("prediction log: %d rows dropped so far", self.dropped)

    def _write(self, batch: Sequence[Answered]) -> None:
        by_hour = defaultdict(list)
        for one in batch:
            by_hour[one.clock_us // 3_600_000_000].append(one)
        for some in by_hour.values():
            path = part_path(self.root, some[0].clock_us, self.worker, self.sequence)
            scratch = path.with_name(f".{path.name}")
            self.sequence += 1
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(self._table(some), scratch, write_statistics=False, use_dictionary=False)  # it is compacted
                sync(scratch)
                scratch.replace(path)
                sync(path.parent)
            except OSError as error:
                self.dropped += (lost := sum(len(one.rows) for one in some))
                log.warning("prediction log: %d rows lost, %s", lost, error)
                with suppress(OSError):
                    scratch.unlink(missing_ok=True)

    def _table(self, some: Sequence[Answered]) -> pa.Table:
        """The rows of some requests: no Python object per number."""
        columns, numbers = [], np.concatenate([one.numbers for one in some]).T.copy()
        for field in self.schema:
            name = field.name.removeprefix(FEATURE)
            if field.name == name:
                columns.append(pa.array([row[name] for one in some for row in one.rows], field.type))
                continue
            if name in self.place:
                columns.append(pa.array(numbers[self.place[name]], field.type, from_pandas=True))
                continue
            values = np.concatenate([one.words[name] for one in some])
            if name in self.private.hashed:
                values = np.array([self.private.hash(v) for v in values], object)
            columns.append(pa.array(values, field.type, from_pandas=True))
        return pa.Table.from_arrays(columns, schema=self.schema)


as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # compact
