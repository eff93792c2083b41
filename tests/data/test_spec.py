"""The spec: every mistake is one sentence with the place, what was found, and what exists."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from jsonschema import Draft202012Validator

from features.frame import feature_list
from features.propose import propose
from features.rows import prediction_rows
from pipelines.clock import duration_us
from pipelines.errors import Refused, UsageError
from pipelines.home import open_home
from pipelines.spec import HERE, Spec, find_pipeline, json_schema, load_spec, pipeline_names
from tests.command import millrace

NO_TIME = """
title: Which of these?
time: none
sources:
  things:
    key: [row_digest]
    columns: {size: {type: float64, min: 0}, colour: string, good: int64}
rows: {from: things, key: row_digest}
label: {from: things, column: good, eq: 1}
split: {by: hash, train: 0.5, valid_fit: 0.2, valid_select: 0.1, test: 0.2}
features: {row: [size, colour]}
"""
TIMED = """
title: Will this order be late?
sources:
  orders:
    kind: plan
    key: [order_id]
    event_time: due
    known_at: {column: placed_at}
    columns: {order_id: int64, shop: string, weight: {type: float64, resolution: 0.1}, due: timestamp,
              placed_at: timestamp}
  deliveries:
    key: [order_id]
    event_time: delivered_at
    known_at: {lag: 10m}
    columns: {order_id: int64, shop: string, delivered_at: timestamp, delay: {type: float64, resolution: 1}}
rows: {from: orders, key: [order_id]}
predict_at: {column: due, lead: 60m, tolerance: 15m}
closed_by: [deliveries]
label: {from: deliveries, column: delay, gt: 0}
label_delay: 24h
split: {train: 60d, valid_fit: 7d, valid_select: 7d, test: 14d, purge: 24h}
features:
  row: [shop]
  calendar: {column: due, timezone: Europe/Rome}
  views:
    shop_late: {window: {from: deliveries, key: [shop], last: [1h, 1d], mean: [delay]}}
serve: {request: [shop, due]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "things.yaml").write_text(NO_TIME)
    (tmp_path / "orders.yaml").write_text(TIMED)
    return tmp_path


