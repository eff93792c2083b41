"""The report and the model card of a made-up run: what is on the page, what may be absent, what must not get in."""

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest

from deploy import record
from deploy.report import metric_words, model_title, moment, number, write_report
from features import preprocess
from features.contract_page import Arrived, Check, ContractResult, as_json
from features.frame import feature_list
from models.calibrate import sigmoid
from models.evaluate import evaluate
from models.gate import decide
from pipelines.clock import iso
from pipelines.home import Home, open_home
from pipelines.manifest import read_json, write_json
from pipelines.run import Run
from pipelines.spec import Gate, Spec, load_spec

AS_OF = 1_388_404_800_000_000
ROWS = 900
HOSTILE = "</code><script>alert(1)</script><img src=x onerror=alert(2)>\" '{{7*7}} &amp; `|*$x_1$ 漢"
SECTIONS = ("data", "curves", "metrics", "slices", "importance", "tuning", "learning", "preflight", "stages", "provenance")
CARD = ("Question", "Intended use", "Data", "Features", "Training and selection", "Metrics", "Where it is weak", "Limits",
        "How it was judged", "Provenance", "How to make it again")  # fmt: skip
PREFLIGHT = {
    "passed": True, "reasons": [], "feature_rows": 500, "entity_rows": 412, "cells": 77_500, "worst_score_gap": 1e-9,
    "latency_ms": {"p50": 7.9, "p95": 12.6, "p99": 15.8}, "size_mb": 3.2, "ready_s": 8.6,
    "example": {"carrier": "9E", "flight": 2924, "time_hour": "2013-12-30T13:00:00Z"},
}  # fmt: skip
STAGES = [{"stage": s, "seconds": 1.5 * i, "cpu_s": 1.0 * i, "peak_mb": 500 + i, "ended_us": AS_OF, "line": f"did {s}"}
          for i, s in enumerate(("ingest", "contract", "training_set", "tune", "train", "evaluate"))]  # fmt: skip


@dataclass
class Made:
    """A run whose stages left files that nobody trained."""

    spec: Spec
    home: Home
    run: Run
    manifest: dict[str, Any]

    def write(self) -> "Page":
        write_report(self.spec, self.home, self.run, self.manifest)
        folder = self.run.folder(self.home)
        return Page((folder / "report.html").read_text(encoding="utf-8"), (folder / "model_card.md").read_text(encoding="utf-8"))

    def without(self, *stages: str) -> "Made":
        paths = {name: path for name, path in self.manifest["stage_paths"].items() if name not in stages}
        return replace(self, manifest={**self.manifest, "stage_paths": paths})

    def saying(self, **changes: Any) -> "Made":
        return replace(self, manifest={**self.manifest, **changes})


