"""What an endpoint counts over all of its workers: one small file that each of them maps, with a row of numbers of its own.

A worker writes its own row only (float64, eight bytes at once), so that nothing is locked on the way of a request; who reads adds
the rows up. The row of a worker that died goes, with its counts, to the one that comes in its place.
"""

import fcntl
import logging
import mmap
import os
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pipelines.clock import begin_s

log = logging.getLogger("millrace.service")
PID, INSIDE, LIMIT, SHED, DROPPED, ROWS, UNKNOWN, OUTSIDE, EXPLAINED, READY, COUNTS = range(11)
STAGES = ("read", "parse", "features", "preprocess", "model", "whole")
SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # upper ends of the buckets
TENTHS = tuple(n / 10 for n in range(1, 11))
ROUTES = ("predict", "predict_features")
STATUSES = (200, 400, 401, 408, 409, 413, 422, 429, 499, 500, 503)
CLIENTS = 4_096  # clients whose rate is told apart; of more some share one


class Meter:
    """The row of this worker, and the sums over all rows. `path`: the file; without it the numbers are this process's alone."""

    def __init__(self, path: Path | None, workers: int, features: Sequence[str], views: Sequence[str]) -> None:
        self.features, self.views = features, views
        self._stage = {stage: COUNTS + i * (len(SECONDS) + 2) for i, stage in enumerate(STAGES)}
        self._score = COUNTS + len(STAGES) * (len(SECONDS) + 2)
        self._status = self._score + len(TENTHS) + 1
        self._missing = self._status + len(ROUTES) * len(STATUSES)
        self._unseen = self._missing + len(features)
        self._stale = self._unseen + len(features)
        self.width, self.slots, self.wanted = self._stale + len(views), 2 * workers + 2, workers
        self._feature = {name: i for i, name in enumerate(features)}
        self._view = {name: i for i, name in enumerate(views)}
        self._at = {(route, status): self._status + i * len(STATUSES) + j
                    for i, route in enumerate(ROUTES) for j, status in enumerate(STATUSES)}  # fmt: skip
        self._whole = memoryview(self._map(path)).cast("d")
        self.rates = self._whole[self.slots * self.width :]  # and after them whether all workers were ready once
        self._rows = [self._whole[i * self.width : (i + 1) * self.width] for i in range(self.slots)]
        self.row = self._claimed(path)

    def _map(self, path: Path | None) -> mmap.mmap:
        size = 8 * (self.slots * self.width + CLIENTS + 1)
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk is seen here, not by a signal later
                    return mmap.mmap(file.fileno(), size)
            except (OSError, ValueError) as error:
                log.warning("%s: %s; numbers and limits are those of each worker alone", path, error)
        self.wanted = 1
        return mmap.mmap(-1, size)

    def _claimed(self, path: Path | None) -> "memoryview[float]":
        """A row that no living worker has."""
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY) if path is not None else -1
            try:
                if lock >= 0:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                for row in self._rows:
                    if not _alive(int(row[PID])):
                        row[INSIDE] = row[LIMIT] = row[READY] = 0.0
                        row[PID] = os.getpid()
                        return row
            finally:
                if lock >= 0:
                    os.close(lock)
        return memoryview(bytearray(8 * self.width)).cast("d")

    def total(self, cell: int) -> float:
        """A number over all workers."""
        return sum(row[cell] for row in self._rows)

    def workers(self) -> int:
        """Workers that have begun and are not known to have ended."""
        return sum(row[PID] > 0 for row in self._rows) or 1

    def awaited(self) -> int:
        """Workers that have yet to be ready. Once all were, none: from then on each says so for itself alone."""
        if not self.rates[CLIENTS]:
            ready = sum(row[READY] > 0 and _alive(int(row[PID])) for row in self._rows)
            if ready < self.wanted:
                return self.wanted - ready
            self.rates[CLIENTS] = 1.0
        return 0

    def took(self, stage: str, seconds: float) -> None:
        """A stage of a request took so long."""
        row, at = self.row, self._stage[stage]
        row[at + bisect_left(SECONDS, seconds)] += 1
        row[at + len(SECONDS) + 1] += seconds

    def answered(self, route: str, status: int) -> None:
        """A request got this status."""
        at = self._at.get((route, status))
        if at is not None:
            self.row[at] += 1

    def scored(self, scores: Iterable[float]) -> None:
        """Rows were answered with these probabilities."""
        row, at = self.row, self._score
        for score in scores:
            row[at + min(int(score * 10), 9)] += 1
            row[at + len(TENTHS)] += score
            row[ROWS] += 1

    def flagged(self, missing: Iterable[str], unseen: Iterable[str], stale: Iterable[str] = ()) -> None:
        """A row had no value, or none that training knew, for these features, and an old one of these views."""
        row = self.row
        for name in missing:
            row[self._missing + self._feature[name]] += 1
        for name in unseen:
            row[self._unseen + self._feature[name]] += 1
        for name in stale:
            row[self._stale + self._view[name]] += 1

    def delay(self, client: str, rate: float, burst: float) -> float:
        """Seconds until a client may ask again; 0: it may now, which is noted. `rate` requests a second, `burst` at once.

        The generic cell rate algorithm: one number per client, shared by all workers (two that look in the same microsecond may
        let one more in). CLOCK_MONOTONIC is that of the machine.
        """
        from time import monotonic

        at, now = zlib.crc32(client.encode()) % CLIENTS, monotonic()
        due = max(self.rates[at], now)
        if (wait := due - now - (burst - 1) / rate) > 0:
            return wait
        self.rates[at] = due + 1 / rate
        return 0.0

    def text(self, release: str, limit: int) -> Iterator[str]:
        """All sums in Prometheus's text format, line by line."""
        yield from head("millrace_build_info", "gauge", "The release that answers.")
        yield f'millrace_build_info{{release="{escaped(release)}"}} 1'
        yield from head("millrace_workers", "gauge", "Worker processes; all numbers are over all of them.")
        yield f"millrace_workers {self.workers()}"
        yield from head("millrace_requests_total", "counter", "Requests by route and status.")
        for (route, status), at in self._at.items():
            yield f'millrace_requests_total{{route="{route}",status="{status}"}} {self.total(at):.0f}'
        for name, kind, cell, about in (
            ("millrace_requests_in_flight", "gauge", INSIDE, "Requests that are let in and not answered yet."),
            ("millrace_requests_shed_total", "counter", SHED, "Requests sent away, since they would have waited too long."),
            ("millrace_predictions_dropped_total", "counter", DROPPED, "Answers that could not be logged."),
            ("millrace_rows_total", "counter", ROWS, "Rows answered."),
            ("millrace_rows_unknown_total", "counter", UNKNOWN, "Rows that the served store does not know."),
            ("millrace_rows_outside_horizon_total", "counter", OUTSIDE, "Rows asked about too early or too late."),
            ("millrace_rows_explained_total", "counter", EXPLAINED, "Rows answered with an explanation."),
        ):
            yield from head(name, kind, about)
            yield f"{name} {self.total(cell):.0f}"
        yield from head("millrace_requests_limit", "gauge", "Requests that are let in at a time, over all workers.")
        yield f"millrace_requests_limit {limit}"
        yield from head("millrace_stage_seconds", "histogram", "Time of a request by stage; whole: from its head to its answer.")
        for stage, at in self._stage.items():
            yield from self._histogram("millrace_stage_seconds", f'stage="{stage}",', at, SECONDS)
        yield from head("millrace_probability", "histogram", "Probabilities answered.")
        yield from self._histogram("millrace_probability", "", self._score, TENTHS[:-1])
        for name, label, begin, known, about in (
            ("missing", "feature", self._missing, self.features, "Rows for which a feature had no value."),
            ("unseen", "feature", self._unseen, self.features, "Rows with a category that training did not know."),
            ("stale", "view", self._stale, self.views, "Rows whose newest fact of a view was too old."),
        ):
            yield from head(f"millrace_{name}_total", "counter", about)
            for i, one in enumerate(known):
                yield f'millrace_{name}_total{{{label}="{escaped(one)}"}} {self.total(begin + i):.0f}'

    def _histogram(self, name: str, label: str, at: int, ends: Sequence[float]) -> Iterator[str]:
        count = 0.0
        for i, end in enumerate((*ends, float("inf"))):
            count += self.total(at + i)
            yield f'{name}_bucket{{{label}le="{"+Inf" if end == float("inf") else f"{end:g}"}"}} {count:.0f}'
        inside = f"{{{label[:-1]}}}" if label else ""
        yield f"{name}_sum{inside} {self.total(at + len(ends) + 1):.9g}"
        yield f"{name}_count{inside} {count:.0f}"


def head(name: str, kind: str, about: str) -> Iterator[str]:
    """What stands before a family of numbers."""
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"


def escaped(text: str) -> str:
    """The value of a label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def shared_file(folder: Path) -> Path:
    """The file of the service that this process is a worker of, named by who started it; those of ended services are removed."""
    parent = os.getppid()
    mine = folder / f"shared-{parent}-{round(begin_s(parent) * 100)}"
    for path in folder.glob("shared-*"):
        pid = path.name.split("-")[1]
        if path != mine and pid.isdigit() and (int(pid) == parent or not _alive(int(pid))):
            path.unlink(missing_ok=True)
    return mine


def _alive(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