def message(path: Path, *overrides: str) -> str:
    """What is said of a wrong spec."""
    with pytest.raises(UsageError) as caught:
        load_spec(str(path), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def set_json(path: str, value: Any) -> str:
    return f"{path}={json.dumps(value)}"


def test_the_pipelines_of_the_repository_are_valid() -> None:
    assert {"flights", "flights_demo", "tumours"} <= set(pipeline_names())
    for name in pipeline_names():
        assert load_spec(name).pipeline == name


def test_the_pipelines_of_these_tests_are_valid(folder: Path) -> None:
    assert load_spec(str(folder / "things.yaml")).pipeline == "things"
    assert load_spec(str(folder / "orders.yaml")).timed


@pytest.mark.parametrize(
    ("item", "expected"),
    [("trian.max_epochs=2", "trian: unknown field; nearest: 'train'"),
     ("train.max_epoch=2", "train.max_epoch: unknown field; nearest: 'max_epochs'"),
     ("rows.keys=[order_id]", "rows.keys: unknown field; nearest: 'key'"),
     ("sources.orders.columns.shop={type: string, patern: x}", "columns.shop.patern: unknown field; nearest: 'pattern'"),
     ("features.views.shop_late.window.lasts=[1h]", "window.lasts: unknown field; nearest: 'last'"),
     ("zzzzqqqq=1", "zzzzqqqq: unknown field")],
)  # fmt: skip
def test_an_unknown_field_names_the_nearest(folder: Path, item: str, expected: str) -> None:
    assert message(folder / "orders.yaml", item).startswith("orders.yaml: ")
    assert expected in message(folder / "orders.yaml", item)


@pytest.mark.parametrize(
    ("item", "found"),
    [("features.views.shop_late.window.last=[1w]", "'1w'"), ("features.views.shop_late.window.last=[1.5h]", "'1.5h'"),
     ("features.views.shop_late.window.last=[hour]", "'hour'"), ("predict_at.lead=60 minutes", "'60 minutes'"),
     ("label_delay=soon", "'soon'"), ("split.train=2 years", "'2 years'")],
)  # fmt: skip
def test_a_bad_unit_says_which_exist(folder: Path, item: str, found: str) -> None:
    said = message(folder / "orders.yaml", item)
    assert f"{found} is not a duration: write a whole number and one of us, ms, s, m, h, d, such as '60m'" in said
    assert item.partition("=")[0].rpartition(".")[2] in said


@pytest.mark.parametrize(
    ("item", "expected"),
    [("features.views.shop_late.window.last=[0h]", "a window length must be positive"),
     ("features.views.shop_late.window.last=[-1h]", "a window length must be positive"),
     ("features.views.shop_late.window.last=[]", "give the window lengths: last: [1h] or next: [1h]"),
     ("features.views.shop_late.window.next=[1h]", "next looks ahead: it needs a source of kind plan"),
     ("features.views.shop_late.window.key=[shopp]", "'shopp' not in source 'deliveries' (columns: order_id, shop"),
     ("features.views.shop_late.window.mean=[delays]", "nearest: 'delay')"),
     ("features.views.shop_late.window.over=shop", "'shop' of source 'deliveries' is string, expected timestamp"),
     ("features.views.Shop={window: {from: deliveries, last: [1h]}}", "use lower-case letters, digits and single"),
     ("features.views.a__b={window: {from: deliveries, last: [1h]}}", "use lower-case letters, digits and single"),
     ("features.views.empty={}", "give exactly one of window, open, latest, sequence"),
     ("features.views.shop_late.window.last=[1h, 60m]", "'shop_late_1h' would name two tables: rename a view, or give"),
     ("features.views.rows={latest: {from: deliveries, key: [shop], columns: [delay]}}", "'rows' would name two tables"),
     ("features.views.shop_late.window.key=[shop, shop]", "shop_late.key names a column twice: shop, shop"),
     ("features.views.v={latest: {from: deliveries, key: [shop], columns: [delay], ttl: -1s}}", "ttl: -1s is below 0s"),
     ("features.views.v={latest: {from: deliveries, key: [shop], columns: [delay], change: {columns: [delay], over: [-3h]}}}",
      "change.over.0: -3h is not above 0s"),
     ("features.views.v={open: {from: orders, over: due, last: [-3h], closed_by: [deliveries]}}", "last.0: -3h is not above 0s"),
     ("features.views.v={sequence: {from: orders, key: [shop], order: due, within: 0s}}", "within: 0s is not above 0s"),
     ("features.views.shop_late.window.share={s: {column: shop, gt: 3}}", "share.s: 'shop' is string, it cannot be compared by"),
     ("features.views.shop_late.window.share={s: {column: delay, eq: yes}}", "'delay' is float64, it cannot be compared by eq: "),
     ("features.calendar.timezone=America/New_Yrok", "no time zone is named 'America/New_Yrok'; nearest: 'America/New_York'"),
     ("sources.deliveries.columns.delay=float64", "'delay' is float64: declare its resolution in the source"),
     ("sources.orders.columns.shop=int64", "'shop' is string in source 'deliveries' and int64 in the rows; a key has one type"),
     ("clock={kind: data, offset: -1h}", "clock: offset must not be negative: the served store has forgotten what"),
     ("sources.orders.columns._x=int64", "'_x': names that begin with _ are Millrace's own; rename it"),
     ("sources.orders.columns.shop={type: string, min: 1}", "min and max are for numbers, this column is string"),
     ("sources.deliveries.columns.delay={type: int64, min: 2, max: 1}", "min 2 is above max 1: no value would do"),
     ("sources.deliveries.columns.delay={type: int64, values: [a]}", "values and pattern are for strings, this column is int64"),
     ("sources.orders.columns.shop={type: string, pattern: '(a'}", "pattern '(a' is not a regular expression: missing )")],
)  # fmt: skip
def test_a_window_that_cannot_be(folder: Path, item: str, expected: str) -> None:
    assert expected in message(folder / "orders.yaml", item)


@pytest.mark.parametrize("part", ["train", "valid_fit", "valid_select", "test"])
def test_an_empty_part_of_a_split_by_time(folder: Path, part: str) -> None:
    assert f"split.{part} is empty: give a duration above 0s" in message(folder / "orders.yaml", f"split.{part}=0s")
    assert f"split.{part} is empty" in message(folder / "orders.yaml", f"split.{part}=-1d")


@pytest.mark.parametrize("part", ["train", "valid_fit", "valid_select", "test"])
def test_an_empty_part_of_a_split_by_hash(folder: Path, part: str) -> None:
    said = message(folder / "things.yaml", f"split.{part}=0")
    assert f"split.{part}: Input should be greater than 0" in said.replace(".hash", "")


def test_shares_that_do_not_add_up(folder: Path) -> None:
    assert "shares must add up to 1, they add up to 1.1" in message(folder / "things.yaml", "split.train=0.6")


def test_a_purge_shorter_than_the_delay_of_labels(folder: Path) -> None:
    said = message(folder / "orders.yaml", "split.purge=23h")
    assert "split.purge must be at least label_delay, or labels leak over the border" in said
    assert load_spec(str(folder / "orders.yaml"), ["split.purge=24h"])


def test_an_unknown_pipeline_names_those_that_exist() -> None:
    with pytest.raises(UsageError) as caught:
        load_spec("fligths")
    said = str(caught.value)
    assert "unknown pipeline 'fligths' (known: " in said and "nearest: 'flights'" in said and "path of a .yaml" in said


@pytest.mark.parametrize("verb", ["check", "run", "serve", "sample", "releases"])
def test_an_unknown_pipeline_ends_with_2(verb: str, tmp_path: Path) -> None:
    done = millrace(tmp_path, verb, "tumuors")
    assert done.code == 2 and not done.out
    assert done.error.startswith("error: unknown pipeline 'tumuors' (known: ") and "nearest: 'tumours'" in done.error


def test_an_unknown_field_ends_with_2_and_leaves_nothing(tmp_path: Path) -> None:
    done = millrace(tmp_path, "run", "tumours", sets=["gate.min_row=5"])
    assert done.code == 2 and done.error == "error: tumours.yaml: gate.min_row: unknown field; nearest: 'min_rows'"
    assert [p.name for p in tmp_path.iterdir()] == ["home.json"]


@pytest.mark.parametrize(
    ("item", "expected"),
    [("features.row=[size, color]", "features.row 'color' not in source 'things' (columns: size, colour, good"),
     ("features.row=[sizes]", "nearest: 'size')"), ("label.column=goood", "label.column 'goood' not in source 'things'"),
     ("label.column=goood", "nearest: 'good')"), ("label.from=thing", "(sources: things; nearest: 'things')"),
     ("rows.from=stuff", "rows.from 'stuff' is not a source (sources: things)"),
     ("serve.request=[colr]", "serve.request 'colr' not in source 'things'")],
)  # fmt: skip
def test_an_unknown_column_names_the_nearest(folder: Path, item: str, expected: str) -> None:
    assert expected in message(folder / "things.yaml", item)


def test_the_label_is_no_feature(folder: Path) -> None:
    said = message(folder / "things.yaml", "features.row=[size, good]")
    assert "features.row holds the label 'good': the model would be told the answer" in said


@pytest.mark.parametrize(
    ("item", "expected"),
    [("predict_at={column: size, lead: 1h, tolerance: 1h}", "predict_at needs a time"),
     ("label_delay=24h", "label_delay needs a time"), ("clock={kind: data}", "clock needs a time"),
     ("closed_by=[things]", "closed_by needs a time"),
     ("features.calendar={column: size, timezone: UTC}", "features.calendar needs a time"),
     ("features.views.w={window: {from: things, key: [colour], last: [1h]}}", "features.views.w needs a time"),
     ("features.views.o={open: {from: things, over: size, last: [1h], closed_by: [things]}}", "needs a time"),
     ("features.views.l={latest: {from: things, key: [colour], columns: [size], ttl: 1h}}", "needs a time"),
     ("sources.things.known_at={lag: 0s}", "time: none takes neither known_at nor event_time"),
     ("sources.things.event_time=size", "time: none takes neither known_at nor event_time"),
     ("split={by: time, train: 1d, valid_fit: 1d, valid_select: 1d, test: 1d, purge: 1d}", "splits by a hash")],
)  # fmt: skip
def test_without_time_nothing_that_needs_one(folder: Path, item: str, expected: str) -> None:
    assert expected in message(folder / "things.yaml", item)


@pytest.mark.parametrize(
    ("item", "expected"),
    [("sources.deliveries.known_at=null", "sources.deliveries.known_at is missing: give {column: c}, {lag: 1h} or"),
     ("sources.deliveries.known_at={column: delivered_at}", "give exactly one of column, lag, arrival"),
     ("sources.deliveries.known_at={lag: null}", "give exactly one of column, lag, arrival"),
     ("sources.deliveries.known_at={lag: -1h}", "an observation is never known before its event; lag must be ≥ 0s"),
     ("sources.deliveries.event_time=null", "sources.deliveries.event_time is missing: name the timestamp column"),
     ("sources.orders.known_at={column: null, lag: 1h}", "a plan is known before its event"),
     ("sources.orders.key=[weight]", "'weight' is float64; a key is string, int64, bool or timestamp"),
     ("sources.orders.order=[[due, placed]]", "order 'placed' not in source 'orders'"),
     ("sources.orders.references=[{to: shops, columns: [shop]}]", "references.to 'shops' is not a source"),
     ("predict_at=null", "predict_at and label_delay are missing (or say time: none)"),
     ("predict_at.column=shop", "'shop' of source 'orders' is string, expected timestamp"),
     ("label.column=late", "label.column 'late' not in source 'deliveries' (columns: order_id, shop, delivered_at, delay"),
     ("label.column=shop", "label: 'shop' is string, it cannot be compared by gt"), ("label_delay=-1h", "-1h is below 0s"),
     ("predict_at.tolerance=-1m", "tolerance: -1m is below 0s"), ("rows.key=[order_id, order_id]", "names a column twice"),
     ("label.gt=null", "give exactly one of gt, ge, lt, le, eq"), ("label.lt=5", "give exactly one of gt, ge, lt, le, eq"),
     ("rows.key=row_digest", "rows.key: row_digest is for time: none"), ("split={by: hash}", "split"),
     ("title=null", "title: Input should be a valid string"), ("seed=-1", "seed: Input should be greater than or equal"),
     ("gate.metric=accuracy", "gate.metric: Input should be 'log_loss', 'auc', 'brier' or 'pr_auc', found 'accuracy'"),
     ("serve.port=99999", "serve.port: Input should be less than or equal to 65535, found 99999"),
     ("format_version=2", "format_version: Input should be 1, found 2"),
     ("pipeline=Orders", "pipeline: String should match pattern")],
)  # fmt: skip
def test_what_does_not_fit_together(folder: Path, item: str, expected: str) -> None:
    assert expected in message(folder / "orders.yaml", item)


def test_two_features_of_one_name(folder: Path) -> None:
    twice = ["features.calendar.parts=[hour]", "features.derived.local_hour={minutes: [placed_at, due]}"]
    with pytest.raises(UsageError, match="orders: two features are named 'local_hour': rename one"):
        feature_list(load_spec(str(folder / "orders.yaml"), twice))


def test_a_source_may_be_named_as_the_rows_are(folder: Path) -> None:
    source = "{key: [shop, at], event_time: at, known_at: {lag: 0s}, columns: {shop: string, at: timestamp, load: float64}}"
    spec = load_spec(str(folder / "orders.yaml"), [f"sources.rows={source}", "features=auto"])
    assert "rowsx" in propose(spec).spec.features.views


def test_every_mistake_is_named_at_once(folder: Path) -> None:
    said = message(folder / "orders.yaml", "sed=1", "label_delay=soon", "gate.resamples=1").splitlines()
    assert len(said) == 3 and all(line.startswith("orders.yaml: ") for line in said)


def test_set_changes_one_field_and_keeps_its_neighbours(folder: Path) -> None:
    plain = load_spec(str(folder / "orders.yaml"))
    changed = load_spec(str(folder / "orders.yaml"), ["predict_at.lead=2h", "train.network.width=7", "title=Late, is it?"])
    assert plain.predict_at and changed.predict_at
    assert changed.predict_at.lead == duration_us("2h") and changed.predict_at.tolerance == plain.predict_at.tolerance
    assert changed.train.network.width == 7 and changed.train.network.depth == plain.train.network.depth
    assert changed.title == "Late, is it?"
    assert load_spec(str(folder / "orders.yaml"), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("item", ["seed", "=3", ""])
def test_a_set_without_key_or_value(folder: Path, item: str) -> None:
    assert message(folder / "orders.yaml", item) == f"--set {item!r}: write key=value, such as train.max_epochs=2"


@pytest.mark.parametrize("item", ["seed=[1", "label={column: x", "title=a: b: c"])
def test_a_set_that_is_not_yaml(folder: Path, item: str) -> None:
    assert f"--set {item!r}" in message(folder / "orders.yaml", item)


def test_extends_takes_what_it_does_not_change(folder: Path) -> None:
    (folder / "small.yaml").write_text("extends: orders.yaml\nsplit: {train: 10d}\ngate: {min_rows: 5}\n")
    small, orders = load_spec(str(folder / "small.yaml")), load_spec(str(folder / "orders.yaml"))
    assert small.pipeline == "small" and small.sources == orders.sources and small.gate.min_rows == 5
    assert small.model_dump()["split"] == {**orders.model_dump()["split"], "train": "10d"}
    (folder / "smaller.yaml").write_text("extends: small.yaml\nseed: 3\n")
    assert load_spec(str(folder / "smaller.yaml")).gate.min_rows == 5


def test_extends_of_a_file_that_is_not_there(folder: Path) -> None:
    (folder / "small.yaml").write_text("extends: ordres.yaml\n")
    said = message(folder / "small.yaml")
    assert said.startswith("small.yaml: extends: ") and "ordres.yaml" in said and "nearest: 'orders.yaml'" in said


def test_files_that_extend_each_other(folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: b.yaml\n")
    (folder / "b.yaml").write_text("extends: a.yaml\n")
    assert "extends" in message(folder / "a.yaml") and "a.yaml" in message(folder / "a.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("title: [", "bad.yaml: not YAML: "), ("- a\n- b\n", "bad.yaml: expected a mapping of fields, found list"),
     ("", "bad.yaml: expected a mapping of fields, found NoneType"), ("just text", "found str"),
     ("title: \x00", "bad.yaml: not YAML: ")],
)  # fmt: skip
def test_a_file_that_is_no_spec(folder: Path, text: str, expected: str) -> None:
    (folder / "bad.yaml").write_text(text)
    assert expected in message(folder / "bad.yaml")


def test_a_file_that_is_not_utf8(folder: Path) -> None:
    (folder / "bad.yaml").write_bytes(b"title: caf\xe9\n")
    assert "bad.yaml: not YAML: " in message(folder / "bad.yaml")


def test_a_spec_survives_its_own_json(folder: Path) -> None:
    for path in (folder / "things.yaml", folder / "orders.yaml", find_pipeline("flights")):
        spec = load_spec(str(path))
        assert Spec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json", by_alias=True)))) == spec


def test_the_schema_file_is_in_step() -> None:
    """`make schema` writes it."""
    assert json.loads((HERE / "schema.json").read_text(encoding="utf-8")) == json_schema()


def test_the_pipelines_fit_the_schema() -> None:
    schema = json.loads((HERE / "schema.json").read_text(encoding="utf-8"))
    for name in pipeline_names():
        data = yaml.safe_load(find_pipeline(name).read_text(encoding="utf-8"))
        problems = [f"{name}: {e.json_path}: {e.message}" for e in Draft202012Validator(schema).iter_errors(data)]
        assert not problems, "\n".join(problems)[:3000]


def test_the_schema_describes_every_field() -> None:
    schema = json_schema()
    undescribed = [
        f"{name}.{field}"
        for name, model in {**schema["$defs"], "Spec": schema}.items()
        if "description" not in model and name != "Spec"
        for field in model.get("properties", {})
    ]
    assert not undescribed
    alone = next(one["required"] for one in schema["anyOf"] if "extends" not in one["required"])
    assert "pipeline" not in alone and "extends" in schema["properties"]


def test_the_pipelines_name_the_schema_for_editors() -> None:
    for name in pipeline_names():
        first = find_pipeline(name).read_text(encoding="utf-8").splitlines()[0]
        assert first == "# yaml-language-server: $schema=schema.json"
        assert isinstance(yaml.safe_load(find_pipeline(name).read_text(encoding="utf-8")), dict)


def things(good: list[int]) -> pa.Table:
    size = pa.array([float(i) for i in range(len(good))])
    colour = pa.array(["red"] * len(good))
    digest = pa.array([f"{i:064x}" for i in range(len(good))])
    columns = {"size": size, "colour": colour, "good": pa.array(good), "row_digest": digest}
    return pa.table({**columns, "_known_at": pa.array([0] * len(good)).cast(pa.timestamp("us", "UTC"))})


@pytest.mark.parametrize(("value", "found"), [(1, True), (0, False)])
def test_a_label_with_one_class(folder: Path, value: int, found: bool) -> None:
    spec = load_spec(str(folder / "things.yaml"))
    with pytest.raises(Refused) as caught:
        prediction_rows(spec, {"things": things([value] * 200)}, 0)
    assert f"split.train: every label is {found}; a model needs both: check label in the spec" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_part_without_rows(folder: Path) -> None:
    spec = load_spec(str(folder / "things.yaml"))
    with pytest.raises(Refused, match=r"split\.\w+ has no row with a known label; make it longer, or land more data"):
        prediction_rows(spec, {"things": things([0, 1])}, 0)


def test_check_finds_what_does_not_fit_in_seconds(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = millrace(home, "check", str(folder / "orders.yaml"), "--json")
    landing = open_home(home).landing("orders")
    assert done.code == 2
    assert done.answer["problems"] == [f"{name}: nothing landed in {landing / name}" for name in ("orders", "deliveries")]
