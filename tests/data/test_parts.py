"""Views in parts: what a snapshot takes over from the one before is what it would have made itself, byte for byte."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bench.keys import NOW, SPEC
from features import parts, windows
from features.facts import Facts, int_times
from features.ingest import cut, ingest
from features.keys import KNOWN
from features.parts import Base, edges, read_view
from features.steps import KEY, TIME
from features.store import build_features, first_needed, write_views
from features.windows import build_views, in_ranges
from pipelines.clock import DAY_US, MISSING, parse_time
from pipelines.flights import write_sample
from pipelines.home import Home, open_home
from pipelines.manifest import read_json
from pipelines.spec import load_spec
from tests.agreement import World, make_world


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few facts make a part, and the random tables span hours to months."""
    monkeypatch.setattr(parts, "FACTS", 3)
    monkeypatch.setattr(parts, "DAY_US", 1)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, World]:
    folder = tmp_path_factory.mktemp("worlds")
    return {seed: make_world(seed, folder / str(seed)) for seed in range(4_000, 4_012)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}


def until(world: World, known: int) -> dict[str, pa.Table]:
    """The facts that are known before a time."""
    return {name: t.filter(pa.array(int_times(t[KNOWN]) < known)) for name, t in world.tables.items()}


@pytest.mark.usefixtures("small")
def test_parts_that_are_taken_over_are_those_that_would_be_made(worlds: dict[int, World], tmp_path: Path) -> None:
    taken = made = 0
    for seed, world in worlds.items():
        times = np.sort(np.concatenate([int_times(t[KNOWN]) for t in world.tables.values()]))
        begin = int(times[len(times) * 3 // 4])
        old, whole, grown = (tmp_path / str(seed) / name for name in ("old", "whole", "grown"))
        write_views(world.spec, until(world, begin), old)
        write_views(world.spec, world.tables, whole)
        new = {name: t.filter(pa.array(int_times(t[KNOWN]) >= begin)) for name, t in world.tables.items()}
        write_views(world.spec, world.tables, grown, base=Base(old, frozenset(files_of(old)), new))
        assert files_of(grown) == files_of(whole), seed
        made += len(files_of(whole))
        taken += sum(path.stat().st_nlink > 1 for path in grown.rglob("*.parquet"))
    assert 25 < taken < made


@pytest.mark.usefixtures("small")
def test_a_part_that_a_late_fact_changes_is_made_again(worlds: dict[int, World], tmp_path: Path) -> None:
    """The base lacks a fact that was known early: no part that ends after that is taken over."""
    for seed, world in [*worlds.items()][:10]:
        name = max(world.tables, key=lambda n: world.tables[n].num_rows)
        table = world.tables[name]
        at = int(np.argsort(int_times(table[KNOWN]))[table.num_rows // 3])
        lacks = np.arange(table.num_rows) != at
        old, whole, grown = (tmp_path / str(seed) / n for n in ("old", "whole", "grown"))
        write_views(world.spec, {**world.tables, name: table.filter(pa.array(lacks))}, old)
        write_views(world.spec, world.tables, whole)
        new = {n: t.slice(0, 0) for n, t in world.tables.items()} | {name: table.slice(at, 1)}
        write_views(world.spec, world.tables, grown, base=Base(old, frozenset(files_of(old)), new))
        assert files_of(grown) == files_of(whole), seed


@pytest.mark.usefixtures("small")
def test_the_parts_together_hold_the_steps_of_the_whole(worlds: dict[int, World], tmp_path: Path) -> None:
    several = 0
    for seed, world in worlds.items():
        write_views(world.spec, world.tables, tmp_path / str(seed) / "f")
        facts = Facts(world.spec, world.tables)
        for name in world.spec.features.views:
            several += len(edges(facts, name)) > 1
            for stored, table in build_views(facts, name):
                whole = table.set_column(0, KEY, table[KEY].cast(pa.string())).select([KEY, TIME, *stored.integers])
                read = read_view(tmp_path / str(seed) / "f", stored.name)
                assert read.set_column(0, KEY, read[KEY].cast(pa.string())).select(whole.column_names).equals(whole), seed
    assert several > 8


@pytest.mark.usefixtures("small")
def test_a_view_that_is_built_in_ranges_of_its_keys_is_the_same_file(
    worlds: dict[int, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "GROUP", 7)
    several = groups = 0
    for seed, world in [*worlds.items()][:8]:
        whole, ranges = (tmp_path / str(seed) / name for name in ("whole", "ranges"))
        write_views(world.spec, world.tables, whole)
        with monkeypatch.context() as some:
            some.setattr(windows, "RANGE", 5)
            write_views(world.spec, world.tables, ranges)
            several += sum(len([*in_ranges(Facts(world.spec, world.tables), v, MISSING)]) > 1 for v in world.spec.features.views)
        assert files_of(ranges) == files_of(whole), seed
        groups += sum(pq.read_metadata(path).num_row_groups > 1 for path in whole.rglob("*.parquet"))
    assert several > 12 and groups > 12


@pytest.mark.parametrize("view", ["spending", "last_visit"])
def test_ranges_of_many_keys_are_few_facts_each(view: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(windows, "RANGE", 1_000)
    (tmp_path / "keys.yaml").write_text(SPEC)
    customers = np.random.default_rng(0).permutation(10_000)
    at = pa.array(np.full(10_000, NOW)).cast(pa.timestamp("us", "UTC"))
    visits = pa.table({"visit": np.arange(10_000), "customer": customers, "at": at, KNOWN: at, "spent": np.ones(10_000)})
    facts = Facts(load_spec(str(tmp_path / "keys.yaml")), {"visits": visits})
    found = [some.names("visits", ["customer"]).to_pylist() for some, _ in in_ranges(facts, view, NOW - DAY_US)]
    assert 10 <= len(found) <= 20 and max(map(len, found)) < 1_500
    assert [name for names in found for name in sorted(names)] == sorted(str(c) for c in range(10_000))


def test_more_facts_do_not_move_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FACTS", 10)
    spec = load_spec("flights")
    dice = np.random.default_rng(0)
    known = np.sort(dice.integers(parse_time("2013-01-01T00:00:00Z"), parse_time("2013-03-01T00:00:00Z"), 2_000))

    def found(n: int) -> list[int]:
        tables = dict.fromkeys(spec.sources, pa.table({KNOWN: pa.array(known[:n]).cast(pa.timestamp("us", "UTC"))}))
        return edges(Facts(spec, tables), "departures_origin")

    every = found(2_000)
    assert 5 < len(every) < 70 and every[0] == MISSING and all(e % DAY_US == 0 for e in every[1:])
    for n in range(0, 2_000, 97):
        assert found(n) == every[: len(found(n))]
        assert all(e <= known[n - 1] for e in found(n)[1:])


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = open_home(tmp_path_factory.mktemp("home"))
    write_sample(home.landing("flights"), until_us=parse_time("2013-01-31T12:00:00Z"))
    return home


@pytest.mark.slow
def test_a_day_more_of_flights_takes_over_what_lies_before(month: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FACTS", 2_000)
    spec = load_spec("flights")
    new = ingest(spec, month)
    old = cut(spec, month, new, new.watermark_us - DAY_US)
    since = first_needed(spec, new.watermark_us)
    before, after = (build_features(spec, month, s, since=since) for s in (old, new))
    folder = month.root / after.path
    shared = [p for p in folder.glob("views/*/*.parquet") if p.stat().st_nlink > 1]
    assert len(shared) > 100 and before.digest != after.digest
    done = read_json(folder / "done.json")["files"]
    for path in (month.root / "features" / "flights").rglob("done.json"):
        path.unlink()  # nothing to take over
    assert build_features(spec, month, new, since=since) == replace(after, line=after.line)
    assert read_json(folder / "done.json")["files"] == done
    rows = sum(pq.read_metadata(p).num_rows for p in folder.glob("views/*/*.parquet"))
    assert rows == after.rows and pc.max(read_view(folder, "departures_all_1h")[TIME]).cast(pa.int64()).as_py() > since
