"""`millrace backfill` as a person types it: through Prefect, killed while it works, and what it says to bad input."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from features.quick_feast import FeatureStore
from pipelines.clock import parse_time
from pipelines.flights import write_sample
from pipelines.home import Home
from pipelines.manifest import ROOT, read_json
from tests.command import command, environment, millrace
from tests.e2e.buses import SPEC, Buses

RANGE = ("--from", "2024-05-03", "--to", "2024-05-05T12:00Z")


@pytest.fixture
def home(buses: Buses, tmp_path: Path) -> Home:
    shutil.copytree(buses.home.root, tmp_path / "home")
    (tmp_path / "buses.yaml").write_text(SPEC)
    return Home(tmp_path / "home")


@pytest.mark.slow
def test_a_backfill_from_the_command_line(home: Home, tmp_path: Path) -> None:
    """Rows in one folder that pandas reads, and a Feast repository that gives the same values for them."""
    done = millrace(home.root, "backfill", str(tmp_path / "buses.yaml"), *RANGE, "--as-of", "2024-05-05T00:00Z", "--json",
                    PYTHONPATH=str(ROOT))  # fmt: skip
    assert done.code == 0, done.err
    table = pq.read_table(done.answer["path"])
    assert table.num_rows == 600 and done.answer["as_of"] == "2024-05-05T00:00:00Z"
    assert table.to_pandas()["_t"].min().isoformat() == "2024-05-03T00:02:00+00:00"
    asked_later = pc.greater(table["_t"].cast(pa.int64()), parse_time("2024-05-05"))
    assert table.filter(asked_later)["_label"].null_count == 120
    entity = table.select(["_key_line", "_t"]).rename_columns(["line", "event_timestamp"])
    feast = FeatureStore(repo_path=str(home.root / done.answer["features"]))
    joined = feast.get_historical_features(entity_df=entity.to_pandas(), features=["line_late_1h:_count"]).to_df()
    assert joined["_count"].fillna(0).astype(float).tolist() == table["line_late_1h__count"].to_pylist()


@pytest.mark.parametrize(("words", "said"), [
    (("--from", "2024-05-03T06:00", "--to", "2024-05-05"), "error: --from: '2024-05-03T06:00' has no time zone: write "
                                                           "'2024-05-03T06:00Z' if it is UTC"),
    (("--from", "3 May", "--to", "2024-05-05"), "error: --from: '3 May' is not a time: write ISO 8601 such as "),
    (("--from", "2024-05-05", "--to", "2024-05-03"), "error: --from 2024-05-05T00:00:00Z is not before --to 2024-05-03T00"),
    ((*RANGE, "--as-of", "2025-01-01"), "error: --as-of 2025-01-01T00:00:00Z is later than now, 2024-05-06T12:00:00Z"),
])  # fmt: skip
def test_bad_input_ends_with_2_and_says_what_to_write(home: Home, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = millrace(home.root, "backfill", str(tmp_path / "buses.yaml"), *words)
    assert done.code == 2 and done.error.startswith(said), done.err
    assert not home.backfills("buses").exists()


@pytest.mark.slow
def test_a_backfill_of_months_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    prefect_tables: Callable[[Path], Path], tmp_path: Path
) -> None:
    homes = [Home(prefect_tables(tmp_path / name)) for name in ("killed", "whole")]
    write_sample(homes[0].landing("flights"), until_us=parse_time("2013-05-03"))
    shutil.copytree(homes[0].landing("flights"), homes[1].landing("flights"))
    words = ("flights", "--from", "2013-01-01", "--to", "2013-05-01", "--json")
    parts = homes[0].root / "artifacts" / "backfill_part"
    for wanted in (1, 2):
        process = subprocess.Popen(command("backfill", *words), env=environment(homes[0].root), cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        while len([*parts.glob("[!.]*")]) < wanted and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finished = {p: p.stat().st_mtime_ns for p in parts.glob("[!.]*/*.parquet")}
    ended = [millrace(made.root, "backfill", *words) for made in homes]
    assert [done.code for done in ended] == [0, 0], ended
    assert len(finished) in range(2, 4) and {p: p.stat().st_mtime_ns for p in finished} == finished
    digests = [read_json(Path(done.answer["path"]).with_name("done.json"))["files"] for done in ended]
    assert digests[0] == digests[1] and len(digests[0]) == 3
