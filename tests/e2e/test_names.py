"""The pipeline with a text, by YAML alone: from names in Parquet to an endpoint that reads a name that it never saw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.process import call
from features.tokens import Tokens
from features.trainset import load_training_set
from pipelines.home import Home
from pipelines.manifest import read_json
from tests.command import millrace
from tests.e2e.test_tumours import logged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SETS = ("train.max_epochs=2", "gbdt.max_rounds=40", "gate.resamples=50", "serve.latency_budget=5s")


@pytest.fixture(scope="module")
def names(
    prefect_tables: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Home, dict[str, Any]]:
    """One name of six."""
    home = Home(prefect_tables(tmp_path_factory.mktemp("names")))
    assert millrace(home.root, "sample", "names").code == 0
    path = home.landing("names") / "names" / "names.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(pa.array(np.arange(0, len(table), 6))), path)
    done = millrace(home.root, "run", "names", "--json", sets=SETS)
    assert done.code == 0, done.err
    return home, done.answer


def test_a_network_and_a_bag_of_words_are_judged_on_the_same_rows(names: tuple[Home, dict[str, Any]]) -> None:
    home, outcome = names
    manifest = read_json(home.runs("names") / outcome["run_id"] / "manifest.json")
    assert outcome["outcome"] == "promoted" and manifest["preflight"]["passed"]
    assert {"words", "gbdt", "network"} <= manifest["metrics"].keys()
    assert manifest["metrics"]["challenger"]["auc"]["value"] > 0.85
    assert "Bag of words" in Path(outcome["report"]).read_text(encoding="utf-8")


def test_the_endpoint_reads_without_pytorch(names: tuple[Home, dict[str, Any]]) -> None:
    home, _ = names
    served = millrace(home.root, "serve", "names", "--background", "--port", "0", "--json", sets=SETS)
    assert served.code == 0, served.err
    try:
        romance, german = "Republica Populară Democrată", "Volksrepublik Nordland"
        rows = [{"name": romance, "kind": "country"}, {"name": german, "kind": "country"}, {"name": f"{romance} " * 40},
                {"kind": "country"}, {"name": "[SEP] \x00 東京 😀"}]  # fmt: skip
        status, body = call(f"{served.answer['url']}/predict_features", {"rows": rows})
        assert status == 200, body
        found = body["rows"]
        assert found[0]["probability"] > 0.7 > 0.3 > found[1]["probability"]
        assert [row["missing"] for row in found] == [[], [], ["kind"], ["name"], ["kind"]]
        for row, answer in zip(rows, found, strict=True):  # alone as among others
            _, alone = call(f"{served.answer['url']}/predict_features", {"rows": [row]})
            assert alone["rows"][0]["probability"] == pytest.approx(answer["probability"], abs=1e-6)
        assert [row["feature.name"] for row in logged(home, body["request_id"], "names")][:2] == [r["name"] for r in rows[:2]]
        maps = [Path(f"/proc/{p.pid}/maps").read_text() for p in _serving(home)]
        assert maps and any("tokenizers" in text for text in maps) and not any("libtorch" in text for text in maps)
    finally:
        millrace(home.root, "down", "names")


def _serving(home: Home) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("MILLRACE_HOME") == str(home.root):
            found.append(process)
    return found


def test_a_name_that_is_erased_is_in_no_token(names: tuple[Home, dict[str, Any]]) -> None:
    """The last test of its home. Rows and tokens stay side by side, and the bento is signed again."""
    home, _ = names
    (folder,) = home.root.glob("artifacts/training_set/*/")
    before = pq.read_table(folder / "frame.parquet")
    replayed = pq.read_table(next(home.root.glob("bentoml/bentos/*/*/src/bundle/replay.parquet")))["name"].to_pylist()
    gone = next(name for name in replayed if name.count(" ") == 2)  # a row that the bento tells of, too
    assert millrace(home.root, "erase", "names", "--key", f"name={gone}").code == 0
    frame, tokens = pq.read_table(folder / "frame.parquet"), Tokens.load(folder / "tokens.arrow")
    assert len(frame) == len(tokens) == len(before) - before["name"].to_pylist().count(gone)
    data = load_training_set(folder)
    assert data.preprocess.reader is not None and data.batch.tokens is not None
    again = data.preprocess.reader.read(data.frame)
    assert np.array_equal(again.values, tokens.values) and np.array_equal(again.end, tokens.end)
    assert millrace(home.root, "verify", "names").code == 0
