"""The served store in SQLite, Redis and Postgres: one contract, real servers."""

import gc
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from features import feed as feeding
from features import online, rows
from features.cells import (
    Change,
    Event,
    Held,
    Meta,
    Moved,
    RedisCells,
    SqliteCells,
    StoreDown,
    Update,
    copy_cells,
    open_cells,
    writable_cells,
)
from features.feed import feed
from features.online import OnlineStore, serve_features
from features.rows import online_rows
from features.store import write_views
from pipelines.clock import Anchor, wall_us
from pipelines.errors import MillraceError
from tests.agreement import features_at, frame_differences, make_world, served_differences
from tests.servers import NAMES, REMOTE, Server, valve

KEYS = ["", "a", "a\x1fb", "é\x1f🐟", "x" * 300]


def fill(place: str, mark: str, keys: list[str] = KEYS, *, whole: bool = True) -> bool:
    cells = [(view, key, f"{mark}{view}{key}".encode()) for view in ("one", "two") for key in keys]
    return writable_cells(place).feed(lambda held: Update({"mark": mark, "before": held.get("mark", "")}, iter(cells), whole))


def look(cells: Held) -> tuple[str, dict[str, bytes], dict[str, bytes]]:
    one, two = cells.get([("one", KEYS), ("two", ["a", "no such key"])])
    return cells.meta()["mark"], one, two


def test_what_was_fed_is_read(place: str) -> None:
    assert fill(place, "m")
    cells = open_cells(place)
    mark, one, two = look(cells)
    assert mark == "m" and one == {key: f"mone{key}".encode() for key in KEYS} and two == {"a": b"mtwoa"}
    assert cells.get([("one", []), ("three", ["a"])]) == [{}, {}]
    assert cells.keys("one") == sorted(KEYS) and cells.keys("three") == []


def test_a_copy_holds_one_state_and_is_not_fed(place: str, tmp_path: Path) -> None:
    """Also of a store that is fed while it is copied, and over what an earlier copy has left."""
    fill(place, "m", [*KEYS, *map(str, range(50))])
    folder = tmp_path / "copy"
    for _ in range(2):
        copy_cells(place, folder, ["one", "two"])
    held, copied = open_cells(place), open_cells(folder)
    assert copied.meta() == held.meta()
    for view in ("one", "two"):
        keys = held.keys(view)
        assert copied.keys(view) == keys and copied.get([(view, keys)]) == held.get([(view, keys)]) and len(keys) == 55
    fill(place, "n")
    assert look(copied)[0] == "m"
    writer = threading.Thread(target=lambda: [fill(place, str(turn)) and time.sleep(0.05) for turn in range(8)])
    writer.start()
    for _ in range(2):
        copy_cells(place, folder, ["one", "two"])
        mark, one, two = look(open_cells(folder))
        assert two == {"a": f"{mark}twoa".encode()} and one == {key: f"{mark}one{key}".encode() for key in KEYS}
    writer.join()


def test_a_file_is_let_go_with_its_last_user(tmp_path: Path) -> None:
    """Not at some later garbage collection: until then its log would stay, and the file be in use."""
    gc.disable()
    try:
        fill(str(tmp_path), "m")
        assert [path.name for path in tmp_path.iterdir()] == ["store.sqlite"]
    finally:
        gc.enable()


def test_a_purge_says_so_while_a_reader_keeps_what_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path), "m")
    monkeypatch.setattr(SqliteCells, "WAIT_S", 0.2)
    reader, writer = open_cells(tmp_path), writable_cells(tmp_path)
    with reader.reading():
        assert look(reader)[0] == "m"
        with pytest.raises(MillraceError, match="is in use by another process, and may still hold what was deleted"):
            writer.purge([])
    writer.purge([])


def test_a_feed_replaces_everything_and_sees_what_was_there(place: str) -> None:
    fill(place, "m")
    assert fill(place, "n", ["b"])
    cells = open_cells(place)
    assert cells.meta()["before"] == "m" and cells.get([("one", [*KEYS, "b"])]) == [{"b": b"noneb"}]


def test_a_feed_that_is_not_needed_writes_nothing(place: str) -> None:
    fill(place, "m")
    assert not writable_cells(place).feed(lambda held: None)
    assert look(open_cells(place))[0] == "m"