def make(root: Path, pipeline: str = "flights_demo", text: str = "plain", champion: bool = False) -> Made:
    """`text` stands wherever a page shows words that come from data, a spec or a message."""
    spec = load_spec(pipeline).model_copy(update={"title": f"Is it late? {text}", "gate": Gate(resamples=20, min_rows=50)})
    home = open_home(root)
    run = Run(pipeline, "abc-1", AS_OF, "5" * 64, "", "old:1" if champion else "", 0, "d" * 64, "c" * 64)
    run.folder(home).mkdir(parents=True)
    paths = {name: f"artifacts/{name}/k" for name in ("contract", "training_set", "tune", "train", "evaluate")}
    at = {name: root / path for name, path in paths.items()}
    for folder in at.values():
        folder.mkdir(parents=True)

    sources = list(spec.sources)
    checks = (Check(sources[0], "type", ("a",), f"words {text}", "x", f"found {text}", "passed", 0, 9),)
    arrived = tuple(Arrived(s, 1_000 + i, 900 if i == 0 else None, i) for i, s in enumerate(sources))
    write_json(at["contract"] / "contract.json",
               as_json(ContractResult(pipeline, run.snapshot, None, AS_OF, spec.timed, arrived, checks)))  # fmt: skip
    counts = {"keys": 9_000, "without_version_in_time": 50, "closed_before_asked": 0, "rows": 8_950, "unlabelled": 100,
              "train": 5_000, "valid_fit": 800, "valid_select": 700, "test": ROWS}  # fmt: skip
    write_json(at["training_set"] / "counts.json", {"counts": counts, "positive_share": {"train": 0.21, "test": 0.314}})
    trials = [{"study": "network", "slot": i, "generation": i // 2, "state": "pruned" if i == 2 else "complete",
               "value": 0.5 - 0.01 * i, "params": {"width": 64 * (i + 1), "kind": text}} for i in range(4)]  # fmt: skip
    write_json(at["tune"] / "trials.json", {"trials": trials})
    _write_models(at["train"], spec)
    verdict = _write_evaluation(at["evaluate"], spec, text, champion)
    write_json(home.landing(pipeline).parent / f"{pipeline}.notes.json", {"notes": [f"A note: {text}."]})
    return Made(spec, home, run, {
        "pipeline": pipeline, "run_id": run.run_id, "as_of": iso(AS_OF), "git_commit": "f" * 40, "lock_digest": "e" * 64,
        "defs_digest": "a" * 64, "counts": counts, "chosen": "blend", "hyper_parameters": {"network": {"kind": text}},
        "preflight": PREFLIGHT, "outcome": "promoted", "inference": _inference(text),
        "release": "millrace_flights_demo:1", "reasons": verdict["reasons"],
        "stages": [{**s, "line": f"{s['line']} {text}"} for s in STAGES], "stage_paths": paths,
        "snapshot_rows": {s: 1_000 + i for i, s in enumerate(sources)}, "result_digest": "b" * 64, "finished_wall_us": AS_OF,
        "test_window_us": [AS_OF - 10**12, AS_OF] if spec.timed else None, "verdict": verdict,
    })  # fmt: skip


def _inference(text: str) -> dict[str, Any]:
    line = {"member": "gbdt", "engine": "onnxruntime", "precision": "float64", "state": "chosen", "why": "", "gap": 0.0,
            "edge_gap": 0.0, "us": [14.2, 1924.7], "speed": [6.3, 1.38]}  # fmt: skip
    gone = {"engine": "lleaves", "state": "failed", "why": f"no {text}", "gap": None, "edge_gap": None, "us": None, "speed": None}
    return {"hardware": {"cpu": text, "cores": 2}, "table": [line, {**line, **gone}]}


def _write_models(out: Path, spec: Spec) -> None:
    features, rng = feature_list(spec), np.random.default_rng(1)
    frame = {f.name: rng.choice(np.array(["p", "q"], object), 300) if f.kind == "category" else rng.normal(size=300)
             for f in features}  # fmt: skip
    fitted = preprocess.fit(frame, np.ones(300, bool), list(features))
    fitted.save(out / "preprocess.json")
    inputs = fitted.transform(frame).trees
    data = lgb.Dataset(inputs, (inputs[:, 0] + inputs[:, 3] > 0).astype(float))
    settings = {"objective": "binary", "num_leaves": 4, "verbosity": -1, "num_threads": 1, "seed": 1}
    (out / "gbdt.txt").write_text(lgb.train(settings, data, 5).model_to_string())
    write_json(out / "curves.json", {
        "gbdt": [0.6 - 0.002 * i for i in range(60)] + [0.47, 0.475],
        "network": [{"epoch": i, "log_loss": x, "auc": 0.7, "train_loss": x} for i, x in ((1, 0.5), (2, 0.45), (3, None))],
    })  # fmt: skip
    write_json(out / "choice.json", {"chosen": "blend", "candidates": [
        {"name": "gbdt", "weights": {"gbdt": 1.0}, "log_loss": 0.47, "auc": 0.76},
        {"name": "blend", "weights": {"gbdt": 0.7, "network": 0.3}, "log_loss": 0.46, "auc": 0.77},
    ]})  # fmt: skip


