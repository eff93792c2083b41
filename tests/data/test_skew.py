"""Rows as they were asked for, on random pipelines: the version that the oracle knows then, else the request itself."""

import shutil
from pathlib import Path

import numpy as np

from features.skew import asked_rows, different
from tests.agreement import make_world, plain


def test_asked_rows_are_those_of_the_oracle(tmp_path: Path) -> None:
    stored = stood_in = 0
    for seed in range(24):
        world = make_world(seed, tmp_path / str(seed))
        spec, requests = world.spec, world.case.requests
        source, columns = spec.rows.source, spec.row_source.columns
        expected = []
        for request in requests:
            key = tuple(request.version.get(column) for column in spec.row_key)
            live = world.then.live_with(source, spec.row_key, key, request.t)
            stored, stood_in = stored + bool(live), stood_in + (not live)
            row = live[0].row if live else request.version
            expected.append({name: row.get(name) for name in columns})
        asked, t = [request.version for request in requests], np.array([request.t for request in requests], np.int64)
        assert plain(spec.row_source, asked_rows(spec, world.tables[source], asked, t)) == expected, seed
        shutil.rmtree(tmp_path / str(seed))
    assert stored > 50 and stood_in > 20


def test_cells_differ_by_their_last_bit_and_by_what_is_missing() -> None:
    one = {"number": np.array([0.1, np.nan, np.nan, 3.0]), "word": np.array(["a", None, None, "b"], object)}
    other = {"number": np.array([np.nextafter(0.1, 1), np.nan, 1.0, 3.0]), "word": np.array(["a ", None, "", "b"], object)}
    assert {name: wrong.tolist() for name, wrong in different(one, other).items()} == {
        "number": [True, False, True, False], "word": [True, False, True, False],
    }  # fmt: skip
