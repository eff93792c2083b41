"""The endpoint: what a wrong request is told, and what a right one says of unknown, closed and far-off rows.

Two live endpoints: tumours (no time, a text key), and the buses of `buses.py` (a data clock at noon, all key types).
"""

import http.client
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from deploy.bundle import Bento
from deploy.preflight import different_cells, preflight
from deploy.process import Service, call
from deploy.rollout import champion, events, release_run
from features.store import build_features, historical_features
from pipelines.home import Home
from pipelines.manifest import Artifact, write_json
from pipelines.run import Run
from tests.e2e.buses import EVERY, NOW, Buses, trip_at
from tests.e2e.releases import by_steps

ROUTES = ("/predict", "/predict_features")
SOON = trip_at(NOW + 2 * EVERY)  # due in 12 minutes, asked 10 minutes before: within the tolerance
LATER = trip_at(NOW + timedelta(hours=5))
GONE = trip_at(NOW - timedelta(hours=5))
NOBODY = {"line": "L9", "day": "2024-05-06T00:00:00Z", "trip": 1}


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence of a refusal; fails for a 5xx, a body that is not JSON, and one that shows a trace."""
        assert 400 <= self.status < 500, (self.status, self.body)
        assert self.headers["content-type"] == "application/json"
        text = self.body.decode("ascii")
        assert not re.search(r"Traceback|File |\.py\b|line \d+, in", text), text
        assert len(text) < 2_000
        sentence = self.json["error"]
        assert isinstance(sentence, str) and len(sentence) > 10
        return sentence


@pytest.fixture
def service(buses_service: Service) -> Service:
    return buses_service


@pytest.fixture(scope="module", params=["buses", "tumours"])
def url(request: pytest.FixtureRequest) -> str:
    """Each of the two endpoints."""
    if request.param == "buses":
        return str(request.getfixturevalue("buses_service").url)
    return str(request.getfixturevalue("tumours_url"))


def send(
    url: str, body: bytes | Iterator[bytes] | None, *, method: str = "POST", headers: dict[str, str] | None = None
) -> Answer:
    """One request as it is, byte by byte."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=30)
    try:
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, at.path, body, given, encode_chunked=not isinstance(body, bytes | None))
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()})
    finally:
        connection.close()


def ask(url: str, *rows: Any) -> Answer:
    return send(f"{url}/predict", json.dumps({"rows": rows}).encode())


def row_of(url: str, route: str) -> dict[str, Any]:
    """A good row for a route of an endpoint."""
    timed = call(f"{url}/info")[1]["clock"] is not None
    if route == "/predict":
        return dict(SOON) if timed else {"row_digest": "0" * 64}
    return {"line": "L1", "length": 4.5} if timed else {"mean_radius": 14.0}


def good(url: str, route: str, rows: int = 1) -> bytes:
    return json.dumps({"rows": [row_of(url, route)] * rows}).encode()


# --- wrong bodies, at either route of either endpoint ---