def _write_evaluation(out: Path, spec: Spec, text: str, champion: bool) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    z = rng.normal(size=ROWS) - 1
    label = (rng.random(ROWS) < sigmoid(z)).astype(float)
    noise = {"challenger": 0.2, "gbdt": 0.4, "network": 0.9} | ({"champion": 0.5} if champion else {})
    models = {name: sigmoid(z + rng.normal(size=ROWS) * s) for name, s in noise.items()}
    models["prior"] = np.full(ROWS, 0.3)
    place = np.array([f"{text} {i % 3}" if i % 100 else "rare" for i in range(ROWS)], object)
    many = np.array([f"v{i % 30}" for i in range(ROWS)], object)
    found = evaluate(label, models, {"place": place, "many_values": many}, spec.gate, 7)
    verdict = decide(found, spec.gate, has_champion=champion)
    write_json(out / "evaluation.json", found.to_dict())
    body = {"promoted": verdict.promoted, "reasons": [], "rows": ROWS, "seen_before": 17,
            "rules": [{"name": r.name, "passed": r.passed, "reason": f"{r.reason} {text}"} for r in verdict.rules]}  # fmt: skip
    write_json(out / "verdict.json", body)
    return body


@dataclass
class Page(HTMLParser):
    """The written page, parsed: elements, attributes, text; and the card beside it."""

    html: str
    card: str
    tags: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(self.html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def sections(self) -> list[str]:
        return [name for name in SECTIONS if name in self.ids]

    def check(self) -> "Page":
        """What holds for every page: it needs nothing else, its links lead somewhere, its colours are defined."""
        assert len(self.html.encode()) < 1_500_000
        assert set(self.tags).isdisjoint(
            {"script", "link", "img", "iframe", "object", "embed", "image", "base", "form", "foreignobject"}
        )
        for tag, name, value in self.attributes:
            assert name not in ("src", "srcset", "action", "xlink:href") and not name.startswith("on"), (tag, name, value)
            if name == "href":
                assert value.startswith("#") and value[1:] in self.ids, (tag, value)
            for target in re.findall(r"url\(\s*([^)]*)\)", value):
                assert target.startswith("#") and target[1:] in self.ids, (tag, target)
        twice = [name for name, times in Counter(self.ids).items() if times > 1]
        assert not twice
        style = self.html[self.html.index("<style>") : self.html.index("</style>")]
        assert "url(" not in style and "@import" not in style
        assert "http://127.0.0.1:" in self.html or "http://" not in self.html
        assert set(re.findall(r"(\w+)://([\w.]+)", self.html)) <= {("http", "127.0.0.1")}
        light, dark = style.split("prefers-color-scheme: dark")[:2]
        used = set(re.findall(r"var\((--[\w-]+)", self.html)) - {"--tone", "--tone-fill"}
        for theme in (light, dark[: dark.index("}")]):
            assert used - set(re.findall(r"(--[\w-]+):", theme)) == set()
        assert "#0a0b" not in self.html, "a colour of a drawing was not replaced"
        return self


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("report"))


def test_every_piece_of_a_run_is_on_the_page(made: Made) -> None:
    page = made.write().check()
    assert page.sections == list(SECTIONS)
    assert {"contract", "funnel", "splits", "notes", "gains", "candidates", "manifest"} <= set(page.ids)
    text = " ".join(page.text.split())
    assert text.index("Promoted") < text.index("Log loss") < text.index("curl -s") < text.index("What arrived")
    assert """-d '{"rows": [{"time_hour": "2013-12-30T13:00:00Z", "carrier": "9E", "flight": 2924}]}'""" in page.text
    for words in ("ROC", "Precision and recall", "Calibration", "17 of the test rows", "not known yet when", "A note: plain.",
                  "words plain", "0.7 × LightGBM, fixed defaults + 0.3 × Network", "Kept: epoch 2 of 3", "Kept: round 61 of 62",
                  "12.6 ms", "77,500", "and 10 more in the table", "together", "ended or still alive", "b" * 64,
                  "f" * 40):  # fmt: skip
        assert words in text, words
    assert page.tags.count("svg") == 4 + 3 + 2 + 2 + 1 + 2 + 1  # tiles, curves, slices, importance, search, learning, stages
    assert json.loads(page.text[page.text.rindex('{\n "as_of"') : page.text.rindex("}") + 1]) == made.manifest


