"""The prediction log: what is kept of an answer, that it is soon on the disk, and that tidying loses and doubles nothing."""

import logging
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from deploy import predictions
from deploy.canary import LogTail
from deploy.predictions import Answered, PredictionLog, Private
from features.frame import feature_list
from pipelines import predlog
from pipelines.clock import parse_time
from pipelines.errors import MillraceError, UsageError
from pipelines.predlog import HOUR_US, newest_hour, read_log, tidy
from pipelines.spec import load_spec

NOON = parse_time("2026-01-05T12:10:00Z")


def answered(number: int, clock: int = NOON, rows: int = 1, **features: object) -> Answered:
    """Request number so-and-so: `rows` answers, all as given by `features` but x, which counts on."""
    values: dict[str, Any] = {
        "request_id": f"r{number:06d}", "clock": clock, "wall": clock, "release": "m:1", "snapshot": "s", "pushed": 0,
        "route": "predict", "key": f'{{"id":{number}}}', "request": "{}", "event_times": "{}", "unknown_entity": False,
        "outside_horizon": False, "missing": 0, "unseen": 0, "stale": "[]", "score": 0.5, "latency_us": 900,
    }  # fmt: skip
    frame = {"x": np.arange(number, number + rows, dtype=np.float64), "word": np.array(["a"] * rows, object)}
    frame |= {name: np.array([value] * rows, None if isinstance(value, float) else object) for name, value in features.items()}
    numbers = np.column_stack([np.empty((rows, 0)), *(v for v in frame.values() if v.dtype == np.float64)])
    words = {name: v for name, v in frame.items() if v.dtype == object}
    return Answered(clock, [{**values, "row": i} for i in range(rows)], numbers, words)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[PredictionLog]:
    """One that nothing is written by but `_write`."""
    made = PredictionLog(tmp_path / "log", ["x"], ["word"], 3_600_000_000)
    yield made
    made.close()


def write(log: PredictionLog, *each: Answered) -> None:
    """Each becomes a part of its own."""
    for one in each:
        log._write([one])


def numbers(root: Path) -> list[int]:
    """The requests that a reader finds, in order."""
    return sorted(int(i[1:]) for i in read_log(root)["request_id"].to_pylist())


def test_what_was_answered_is_read_soon_and_as_it_was(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, ["x"], ["word"], 200_000)
    log.put(answered(1, rows=2))
    log.put(answered(5, x=float("nan"), word=None))
    time.sleep(0.5)
    found = read_log(tmp_path).sort_by([("request_id", "ascending"), ("row", "ascending")])
    log.close()
    assert found["feature.x"].to_pylist() == [1.0, 2.0, None] and found["feature.word"].to_pylist() == ["a", "a", None]
    assert found["row"].to_pylist() == [0, 1, 0] and found["score"].to_pylist() == [0.5] * 3
    assert pc.unique(found["clock"].cast(pa.int64())).to_pylist() == [NOON] and newest_hour(tmp_path) == NOON // HOUR_US * HOUR_US


def test_a_queue_that_is_full_drops_whole_requests_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(predictions, "CAPACITY", 10)
    goes_on, written = threading.Event(), pq.write_table
    monkeypatch.setattr(pq, "write_table", lambda *a, **k: goes_on.wait(10) and written(*a, **k))
    with caplog.at_level(logging.WARNING, "millrace.predictions"):
        log = PredictionLog(tmp_path, ["x"], ["word"], 20_000)
        for number in range(30):
            log.put(answered(number, rows=3))
        assert log.dropped == 27 * 3
        goes_on.set()
        deadline = time.monotonic() + 5
        while log.written < 9 and time.monotonic() < deadline:
            time.sleep(0.01)
        log.put(answered(99))  # there is room again
        log.close()
    assert numbers(tmp_path) == [0] * 3 + [1] * 3 + [2] * 3 + [99] and log.dropped == 81
    assert "prediction log: 81 rows dropped so far" in caplog.text