NOT_JSON = 'the body is not JSON ('
SHAPE = 'send an object with one field, {"rows": [{…}, …]}'
BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, NOT_JSON),
    "cut short": (b'{"rows": [{', 400, NOT_JSON),
    "a form": (b"rows=1&line=L1", 400, NOT_JSON),
    "trailing comma": (b'{"rows": [{}],}', 400, NOT_JSON),
    "two objects": (b'{"rows": [{}]} {"rows": [{}]}', 400, NOT_JSON),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", 400, NOT_JSON),
    "bad UTF-8": (b'{"rows": [{"line": "caf\xe9"}]}', 400, NOT_JSON),
    "UTF-8 with a mark": (b'\xef\xbb\xbf{"rows": [{"zzz": 1}]}', 422, "rows[0].zzz: unknown field"),
    "cut in a character": ('{"rows": "é'.encode()[:-1], 400, NOT_JSON),
    "a NUL": (b"\x00" * 100, 400, NOT_JSON),
    "deep lists": (b"[" * 100_000 + b"]" * 100_000, 400, NOT_JSON),
    "deep objects": (b'{"rows":' * 50_000 + b"1" + b"}" * 50_000, 400, NOT_JSON),
    "deep in a row": (b'{"rows": [{"line": ' + b"[" * 500 + b"]" * 500 + b"}]}", 422, "rows[0]"),
    "a huge whole number": (b'{"rows": [{"trip": ' + b"9" * 100_000 + b"}]}", 400, NOT_JSON),
    "null": (b"null", 422, SHAPE),
    "a list": (b'[{"line": "L1"}]', 422, SHAPE),
    "a text": (b'"rows"', 422, SHAPE),
    "a number": (b"17", 422, SHAPE),
    "no rows field": (b'{"row": [{}]}', 422, SHAPE),
    "a field more": (b'{"rows": [{}], "more": 1}', 422, SHAPE),
    "rows are null": (b'{"rows": null}', 422, SHAPE),
    "rows are an object": (b'{"rows": {"line": "L1"}}', 422, SHAPE),
    "0 rows": (b'{"rows": []}', 422, "0 rows; send 1 to 1,000"),
    "1,001 rows": (json.dumps({"rows": [{}] * 1_001}).encode(), 422, "1001 rows; send 1 to 1,000"),
    "a row is null": (b'{"rows": [null]}', 422, "rows[0] is null; send an object of fields"),
    "a row is a list": (b'{"rows": [[1, 2]]}', 422, "rows[0] is a list; send an object of fields"),
    "a row is a text": (b'{"rows": ["L1"]}', 422, "rows[0] is text; send an object of fields"),
    "NaN": (b'{"rows": [{"length": NaN}]}', 422, "NaN is not a number that can be answered; leave the field out"),
    "Infinity": (b'{"rows": [{"length": Infinity}]}', 422, "Infinity is not a number that can be answered"),
    "-Infinity": (b'{"rows": [{"length": -Infinity}]}', 422, "-Infinity is not a number that can be answered"),
    "an unknown field": (b'{"rows": [{"colour": "red"}]}', 422, "rows[0].colour: unknown field (known: "),
    "a name of half a character": (b'{"rows": [{"\\ud83d": 1}]}', 422, "unknown field (known: "),
    "a name of 100,000 letters": (b'{"rows": [{"' + b"x" * 100_000 + b'": 1}]}', 422, "unknown field (known: "),
    "an empty name": (b'{"rows": [{"": 1}]}', 422, "rows[0].: unknown field"),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", BODIES)
def test_a_wrong_body(url: str, route: str, case: str) -> None:
    body, status, expected = BODIES[case]
    answer = send(f"{url}{route}", body)
    assert expected in answer.error and answer.status == status


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("how", ["at once", "in chunks", "announced"])
def test_a_body_of_10_mb(url: str, route: str, how: str) -> None:
    piece = b" " * 100_000
    if how == "announced":  # the header alone is enough
        answer = send(f"{url}{route}", b"{}", headers={"Content-Length": "10000000"})
    else:
        answer = send(f"{url}{route}", piece * 100 if how == "at once" else iter([piece] * 100))
    assert answer.status == 413
    assert "at most 4,000,000 are taken" in answer.error or "larger than 4,000,000 bytes" in answer.error


@pytest.mark.parametrize("length", ["abc", "-1", "1e3", ""])
def test_a_length_that_is_no_number(url: str, length: str) -> None:
    assert 400 <= send(f"{url}/predict", b"{}", headers={"Content-Length": length}).status < 500


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("route", ROUTES)
def test_another_method(url: str, route: str, method: str) -> None:
    answer = send(f"{url}{route}", None, method=method)
    assert answer.status == 405 and answer.headers["allow"] == "POST"
    assert answer.error == f"{method} is not answered here; send POST {route}"


def test_another_path(url: str) -> None:
    for path in ("/predicts", "/predict/1", "/preflight/features", "/preflight/modules"):
        answer = send(f"{url}{path}", b"{}")
        assert (answer.status, answer.body) == (404, b"Not Found")
    answer = send(f"{url}/info", b"{}")
    assert answer.status == 405 and answer.error == "POST is not answered here; send GET /info"


@pytest.mark.parametrize("route", ROUTES)
def test_1_and_1000_rows_are_answered(url: str, route: str) -> None:
    for rows in (1, 1_000):
        answer = send(f"{url}{route}", good(url, route, rows))
        assert answer.status == 200 and len(answer.json["rows"]) == rows
        assert all(0 < row["probability"] < 1 for row in answer.json["rows"])