def test_what_happened_to_the_ranks_is_told_where_something_happened(made: Made) -> None:
    told = {"restarts": ["rank 1 died of signal 9"], "notes": ["told so: 1 rank(s) from step 20 on, 2 before"]}
    text = " ".join(made.saying(training=told).write().check().text.split())
    assert "while the network was trained restartrank 1 died of signal 9notetold so: 1 rank(s) from step 20 on" in text
    assert "while the network was trained" not in made.saying(training={"restarts": [], "notes": []}).write().text


def test_what_training_made_of_its_device_is_told(made: Made) -> None:
    usage = {
        "step_ms": 8.88, "rows_per_s": 7_207, "split": {"data": 0.093, "backward": 0.282, "all_reduce": 0.625},
        "busy_share": 0.81,
        "flops_per_s": 96_866_839, "peak_flops_per_s": 38_458_479_416, "mfu": 0.0025, "ranks": 2, "peak": "a product, measured",
        "meter": "estimate: so", "estimated": True, "joules": 41.2, "watts": 1.76, "grams": 0.0054, "grams_per_kwh": 475.0,
        "rest_s": 2.77, "rest_joules": 4.1, "joules_per_loss": 236.9, "joules_per_loss_unpaced": 213.3,
    }  # fmt: skip
    quiet = {"restarts": [], "notes": []}
    text = " ".join(made.saying(training={**quiet, "usage": usage}).write().check().text.split())
    for words in ("all-reduce 62.5%, backward 28.2%, data 9.3%", "0.25% of 38.5 GFLOP/s a rank (a product, measured)",
                  "41.2 J estimated, 1.76 W (estimate: so)", "0.0054 g CO2 at 475 g per kWh",
                  "2.77 s and 4.1 J for train.power", "237 J, 213 J without rest"):  # fmt: skip
        assert words in text, words
    assert "made of its device" not in made.saying(training=quiet).write().text


def test_the_model_card_has_its_sections_in_order(made: Made) -> None:
    card = made.write().card
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == list(CARD)
    for words in ("| `schedule` | 1,000 |", "| test |", "Network + LightGBM", "17 of the 900 test rows", "b" * 64,
                  "millrace run flights_demo --as-of 2013-12-30T12:00:00Z", "100 of 8,950 rows have no outcome"):  # fmt: skip
        assert words in card, words


def test_the_same_run_gives_the_same_bytes_in_any_home(made: Made, tmp_path: Path) -> None:
    first, other = made.write(), make(tmp_path / "elsewhere").write()
    assert (first.html, first.card) == (other.html, other.card)


def test_words_from_data_stay_words(tmp_path: Path) -> None:
    made = make(tmp_path, text=HOSTILE)
    hostile = made.saying(preflight={**PREFLIGHT, "passed": False, "reasons": [HOSTILE], "example": {"carrier": HOSTILE}})
    page = hostile.write().check()
    assert HOSTILE in page.text and f"A note: {HOSTILE}." in page.text and f"Preflight: {HOSTILE}" in page.text
    assert f"failed: no {HOSTILE}" in page.text
    assert "<!--" not in page.html and "{{7*7}}" in page.text  # no comment to break out of, and nothing evaluated
    parts = page.card.split("```")
    assert len(parts) == 5  # two blocks of code, which show what they hold
    assert not any("<script" in part or "<img" in part for part in parts[::2])