def test_a_disk_that_is_full_costs_rows_and_no_answer(
    log: PredictionLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*a: Any, **k: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(predictions, "sync", full)
        write(log, answered(1, rows=4))
    assert log.dropped == 4 and "4 rows lost, [Errno 28]" in caplog.text
    assert not list(log.root.rglob("*parquet"))  # nothing half-written stays
    write(log, answered(2))
    assert numbers(log.root) == [2]


def test_hours_that_are_over_become_one_part_each(log: PredictionLog) -> None:
    write(log, *(answered(i, NOON + i // 5 * HOUR_US) for i in range(9)), answered(9, NOON + 2 * HOUR_US))
    before = read_log(log.root).sort_by("request_id")
    found = tidy(log.root, NOON + 2 * HOUR_US)
    assert (found.hours, found.parts, found.expired) == (2, 9, 0)
    assert read_log(log.root).sort_by("request_id").equals(before)
    assert len(list(log.root.rglob("*.parquet"))) == 3
    write(log, answered(10))  # a worker that was late
    assert tidy(log.root, NOON + 2 * HOUR_US).parts == 2 and numbers(log.root) == [*range(11)]
    assert len(list(log.root.rglob("*.parquet"))) == 3 and tidy(log.root, NOON + 2 * HOUR_US).hours == 0


@pytest.mark.parametrize("moment", ["before it is renamed", "before the parts go", "when one of them is gone"])
def test_tidying_that_is_killed_loses_and_doubles_nothing(
    log: PredictionLog, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Killed(BaseException):
        pass

    def strike(target: object, name: str, after: int) -> None:
        real, count = getattr(target, name), iter(range(100))

        def struck(*a: Any, **k: Any) -> Any:
            if next(count) == after:
                raise Killed
            return real(*a, **k)

        monkeypatch.setattr(target, name, struck)

    write(log, *(answered(i) for i in range(4)))
    where = {"before it is renamed": (predlog, "sync", 0), "before the parts go": (predlog, "sync", 1)}
    for late in (4, 5):  # a part that comes after each kill
        strike(*where.get(moment, (Path, "unlink", 1)))
        with pytest.raises(Killed):
            tidy(log.root, NOON + HOUR_US)
        monkeypatch.undo()
        assert numbers(log.root) == [*range(late)]
        write(log, answered(late))
        assert numbers(log.root) == [*range(late + 1)]
    tidy(log.root, NOON + HOUR_US)
    assert numbers(log.root) == [*range(6)] and len(list(log.root.rglob("[!.]*.parquet"))) == 1


def test_who_reads_while_it_is_tidied_and_written_sees_each_answer_once(log: PredictionLog) -> None:
    write(log, *(answered(i) for i in range(10)))
    over, wrong, reads = threading.Event(), list[list[int]](), 0

    def work() -> None:
        for i in range(10, 60):
            write(log, answered(i))
            if i % 5 == 0:
                tidy(log.root, NOON + HOUR_US)
        over.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not over.is_set():
        found, reads = numbers(log.root), reads + 1
        if found != [*range(len(found))]:
            wrong.append(found)
    worker.join()
    assert not wrong and reads > 3 and numbers(log.root) == [*range(60)]


def test_who_follows_the_log_sees_each_answer_once(log: PredictionLog) -> None:
    write(log, answered(0))
    tail, found = LogTail(log.root), []
    for i in range(1, 5):
        write(log, answered(i))
        found += tail.take()
        tidy(log.root, NOON + HOUR_US)
        found += tail.take()
    assert [row["request_id"] for row in found] == [f"r{i:06d}" for i in range(1, 5)]


def test_old_hours_go(log: PredictionLog) -> None:
    write(log, answered(1, NOON - 3 * HOUR_US), answered(2, NOON - 2 * HOUR_US), answered(3))
    assert tidy(log.root, NOON, keep=2 * HOUR_US).expired == 1 and numbers(log.root) == [2, 3]
    assert len(list(log.root.glob("hour=*"))) == 2


def test_features_of_other_types_stay_apart(log: PredictionLog, tmp_path: Path) -> None:
    write(log, answered(1))
    other = PredictionLog(log.root, [], ["x", "word"], 3_600_000_000)
    other._write([answered(2, x="text")])
    other.close()
    assert tidy(log.root, NOON + HOUR_US).parts == 0 and len(list(log.root.rglob("*.parquet"))) == 2
    with pytest.raises(MillraceError, match="hold features of other types"):
        read_log(log.root)


def test_what_is_private_is_not_kept(tmp_path: Path) -> None:
    spec = load_spec("flights_demo", ["serve.log_drop=[distance]", "serve.log_hash=[origin, tailnum]"])
    private = Private.of(spec, tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600 and len(private.key) == 32
    assert Private.of(spec, tmp_path / "key") == private  # of another worker
    assert private.given({"distance": 3.0, "origin": "JFK", "dest": "LAX"}) == {"origin": private.hash("JFK"), "dest": "LAX"}
    assert private.hides({"origin": "JFK"}) and not private.hides({"origin": None, "dest": "LAX"})
    assert private.hash("JFK") != Private.of(spec, tmp_path / "other").hash("JFK")
    log = PredictionLog(tmp_path / "log", ["x", "distance"], ["origin"], 3_600_000_000, private)
    log._write([answered(1, rows=2, distance=1.0, origin="JFK"), answered(3, distance=2.0, origin=None)])
    log.close()
    found = read_log(tmp_path / "log")
    assert found["feature.origin"].to_pylist() == [private.hash("JFK")] * 2 + [None]
    assert "feature.distance" not in found.column_names
    raw = b"".join(p.read_bytes() for p in (tmp_path / "log").rglob("*.parquet"))
    assert b"JFK" not in raw and not spec.serve.shown("distance") and spec.serve.shown("dest")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("serve.log_drop=[carrier]", "serve.log_drop 'carrier' is part of the row key, by which labels find an answer"),
        ("serve.log_hash=[distance]", "serve.log_hash 'distance' is no text, and numbers are guessed from their hashes"),
        ("serve.log_hash=[origni]", "serve.log_hash 'origni' is neither a feature nor a field of a request; nearest: 'origin'"),
    ],
)
def test_what_cannot_be_private(setting: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        feature_list(load_spec("flights_demo", [setting]))