@pytest.mark.parametrize("route", ROUTES)
def test_random_damage_is_never_a_5xx(url: str, route: str) -> None:
    """Bytes of good requests changed, dropped, doubled; values replaced by others of every kind."""
    draw = random.Random(11)
    whole, row = good(url, route, 2), row_of(url, route)
    odd = [None, True, 0, -1, 2**63, -(2**63), 10**30, 1.5, 1e300, -1e300, 5e-324, "", "x" * 999, "\u0000", "\ud800",
           "😀", [], {}, [[]], "2024-05-06", "0001-01-01T00:00Z", "9999-12-31T23:59:59.999999-23:59", "NaN"]  # fmt: skip
    for _ in range(150):
        if draw.random() < 0.5:
            body = bytearray(whole)
            for _ in range(draw.randrange(1, 6)):
                at = draw.randrange(len(body))
                body[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        else:
            changed = {name: draw.choice(odd) if draw.random() < 0.6 else value for name, value in row.items()}
            body = bytearray(json.dumps({"rows": [changed]}).encode())
        answer = send(f"{url}{route}", bytes(body))
        assert answer.status < 500, (bytes(body), answer.body)
        assert answer.status == 200 or answer.error


@pytest.mark.parametrize("value", [1e300, -1e300, 9.2e18, -9.2e18, 5e-324, 0, -0.0])
def test_extreme_numbers_are_answered_or_refused(url: str, value: float) -> None:
    """As every feature at once: where it is answered, with a probability."""
    names = {"L1": ("length", "low_floor", "seats", "pace")}.get(row_of(url, "/predict_features").get("line", ""),
                                                              ("mean_radius", "worst_area", "area_error"))  # fmt: skip
    answer = send(f"{url}/predict_features", json.dumps({"rows": [dict.fromkeys(names, value)]}).encode())
    if abs(value) > 1e19:
        assert answer.status == 422 and "is out of range; send a finite number" in answer.error
    else:
        assert answer.status == 200 and 0 <= answer.json["rows"][0]["probability"] <= 1


# --- wrong values, at the buses, whose key has every type ---

VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "text for a whole number": ({**SOON, "trip": "5002"}, "rows[0].trip is text; send a whole number"),
    "fraction for a whole number": ({**SOON, "trip": 5002.0}, "rows[0].trip is a number; send a whole number"),
    "truth for a whole number": ({**SOON, "trip": True}, "rows[0].trip is true or false; send a whole number"),
    "list for a whole number": ({**SOON, "trip": [5002]}, "rows[0].trip is a list; send a whole number"),
    "number for text": ({**SOON, "line": 1}, "rows[0].line is a number; send a text"),
    "object for text": ({**SOON, "line": {}}, "rows[0].line is an object; send a text"),
    "number for a time": ({**SOON, "day": 1714953600}, 'rows[0].day is a number; send a time such as "2013-12-30T12:00:00Z"'),
    "naive time": ({**SOON, "day": "2024-05-06T00:00:00"}, "rows[0].day: '2024-05-06T00:00:00' has no time zone: write"),
    "no time": ({**SOON, "day": "today"}, "rows[0].day: 'today' is not a time: write ISO 8601 such as"),
    "year 1": ({**SOON, "day": "0001-01-01T00:00:00Z"}, "rows[0].day is out of range; send a time in the years 2 to 9998"),
    "beyond year 9999": ({**SOON, "day": "9999-12-31T23:59:59-23:59"}, "rows[0].day is out of range"),
    "text for a number": ({**NOBODY, "length": "long"}, "rows[0].length is text; send a number"),
    "number for a truth": ({**NOBODY, "low_floor": 1}, "rows[0].low_floor is a number; send a true or false"),
    "null key": ({**SOON, "trip": None}, "rows[0].trip is missing; send a whole number"),
    "no key": ({"line": "L1"}, "rows[0].day is missing; send a time such as"),
    "an empty row": ({}, "rows[0].line is missing; send a text"),
    "the nearest field": ({**SOON, "lenght": 1.0}, "rows[0].lenght: unknown field (known: line, day, trip, stop, due, end, "
                                                   "length, low_floor, seats; nearest: 'length')"),
    "a field that no request has": ({**SOON, "told": "2024-05-06"}, "rows[0].told: unknown field"),
    "a long text": ({**SOON, "line": "L" * 1001}, "rows[0].line is longer than 1,000 characters"),
    "a separator": ({**SOON, "line": "L\x1f1"}, "rows[0].line is longer than 1,000 characters, or holds a control"),
    "half a character": ({**SOON, "line": "L\ud800"}, "or holds a control or a half character"),
    "too large": ({**SOON, "trip": 2**63}, "rows[0].trip is out of range; send a finite number"),
    "too small": ({**SOON, "trip": -(2**63) - 1}, "rows[0].trip is out of range; send a finite number"),
    "too large a fraction": ({**NOBODY, "length": 1e300}, "rows[0].length is out of range"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_a_wrong_value(service: Service, case: str) -> None:
    row, expected = VALUES[case]
    answer = ask(service.url, SOON, row)  # the second row is the wrong one
    assert expected.replace("rows[0]", "rows[1]") in answer.error and answer.status == 422


@pytest.mark.parametrize("text", ["1e999", "-1e999", "1e400"])
def test_a_number_beyond_all(service: Service, text: str) -> None:
    body = json.dumps({"rows": [{**NOBODY, "length": 17.5}]}).replace("17.5", text)
    answer = send(f"{service.url}/predict", body.encode())
    assert answer.status == 422 and "rows[0].length is out of range; send a finite number" in answer.error
    answer = send(f"{service.url}/predict_features", b'{"rows": [{"length": %s}]}' % text.encode())
    assert answer.status == 422 and "rows[0].length is out of range; send a finite number" in answer.error


def test_an_unknown_feature_names_the_nearest(service: Service) -> None:
    answer = send(f"{service.url}/predict_features", b'{"rows": [{"lenght": 1}]}')
    assert answer.status == 422 and "nearest: 'length'" in answer.error
    answer = send(f"{service.url}/predict_features", b'{"rows": [{"line": 4}]}')
    assert answer.status == 422 and "rows[0].line is a number; send a text" in answer.error


# --- rows that are known, unknown, closed, far off ---


def test_a_row_within_the_tolerance(service: Service) -> None:
    answer = ask(service.url, SOON)
    row = answer.json["rows"][0]
    assert answer.status == 200 and answer.json["now"] == "2024-05-06T12:00:00Z"
    assert row["key"] == SOON and not row["unknown_entity"] and not row["outside_horizon"]


def test_a_row_outside_the_tolerance(service: Service) -> None:
    """The first instants outside it on either side, too."""
    assert [r["outside_horizon"] for r in ask(service.url, LATER).json["rows"]] == [True]
    inside, outside = ["2024-05-06T12:05:00Z", "2024-05-06T12:15:00Z"], ["2024-05-06T12:04:59.999999Z", "2024-05-06T12:15:01Z"]
    answer = ask(service.url, *({**NOBODY, "due": due} for due in (*inside, *outside)))
    assert answer.status == 200
    assert [r["outside_horizon"] for r in answer.json["rows"]] == [False, False, True, True]


def test_an_unknown_row(service: Service) -> None:
    answer = ask(service.url, NOBODY)
    row = answer.json["rows"][0]
    assert answer.status == 200 and row["unknown_entity"] and row["outside_horizon"] and 0 < row["probability"] < 1
    assert {"length", "low_floor", "seats", "local_weekday", "place__zone", "pace"} <= set(row["missing"])
    assert "line" not in row["missing"]


def test_request_fields_stand_in_for_an_unknown_row(service: Service) -> None:
    given = {"stop": "b", "due": "2024-05-06T12:12:00Z", "end": "2024-05-06T12:42:00Z", "length": 8.0, "low_floor": True,
             "seats": 40}  # fmt: skip
    answer = ask(service.url, {**NOBODY, **given}, {**NOBODY, "line": "L1", **given})
    unknown, known_line = answer.json["rows"]
    assert answer.status == 200 and all(r["unknown_entity"] for r in answer.json["rows"])
    assert not unknown["outside_horizon"] and not known_line["missing"]
    assert all("line_late" in name for name in unknown["missing"])  # nobody knows line L9
    assert unknown["unseen"] == ["line"] and not known_line["unseen"]
    null = ask(service.url, {**NOBODY, "length": None})
    assert null.status == 200 and "length" in null.json["rows"][0]["missing"]


@pytest.mark.parametrize("due", ["0002-01-01T00:00:00Z", "9998-12-31T23:59:59Z", "1970-01-01T00:00:00Z"])
def test_a_time_far_off_is_answered(service: Service, due: str) -> None:
    answer = ask(service.url, {**NOBODY, "due": due, "end": due, "length": 0})
    assert answer.status == 200 and answer.json["rows"][0]["outside_horizon"]


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [("stop", "z", '"'), ("seats", 1, ""), ("length", 99.9, ""), ("due", "2024-05-06T13:00:00Z", '"2024-05-06T12:12:00Z"'),
     ("low_floor", None, "")],
)  # fmt: skip
def test_a_field_that_conflicts_with_the_stored_row(service: Service, field: str, value: Any, stored: str) -> None:
    if value is None:  # the other truth is the wrong one
        answers = [ask(service.url, {**SOON, field: truth}) for truth in (True, False)]
        assert sorted(a.status for a in answers) == [200, 422]
        answer = next(a for a in answers if a.status == 422)
        stored = "false" if answers[1].status == 200 else "true"
    else:
        answer = ask(service.url, {**SOON, field: value})
    assert answer.status == 422
    assert f"rows[0].{field} is not what is stored ({stored}" in answer.error and "); leave it out" in answer.error


def test_a_field_beside_a_stored_row_that_says_the_same(service: Service) -> None:
    answer = ask(service.url, {**SOON, "due": "2024-05-06T14:12:00+02:00", "length": None})
    assert answer.status == 200 and answer.json["rows"][0]["probability"] == ask(service.url, SOON).json["rows"][0]["probability"]


def test_a_field_for_which_nothing_is_stored(buses: Buses, service: Service) -> None:
    """One of the trips to come has no end: one that is given is not it."""
    known = [trip_at(NOW + n * EVERY) for n in range(2, 200)]
    answers = ask(service.url, *known).json["rows"]
    bare = next(row for row, a in zip(known, answers, strict=True) if "pace" in a["missing"])
    answer = ask(service.url, {**bare, "end": "2024-05-06T14:00:00Z"})
    assert answer.status == 422 and "rows[0].end is not what is stored (null); leave it out" in answer.error


def test_a_row_that_is_closed(service: Service) -> None:
    answer = ask(service.url, SOON, GONE)
    assert answer.status == 409 and answer.json["code"] == "already_closed" and answer.json["rows"] == [1]
    assert answer.error.startswith("already_closed: ") and '"trip":4950} was closed at 2024-05-06T0' in answer.error


def test_many_rows_that_are_closed(service: Service) -> None:
    answer = ask(service.url, *[GONE] * 1_000)
    assert answer.status == 409 and len(answer.json["rows"]) == 1_000 and len(answer.json["error"]) < 1_000


def test_one_wrong_row_spoils_the_request_and_nothing_is_logged(buses: Buses, service: Service) -> None:
    before = call(f"{service.url}/info")[1]["predictions_dropped"]
    for wrong in ({**SOON, "trip": "x"}, GONE):
        assert "rows" not in {k for k in ask(service.url, SOON, wrong).json if k != "rows"} | {"error"}
    assert call(f"{service.url}/info")[1]["predictions_dropped"] == before == 0


def test_the_same_question_has_the_same_answer_alone_and_among_others(service: Service) -> None:
    rows = [trip_at(NOW + n * EVERY) for n in range(3, 60)]
    together = [r["probability"] for r in ask(service.url, *rows).json["rows"]]
    alone = [ask(service.url, row).json["rows"][0]["probability"] for row in rows]
    assert together == alone


def test_features_as_numbers_are_answered_as_their_row(buses: Buses, service: Service) -> None:
    """Test rows of the training set by `/predict_features`: what the model says offline."""
    test = buses.data.rows("test")[:50].tolist()
    rows = [{n: _plain(v[i]) for n, v in buses.data.frame.items()} for i in test]
    answer = send(f"{service.url}/predict_features", json.dumps({"rows": rows}).encode())
    assert answer.status == 200 and len({r["probability"] for r in answer.json["rows"]}) > 10


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if value != value else value


# --- a bento that lacks what it needs ---

@pytest.mark.parametrize(
    ("file", "expected"),
    [pytest.param("bundle/gbdt.txt", "bundle/gbdt.txt is missing; package the release again", marks=pytest.mark.slow),
     pytest.param("bundle/preprocess.json", "bundle/preprocess.json is missing", marks=pytest.mark.slow),
     ("tests/e2e/pace.py", "tests/e2e/pace.py is missing"),
     ("features/views.py", "features.views is not in ")],
)  # fmt: skip
def test_a_bento_without_a_file_that_it_needs(buses: Buses, tmp_path: Path, file: str, expected: str) -> None:
    """Preflight starts the copy, sees it refuse, and says which file it was."""
    copy = buses.home.root / "copies" / file.replace("/", "-")
    shutil.copytree(buses.folder, copy)
    (copy / "src" / file).unlink()
    bento = Bento(buses.bento.tag, buses.home.relative(copy), buses.bento.size_mb)
    found = preflight(buses.spec, buses.home, bento, buses.data, buses.features, buses.snapshot, tmp_path)
    assert not found.passed and len(found.reasons) == 1
    assert found.reasons[0].startswith(f"the endpoint of {buses.bento.tag} did not become ready: ")
    assert expected in found.reasons[0] and "Traceback" not in found.reasons[0]


def test_a_failed_preflight_releases_nothing(buses: Buses, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both verdicts must be yes: the pointer stays where it is, and the reasons are those of the preflight. By steps a yes makes
    a challenger, where there is a champion and a proxy.
    """
    home = buses.home

    def stage(name: str, ok: bool, **files: dict[str, Any]) -> Artifact:
        folder = home.root / "artifacts" / name / "test"
        for file, body in files.items():
            write_json(folder / f"{file}.json", body)
        return Artifact(name, home.relative(folder), "", "", ok)

    at = buses.snapshot.watermark_us
    run = Run("buses", "test-1", at, buses.snapshot.digest, "", "", 0, "", "")
    verdict = stage("evaluate", True, verdict={"reasons": ["better"]})
    bento = stage("package", True, bento=asdict(buses.bento))
    checked = stage("preflight", False, preflight={"reasons": ["skew: 3 cells differ"]})
    found = release_run(buses.spec, home, run, buses.features, verdict, bento, checked)
    assert found.outcome == "refused" and found.reasons == ("skew: 3 cells differ",) and found.release == ""
    assert champion(home, "buses") is None and not list(events(home, "buses"))
    again = release_run(buses.spec, home, run, buses.features, verdict, bento, replace(checked, ok=True))
    assert again.outcome == "promoted" and again.release == buses.bento.tag
    assert again == replace(release_run(buses.spec, home, run, buses.features, verdict, bento, replace(checked, ok=True)),
                            fed=again.fed, line=again.line)  # fmt: skip
    now = champion(home, "buses")
    assert now is not None and now.release == buses.bento.tag
    assert [e["event"] for e in events(home, "buses") if e["event"] != "feed"] == ["release", "promote"]
    other = stage("package-2", True, bento={**asdict(buses.bento), "tag": "millrace_buses:next"})
    given = (by_steps(buses.spec), home, replace(run, run_id="test-2", parent=now.release), buses.features, verdict, other,
             replace(checked, ok=True))  # fmt: skip
    monkeypatch.setattr("deploy.rollout.installed", lambda: True)
    for _ in range(2):
        found = release_run(*given)
        assert (found.outcome, found.release, champion(home, "buses")) == ("challenger", "millrace_buses:next", now)
    assert [e["event"] for e in events(home, "buses") if e["event"] != "feed"][2:] == ["release", "challenger"]
    monkeypatch.setattr("deploy.rollout.installed", lambda: False)
    assert release_run(*given).outcome == "promoted"


def test_a_feature_set_that_was_moved(buses: Buses, tmp_path: Path) -> None:
    """Feast's repository holds no path of where it was made."""
    made, moved, data = tmp_path / "made", tmp_path / "moved", buses.data
    for name in ("snapshots", "objects", "landing"):
        shutil.copytree(buses.home.root / name, made / name)
    features = build_features(buses.spec, Home(made), buses.snapshot)
    made.rename(moved)
    rows = pq.read_table(buses.home.root.parent / "model" / "rows.parquet")
    frame = historical_features(buses.spec, Home(moved), features, rows, data.t)
    assert not different_cells(data.frame, {n: [_plain(v) for v in values] for n, values in frame.items()})
