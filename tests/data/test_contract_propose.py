"""Proposed rules hold on what landed, catch what is planted after, and leave alone what the spec states already."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from features.contract import check_contract
from features.contract_propose import count_rules, propose
from features.ingest import ingest
from pipelines.errors import Refused
from pipelines.home import Home, open_home
from pipelines.spec import Spec
from tests.command import millrace
from tests.data.test_contract import SOURCES, Tables, land, put, spec_of

START = datetime(2024, 5, 1, tzinfo=UTC)
ROWS = 600


def bare() -> dict[str, Any]:
    """The sources with nothing but types, keys and times."""
    sources = json.loads(json.dumps(SOURCES))
    for source in sources.values():
        for name in ("order", "references", "rows_min", "rows_shrink"):
            source.pop(name, None)
        source["columns"] = {c: {"type": d["type"] if isinstance(d, dict) else d} for c, d in source["columns"].items()}
    return dict(sources)


def tables_of(seed: int) -> Tables:
    random = np.random.default_rng(seed)
    plans, trips = [], []
    for i in range(ROWS):
        due = START + timedelta(minutes=7 * i)
        line, left = f"L{random.integers(40):02}", due + timedelta(seconds=int(random.integers(0, 60)))
        stop = None if random.random() < 0.05 else "abcz"[random.choice(4, p=[0.3, 0.3, 0.3, 0.1])]
        end = due + timedelta(minutes=int(random.integers(5, 50)))
        plans.append({"line": line, "trip": i + 1, "stop": stop, "due": due, "end": end, "told": due - timedelta(days=1)})
        trips.append({
            "line": line, "trip": i + 1, "mode": str(random.choice(["bus", "tram"])), "code": f"AB{random.integers(1000)}",
            "late": float(random.normal(5, 3)), "speed": float(random.uniform(10, 60)), "unused": None,
            "note": None if random.random() < 0.4 else "so so", "full": bool(random.integers(2)), "at": left,
            "seen": due + timedelta(minutes=2),
        })  # fmt: skip
    stops = [{"stop": s, "first": "0500", "last": "2300", "since": START - timedelta(days=9)} for s in "abc"]
    return {"plans": plans, "trips": trips, "stops": stops}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


def with_rules(proposal: dict[str, Any]) -> Spec:
    """The bare spec under the proposed rules."""
    sources = bare()
    for name, rules in proposal.items():
        columns = {**sources[name]["columns"], **rules.get("columns", {})}
        sources[name] |= {**rules, "columns": columns}
    return spec_of(sources)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_proposed_holds_on_what_landed(seed: int, home: Home) -> None:
    spec = spec_of(bare())
    snapshot = land(spec, home, tables_of(seed))
    proposal = propose(spec, home, snapshot)
    ruled = with_rules(proposal)
    assert check_contract(ruled, home, ingest(ruled, home)).accepted
    assert count_rules(proposal, spec) >= 12
    again = propose(ruled, home, ingest(ruled, home))
    assert count_rules(again, ruled) == 0, again  # nothing is left to say


def test_what_is_proposed_says_what_the_data_show(home: Home) -> None:
    spec = spec_of(bare())
    proposal = propose(spec, home, land(spec, home, tables_of(0)))
    trips, plans = proposal["trips"], proposal["plans"]
    assert trips["columns"]["mode"] == {"type": "string", "values": ["bus", "tram"]}
    assert trips["columns"]["code"]["pattern"] == "^[A-Z0-9]{3,5}$" and trips["columns"]["line"]["pattern"] == "^[A-Z0-9]{3}$"
    assert trips["columns"]["trip"] == {"type": "int64", "min": 0}  # a key grows
    assert 0 < trips["columns"]["speed"]["min"] < 10 and 60 < trips["columns"]["speed"]["max"] < 70
    assert 0.5 < trips["columns"]["note"]["nulls"] < 0.8 and trips["columns"]["unused"]["nulls"] == 1
    assert plans["order"] == [["due", "end"], ["told", "due"]]
    assert trips["references"] == [{"to": "plans", "columns": ["line", "trip"]}]
    assert plans["references"][0]["to"] == "stops" and 0.7 < plans["references"][0]["share"] < 0.95
    assert trips["rows_min"] == 300


FAULTS: dict[str, tuple[Callable[[Tables], None], str]] = {
    "another unit": (put("trips", "speed", 900.0, 3), r"trips.speed \[range\]"),
    "another value": (put("trips", "mode", "Bus", 3), r"trips.mode \[values\]"),
    "another spelling": (put("trips", "code", "ab1", 3), r"trips.code \[pattern\]"),
    "a cut text": (put("trips", "line", "L", 3), r"trips.line \[pattern\]"),
    "null": (put("trips", "full", None, 3), r"trips.full \[nulls\]"),
    "many nulls": (put("plans", "stop", None, *range(100)), r"plans.stop \[nulls\]"),
    "an order turned round": (put("plans", "end", START - timedelta(days=2), 3), r"plans \(due, end\) \[order\]"),
    "no such plan": (put("trips", "trip", 9_999, 3), r"trips \(line, trip\) \[references\]"),
    "unknown stops": (put("plans", "stop", "x", *range(200)), r"plans.stop \[references\]"),
    "few rows": (lambda tables: tables["trips"].__delitem__(slice(200, None)), r"trips \[rows_min\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_proposed_catches_what_is_planted(case: str, home: Home) -> None:
    change, where = FAULTS[case]
    spec = spec_of(bare())
    ruled = with_rules(propose(spec, home, land(spec, home, tables_of(0))))
    tables = tables_of(0)
    change(tables)
    other = open_home(home.root / "other")
    with pytest.raises(Refused, match=where):
        check_contract(ruled, other, land(ruled, other, tables))


def test_what_the_spec_states_is_kept(home: Home) -> None:
    sources = bare()
    sources["trips"]["columns"]["speed"] = {"type": "float64", "max": 1000}
    sources["plans"]["order"] = [["told", "due"]]
    spec = spec_of(sources)
    proposal = propose(spec, home, land(spec, home, tables_of(0)))
    assert "speed" not in proposal["trips"]["columns"]
    assert proposal["plans"]["order"] == [["told", "due"], ["due", "end"]]


def test_the_command_prints_yaml_and_writes_a_spec(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "specs"
    folder.mkdir()
    spec = spec_of(bare())
    (folder / "lines.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json", by_alias=True, exclude={"pipeline"})))
    land(spec, home, tables_of(0))
    told = millrace(home.root, "contract", "propose", str(folder / "lines.yaml"), "--json")
    body = told.answer
    printed = millrace(home.root, "contract", "propose", str(folder / "lines.yaml"))
    assert told.code == printed.code == 0
    assert yaml.safe_load(printed.out) == {"sources": body["sources"]} and body["rules"] >= 12
    out = folder / "ruled.yaml"
    assert millrace(home.root, "contract", "propose", str(folder / "lines.yaml"), "--out", str(out)).code == 0
    assert yaml.safe_load(out.read_text()) == {"extends": "lines.yaml", "sources": body["sources"]}
    assert millrace(home.root, "contract", "propose", "nothing").code == 2