@pytest.mark.parametrize("part", range(40))
def test_a_writer_killed_while_it_makes_the_file_leaves_an_empty_store(tmp_path: Path, part: int) -> None:
    start = time.perf_counter()
    writable_cells(tmp_path / "timed")
    took = time.perf_counter() - start
    child = os.fork()
    if not child:
        writable_cells(tmp_path / "killed")
        time.sleep(60)
    time.sleep(took * part / 30)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert open_cells(tmp_path / "killed").meta() == {}
    assert fill(str(tmp_path / "killed"), "m") and look(open_cells(tmp_path / "killed"))[0] == "m"


def test_a_feed_that_breaks_leaves_what_was_there(place: str) -> None:
    def broken() -> Iterator[Change]:
        yield from (("one", str(i), b"new") for i in range(5_000))
        raise RuntimeError("the disk is gone")

    fill(place, "m")
    with pytest.raises(RuntimeError):
        writable_cells(place).feed(lambda held: Update({"mark": "broken"}, broken()))
    assert look(open_cells(place))[:2] == ("m", {key: f"mone{key}".encode() for key in KEYS})
    assert fill(place, "n")  # nothing is locked


def test_a_writer_killed_in_the_midst_of_a_feed_leaves_what_was_there_and_keeps_nobody_out(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(RedisCells, "LOCK_S", 2)
    fill(place, "m")
    at_work, told = os.pipe()

    def endless() -> Iterator[Change]:
        yield from (("one", str(i), b"new") for i in range(5_000))
        os.write(told, b".")
        time.sleep(60)

    child = os.fork()
    if not child:
        writable_cells(place).feed(lambda held: Update({"mark": "killed"}, endless()))
    os.read(at_work, 1)
    assert look(open_cells(place))[0] == "m"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert look(open_cells(place))[:2] == ("m", {key: f"mone{key}".encode() for key in KEYS})
    assert fill(place, "n") and look(open_cells(place))[0] == "n"
    assert open_cells(place).meta()["before"] == "m" and open_cells(place).keys("one") == sorted(KEYS)


@pytest.mark.redis
def test_a_feed_that_takes_longer_than_the_lock_keeps_others_out(redis: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RedisCells, "LOCK_S", 0.3)
    place = f"{redis.url}#test/{next(NAMES)}"
    begun = threading.Event()

    def slow(held: Meta) -> Update:
        begun.set()
        time.sleep(1)
        return Update({"mark": "slow", "before": held.get("mark", "")}, iter([("one", "a", b"1")]))

    writer = threading.Thread(target=lambda: writable_cells(place).feed(slow))
    writer.start()
    begun.wait()
    fill(place, "next")
    writer.join()
    assert open_cells(place).meta()["mark"] == "next" and open_cells(place).meta()["before"] == "slow"


def test_what_is_purged_is_gone_and_the_rest_is_there(place: str) -> None:
    events = [Event(name, "trips", json.dumps({"rider": f"secret-{name}"}), wall_us()) for name in ("one", "two", "three")]
    cells = writable_cells(place)
    fill(place, "m")
    cells.feed(lambda held: Update({"mark": "m"}, (), whole=False, events=events))
    cells.put("feast:riders", {"one": b"secret-one"}, lambda new, held: True)
    fill(other := place + "-other", "m")
    writable_cells(other).put("feast:riders", {"one": b"1"}, lambda new, held: True)
    cells.purge(["one", "nobody"])
    assert [event.id for event in open_cells(place).events()] == ["two", "three"]
    assert writable_cells(place).seen(["one", "two"]) == {"two"}
    assert open_cells(place).get([("feast:riders", ["one"])]) == [{}]
    assert look(open_cells(place))[:2] == ("m", {key: f"mone{key}".encode() for key in KEYS})
    assert open_cells(other).get([("feast:riders", ["one"])]) == [{"one": b"1"}]
    cells.feed(lambda held: Update({}, (), whole=False, events=[Event("four", "trips", "{}", wall_us())]))
    assert [event.number for event in open_cells(place).events()] == [2, 3, 4]  # no number is given twice
    if "://" not in place:
        left = b"".join(path.read_bytes() for path in Path(place).iterdir())
        assert b"secret-two" in left and b"secret-one" not in left


@pytest.mark.redis
def test_a_purge_removes_what_earlier_feeds_have_left_in_redis(redis: Server) -> None:
    place = f"{redis.url}#test/{next(NAMES)}"
    fill(place, "m")
    fill(place, "n")
    cells = writable_cells(place)
    assert isinstance(cells, RedisCells)
    pattern, views = f"{cells.name}:*", {"one", "two"}
    assert len([name for name in cells.db.scan_iter(pattern) if name.decode().rpartition(":")[2] in views]) == 4
    cells.purge([])
    assert len([name for name in cells.db.scan_iter(pattern) if name.decode().rpartition(":")[2] in views]) == 2
    assert look(open_cells(place))[0] == "n"


def test_a_reader_sees_one_state_while_a_feed_goes_on(place: str) -> None:
    fill(place, "m")
    reader = open_cells(place)
    with reader.reading():
        before = look(reader)
        fill(place, "n")
        try:
            assert look(reader) == before
        except Moved:
            assert "://" in place  # it is read again
    assert look(reader)[0] == "n" and look(reader)[2] == {"a": b"ntwoa"}


def test_no_reader_sees_a_state_between_two_feeds(place: str) -> None:
    fill(place, "0")
    writer = threading.Thread(target=lambda: [fill(place, str(i), whole=i % 3 == 0) for i in range(1, 40)])
    reader, seen = open_cells(place), set()
    writer.start()
    while writer.is_alive() or not seen:
        try:
            with reader.reading():
                two = [look(reader) for _ in range(2)]
        except Moved:
            continue
        for mark, one, other in two:
            assert one == {key: f"{mark}one{key}".encode() for key in KEYS} and other == {"a": f"{mark}twoa".encode()}
        assert two[0] == two[1]
        seen.add(two[0][0])
    writer.join()
    assert look(reader)[0] == "39" and len(seen) > 1


def test_two_writers_at_once_come_one_after_the_other(place: str) -> None:
    fill(place, "m")
    writers = [threading.Thread(target=fill, args=(place, mark)) for mark in "pqrs"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    mark, one, _ = look(open_cells(place))
    assert mark in "pqrs" and one == {key: f"{mark}one{key}".encode() for key in KEYS}
    assert open_cells(place).meta()["before"] in set("mpqrs") - {mark}


def test_a_store_that_was_never_fed(place: str, tmp_path: Path) -> None:
    spec = make_world(1, tmp_path).spec
    with pytest.raises(MillraceError, match="run `millrace run"):
        OnlineStore(spec, place)


@pytest.mark.parametrize("seed", range(3000, 3006))
def test_what_is_served_agrees_with_the_oracle(
    seed: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, feeding, online):
        monkeypatch.setattr(module, "RECENT", 2**60)
    world = make_world(seed, tmp_path)
    folder = tmp_path / "features"
    write_views(world.spec, world.tables, folder)
    pq.write_table(online_rows(world.spec, world.tables, world.snapshot.watermark_us), folder / "online_rows.parquet")
    assert feed(world.spec, folder, place, Anchor(-(2**60), 0), world.snapshot.digest)
    assert not feed(world.spec, folder, place, Anchor(-(2**60), 0), world.snapshot.digest)  # it goes only forward
    served, asked = OnlineStore(world.spec, place), world.asked()
    assert frame_differences(world.spec, features_at(served, asked), world.expected(asked), "row") == []
    assert served_differences(world, served) == []


def test_an_answer_is_of_one_state_also_where_a_feed_comes_in_its_midst(place: str, tmp_path: Path) -> None:
    world = make_world(3000, tmp_path)
    folder, request, fed = tmp_path / "features", world.case.requests[0], []
    write_views(world.spec, world.tables, folder)
    pq.write_table(online_rows(world.spec, world.tables, world.snapshot.watermark_us), folder / "online_rows.parquet")
    feed(world.spec, folder, place, Anchor(0, 0), "0")
    store = OnlineStore(world.spec, place)

    def now() -> int:
        state = store.anchor().data_us
        if len(fed) < 3:
            fed.append(feed(world.spec, folder, place, Anchor(state + 1, 0), str(len(fed) + 1)))
        return state

    served = serve_features(store, [request.version], now)
    assert served.now == int(served.looked.snapshot)  # feed number n is at n µs
    assert len(fed) == (3 if "://" in place else 1)


@pytest.mark.redis
def test_redis_may_forget_the_script_and_close_the_line(redis: Server) -> None:
    place = f"{redis.url}#test/{next(NAMES)}"
    fill(place, "m")
    cells = open_cells(place)
    assert isinstance(cells, RedisCells)
    found = [look(cells)]
    cells.db.script_flush()
    found.append(look(cells))
    other = open_cells(place)
    assert isinstance(other, RedisCells)
    other.db.client_kill_filter(_type="normal", skipme=True)
    found += [look(cells), look(cells)]
    assert found[1:] == found[:1] * 3


@pytest.mark.parametrize("kind", REMOTE)
def test_a_server_that_is_down_is_said_and_comes_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server: Server = request.getfixturevalue(kind)
    place = f"{server.url}#test/{next(NAMES)}"
    world = make_world(3000, tmp_path)
    folder = tmp_path / "features"
    write_views(world.spec, world.tables, folder)
    pq.write_table(online_rows(world.spec, world.tables, world.snapshot.watermark_us), folder / "online_rows.parquet")
    feed(world.spec, folder, place, Anchor(0, 0), world.snapshot.digest)
    served, request_ = OnlineStore(world.spec, place), world.case.requests[0]
    before = serve_features(served, [request_.version], request_.t)
    server.kill()
    try:
        with pytest.raises(StoreDown, match=f"{server.port}.* does not answer"):
            serve_features(served, [request_.version], request_.t)
        rest = serve_features(served.without_cells(), [request_.version], request_.t)
        assert rest.looked.unknown.all() and served.without_cells().anchor() == Anchor(0, 0)
        with pytest.raises(StoreDown):
            feed(world.spec, folder, place, Anchor(1, 0), "another")
    finally:
        server.start()
    deadline = time.monotonic() + 30
    while True:
        try:
            again = serve_features(served, [request_.version], request_.t)
            break
        except StoreDown:  # it is starting up
            assert time.monotonic() < deadline
            time.sleep(0.2)
    for name, values in before.frame.items():
        assert np.array_equal(again.frame[name], values, equal_nan=values.dtype != object), name


@pytest.mark.parametrize("kind", REMOTE)
def test_a_server_that_takes_questions_and_says_nothing_is_not_waited_for(kind: str, request: pytest.FixtureRequest) -> None:
    """Whether it was asked before, or hangs while a connection is made; it is asked again when it answers."""
    server: Server = request.getfixturevalue(kind)
    with valve(server.port) as line:
        place = f"{server.url.replace(str(server.port), str(line.port))}#test/{next(NAMES)}"
        fill(place, "m")
        cells = open_cells(place, wait_s=0.2)
        before = look(cells)
        line.open.clear()
        for asked in (cells, cells, open_cells(place, wait_s=0.2)):
            began = time.monotonic()
            with pytest.raises(StoreDown, match=f"{line.port}.* does not answer"):
                asked.get([("one", KEYS)])
            assert 0.15 < time.monotonic() - began < 1.2
        line.open.set()
        assert look(cells) == before


@pytest.mark.postgres
def test_a_writer_gives_up_a_server_that_says_nothing(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a feed: nothing of it is written, and the next one is not kept out."""
    monkeypatch.setattr("features.cells.LONG_S", 1.0)
    with valve(postgres.port) as line:
        place = f"{postgres.url.replace(str(postgres.port), str(line.port))}#test/{next(NAMES)}"
        fill(place, "m")
        before = look(open_cells(place))

        def shut() -> Iterator[Change]:
            yield from (("one", str(i), b"new") for i in range(5_000))
            line.open.clear()

        began = time.monotonic()
        with pytest.raises(StoreDown, match=rf"{line.port}.* does not answer \(no answer within 1 s\)"):
            writable_cells(place).feed(lambda held: Update({"mark": "new"}, shut()))
        with pytest.raises(StoreDown, match=f"{line.port}.* does not answer"):
            open_cells(place).keys("one")
        assert time.monotonic() - began < 10
        line.open.set()
        assert look(open_cells(place)) == before
        assert fill(place, "n") and look(open_cells(place))[0] == "n"
