"""Writes the prediction log: a bounded queue and one thread, so that an answer never waits for the disk."""

import json
import logging
import os
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.predlog import FEATURE, part_path, schema

log = logging.getLogger("millrace.predictions")
CAPACITY = 20_000  # rows that may wait; beyond it rows are dropped, counted and said


@dataclass(frozen=True)
class Entry:
    """One answered row, ready to be written."""

    clock_us: int
    values: dict[str, object]
    features: dict[str, object]


class PredictionLog:
    """Durable within `flush_us` of the answer, as long as the disk keeps up."""

    def __init__(self, root: Path, numbers: list[str], categories: list[str], flush_us: int) -> None:
        self.root, self.schema = root, schema(numbers, categories)
        self.flush_s = flush_us / 1e6
        self.worker = f"{os.getpid()}-{time.monotonic_ns():x}"
        self.waiting = deque[Entry]()
        self.over = threading.Event()
        self.dropped = self.sequence = 0
        self.thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)
        self.thread.start()

    def put(self, entries: list[Entry]) -> None:
        """Takes the entries, or counts them as dropped when the queue is full. Never blocks."""
        room = max(0, CAPACITY - len(self.waiting))
        self.waiting.extend(entries[:room])
        self.dropped += len(entries[room:])

    def close(self) -> None:
        """Writes what is left."""
        self.over.set()
        self.thread.join(timeout=10)

    def _run(self) -> None:
        """Looks by itself what has come: to wake a thread for each answer costs a tenth of the answer."""
        ending = False
        while not ending:
            ending = self.over.wait(self.flush_s / 2)
            if batch := [self.waiting.popleft() for _ in range(len(self.waiting))]:
                self._write(batch)

    def _write(self, batch: list[Entry]) -> None:
        by_hour = defaultdict(list)
        for entry in batch:
            by_hour[entry.clock_us // 3_600_000_000].append(entry)
        for entries in by_hour.values():
            path = part_path(self.root, entries[0].clock_us, self.worker, self.sequence)
            self.sequence += 1
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                scratch = path.with_name(f".{path.name}")
                rows = [{**e.values, **{FEATURE + k: v for k, v in e.features.items()}} for e in entries]
                pq.write_table(pa.Table.from_pylist(rows, self.schema), scratch)
                scratch.replace(path)
            except OSError as error:
                self.dropped += len(entries)
                log.warning("prediction log: %d rows lost, %s", len(entries), error)
        if self.dropped:
            log.warning("prediction log: %d rows dropped so far", self.dropped)


def as_json(value: object) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
