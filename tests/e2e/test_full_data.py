"""The whole year: an honest model lands where an honest model can, and the leak that one word opens is seen."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features import preprocess
from features.frame import feature_list
from features.ingest import Snapshot, ingest, read_table
from features.rows import PARTS, prediction_rows
from features.store import FeatureSet, build_features, first_needed, historical_features
from models.calibrate import sigmoid
from models.evaluate import auc, log_loss
from models.gbdt import fit_gbdt
from models.score import TreeScorer
from pipelines.home import Home
from pipelines.sample import land
from pipelines.spec import load_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800)]

Year = tuple[Home, Snapshot, dict[str, pa.Table], FeatureSet]


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> Year:
    home, spec = Home(tmp_path_factory.mktemp("year")), load_spec("flights")
    land(spec, home)
    snapshot = ingest(spec, home)
    tables = {name: read_table(spec, home, snapshot, name) for name in spec.sources}
    features = build_features(spec, home, snapshot, since=first_needed(spec, snapshot.watermark_us))
    return home, snapshot, tables, features


def _baseline(year: Year, tmp_path: Path, *overrides: str) -> tuple[float, float, dict[str, int]]:
    """Test AUC and log loss of LightGBM at its fixed defaults, and the row counts."""
    home, snapshot, tables, features = year
    spec = load_spec("flights", overrides)
    rows = prediction_rows(spec, tables, snapshot.watermark_us)
    kept = np.flatnonzero(rows.part >= 0)
    label, part = rows.label[kept].astype(np.float64), rows.part[kept]
    frame = historical_features(spec, home, features, rows.table.take(pa.array(kept)).combine_chunks(), rows.t[kept])
    batch = preprocess.fit(frame, part == 0, feature_list(spec)).transform(frame)
    del frame
    (tmp_path / "gbdt.txt").write_text(fit_gbdt(spec.gbdt, batch, label, part, spec.seed, threads=2).text)
    test = np.flatnonzero(part == PARTS.index("test"))
    probability = sigmoid(TreeScorer(tmp_path / "gbdt.txt").logit(batch.take(test)))
    return auc(label[test], probability), log_loss(label[test], probability), rows.counts


def test_an_honest_model_an_hour_before(year: Year, tmp_path: Path) -> None:
    found, loss, counts = _baseline(year, tmp_path)
    print(f"60 min before: AUC {found:.4f}, log loss {loss:.4f}, {counts}")
    assert 0.773 <= found < 0.80
    assert loss < 0.47
    assert counts["unlabelled"] > 9_000


def test_the_leak_at_departure_without_closed_by(year: Year, tmp_path: Path) -> None:
    """A flight that left early is in its own windows by then; with `closed_by` it is no row, and the leak is gone."""
    short = "split.train=60d"  # enough to see it
    leaky, _, open_counts = _baseline(year, tmp_path, "predict_at.lead=0m", "closed_by=[]", short)
    honest, _, closed_counts = _baseline(year, tmp_path, "predict_at.lead=0m", short)
    print(f"at departure: AUC {leaky:.4f} without closed_by, {honest:.4f} with it, {closed_counts}")
    assert leaky > 0.83
    assert honest < 0.77
    assert closed_counts["closed_before_asked"] > 100_000
    assert open_counts["rows"] > closed_counts["rows"]