PIECES = {"contract", "tune", "preflight", "stages", "slices", "weights", "learning", "notes"}


@pytest.mark.parametrize("absent", ["contract tune notes", "preflight weights", "stages slices learning", "all"])
def test_a_piece_that_a_run_did_not_leave_is_left_out(tmp_path: Path, absent: str) -> None:
    gone = PIECES if absent == "all" else set(absent.split())
    made = make(tmp_path).without(*gone & {"contract", "tune"})
    made = made.saying(**{name: None if name == "preflight" else [] for name in gone & {"preflight", "stages"}})
    train = tmp_path / "artifacts/train/k"
    if "weights" in gone:
        (train / "gbdt.txt").unlink()
    if "learning" in gone:
        (train / "curves.json").unlink()
    if "notes" in gone:
        (made.home.landing("flights_demo").parent / "flights_demo.notes.json").unlink()
    if "slices" in gone:
        path = tmp_path / "artifacts/evaluate/k/evaluation.json"
        write_json(path, {k: v for k, v in read_json(path).items() if k != "format_version"} | {"slices": []})
    page = made.write().check()
    assert page.sections == [s for s in SECTIONS if s not in gone and not (s == "importance" and "weights" in gone)]
    assert set(page.ids).isdisjoint(gone & {"contract", "notes"})
    assert ("Search: Network" in page.text) == ("tune" not in gone)  # the candidates stay
    assert ("curl" in page.html) == ("preflight" not in gone)
    assert re.findall(r"^## (.*)$", page.card, re.MULTILINE) == list(CARD)


def test_a_refused_run_says_why_and_what_goes_on_serving(tmp_path: Path) -> None:
    made = make(tmp_path, champion=True)
    flight = {**PREFLIGHT, "passed": False, "reasons": ["skew: 3 cells differ"], "latency_ms": {}, "worst_score_gap": -1.0}
    page = made.saying(outcome="refused", release="old:1", preflight=flight).write().check()
    text = " ".join(page.text.split())
    assert "Refused What serves stays as it is: old:1." in text and "Preflight: skew: 3 cells differ." in text
    assert ("li", "class", "no") in page.attributes and ("main", "class", "refused") in page.attributes
    assert "Champion" in text and "Largest gap" not in text
    assert "**Refused.**" in page.card and "**refused**: Preflight: skew" in page.card


def test_a_table_without_time_has_no_times(tmp_path: Path) -> None:
    made = make(tmp_path, "tumours").saying(preflight=None, outcome="unchanged")
    page = made.write().check()
    assert "Unchanged" in page.text and "Known up to" not in page.text and "By a seeded hash" in page.text
    assert "The table has no time" in page.card and "--as-of" not in page.card


def test_a_commit_says_whether_files_differ_from_it(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record._commit() == ""
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "a"], check=True)
    commit = record._commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "new.py").touch()
    assert record._commit() == f"{commit}-dirty"
    assert f"git checkout {commit}  # and" in made.saying(git_commit=f"{commit}-dirty").write().card
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record._commit() == ""


def test_an_evaluation_that_is_gone_is_said_clearly(tmp_path: Path) -> None:
    made = make(tmp_path)
    shutil.rmtree(tmp_path / "artifacts/evaluate")
    with pytest.raises(Exception, match=r"run abc-1: evaluation.json or verdict.json is gone"):
        made.write()


def test_figures_and_names_read_well() -> None:
    assert [number(x, sign=True) for x in (None, -0.00003, 0.5, -0.25)] == ["–", "0.0000", "+0.5000", "−0.2500"]
    assert moment(AS_OF) == "30 Dec 2013, 12:00 UTC"
    assert [metric_words(m) for m in ("auc", "log_loss", "pr_auc")] == ["AUC", "log loss", "PR-AUC"]
    assert model_title("challenger", "gbdt") == "Challenger: LightGBM, fixed defaults"
