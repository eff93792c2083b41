"""Training rows streamed from Parquet: every row once an epoch, each batch a random sample of all, resumed where it was."""

import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from features.trainset import TrainingSet
from models import shards
from models.arrays import NUMBER, SHARDS, Arrays, Shape, streams, write_arrays
from models.data import Loader, Resident, ahead, resident
from models.elastic import Zygote
from models.job import Job
from models.shards import Shards
from pipelines.errors import MillraceError
from pipelines.spec import Train
from tests.model.small import write_small
from tests.model.test_training import assert_same, job, run, strike, weights

SHAPE = Shape(batch=96, steps=24)  # of 2,400 training rows in ten row groups
STREAM = Train(feed="stream")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return write_small(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def folder(small: TrainingSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_arrays(small, tmp_path_factory.mktemp("stream") / "arrays", STREAM)


@pytest.fixture
def rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    monkeypatch.setattr(shards, "WINDOW", 3)
    return Shards(folder / SHARDS)


@pytest.fixture
def held(small: TrainingSet) -> Resident:
    """The same rows in memory, oldest first."""
    some = small.rows("train")
    values = (small.batch.scaled[some], small.batch.codes[some], small.label[some].astype(np.float32))
    return Resident(*(torch.from_numpy(v) for v in values))


def order(rows: Shards, seed: int) -> list[int]:
    return [*rows.between(seed, SHAPE, 0, len(rows))[0].tolist()]


def epoch(loader: Loader) -> list[tuple[torch.Tensor, ...]]:
    return [*loader]


def same(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_every_row_comes_once_with_its_values_in_an_order_of_the_seed(rows: Shards, held: Resident) -> None:
    assert len(rows) == len(held) and len(rows.sizes) > 2 * shards.WINDOW
    first, second = order(rows, 1), order(rows, 2)
    assert sorted(first) == sorted(second) == [*range(len(rows))] and first != second and first == order(rows, 1)
    numbers, values = rows.between(1, SHAPE, 100, 1_500)
    assert numbers.tolist() == first[100:1_500]
    assert same([values], [held.take(numbers)])


def test_batches_are_those_of_the_order_and_ranks_share_them(rows: Shards, held: Resident) -> None:
    loader = Loader(rows, SHAPE, 7, 0, 1)
    whole = epoch(loader)
    numbers = torch.tensor(order(rows, 7 * 1_000_003))
    assert same(whole, [held.take(numbers[i : i + 96]) for i in range(0, 96 * 24, 96)])
    assert loader.last(2)[0].tolist() == numbers[96 * 22 : 96 * 24].tolist()
    for world in (2, 4):
        parts = [epoch(Loader(rows, SHAPE, 7, rank, world)) for rank in range(world)]
        for rank, part in enumerate(parts):
            assert same(part, [tuple(column[rank::world] for column in batch) for batch in whole])  # type: ignore[misc]


@pytest.mark.parametrize("seen", [0, 1, 5, 23, 24, 25, 47])
def test_a_loader_resumes_at_the_next_batch(rows: Shards, seen: int) -> None:
    calm, torn = Loader(rows, SHAPE, 7, 0, 1), Loader(rows, SHAPE, 7, 0, 1)
    expected, found = epoch(calm) + epoch(calm), list[tuple[torch.Tensor, ...]]()
    batches = iter(torn)
    while len(found) < seen:
        if len(found) == SHAPE.steps:
            batches = iter(torn)
        found.append(next(batches))
    resumed = Loader(rows, SHAPE, 7, 0, 1)
    resumed.load_state_dict(torn.state_dict())
    while len(found) < len(expected):
        found += epoch(resumed)
    assert same(found, expected)


def test_a_batch_is_a_random_sample_of_all_rows(rows: Shards) -> None:
    """Eighths of the time that the rows span, counted in each batch: as often as chance has them, chi-squared (7 degrees)."""
    seen = [np.bincount(np.array(order(rows, seed))[i : i + 96] * 8 // len(rows), minlength=8)
            for seed in range(5) for i in range(0, 96 * 24, 96)]  # fmt: skip
    distance = ((np.array(seen) - 12.0) ** 2 / 12.0).sum(1)
    assert distance.max() < 30 and 6 < distance.mean() < 8


def test_row_groups_meet_others_in_the_next_epoch(rows: Shards, folder: Path) -> None:
    groups = [pq.ParquetFile(folder / SHARDS).read_row_group(i)[NUMBER].to_pylist() for i in range(len(rows.sizes))]
    met = []
    for seed in (1, 2):
        place = np.argsort(order(rows, seed))
        begins = sorted((int(place[g].min()), i) for i, g in enumerate(groups))
        spans = [np.ptp(place[g]) for g in groups]
        assert max(spans) < shards.WINDOW * max(rows.sizes) and sorted(spans)[1] > max(rows.sizes)  # the last group may be alone
        met.append([{i for _, i in begins[at : at + shards.WINDOW]} for at in range(0, len(begins), shards.WINDOW)])
    assert met[0] != met[1]


def test_the_newest_rows_alone(small: TrainingSet, tmp_path: Path) -> None:
    newest = Shards(write_arrays(small, tmp_path / "arrays", STREAM, newest=300) / SHARDS)
    numbers, values = newest.between(1, SHAPE, 0, 300)
    some = small.rows("train")[-300:]
    assert len(newest) == 300
    assert np.array_equal(values[0].numpy(), small.batch.scaled[some][numbers.numpy()])


def test_rows_are_streamed_where_they_need_too_much_memory(small: TrainingSet) -> None:
    narrow = Train(feed_memory_mb=1)
    assert not streams(Train(), small) and not streams(narrow, small)
    wide = 2**20 // (4 * small.batch.scaled.shape[1] + 8 * small.batch.codes.shape[1] + 4) // len(small.rows("train")) + 1
    many = small.rows("train").repeat(wide)
    part, batch = np.zeros(len(many), np.int8), small.batch.take(many)
    large = TrainingSet(**{**vars(small), "part": part, "batch": batch, "label": small.label[many]})
    assert streams(narrow, large) and not streams(narrow, large, newest=1_000)
    assert streams(STREAM, small) and not streams(Train(feed="memory", feed_memory_mb=1), large)


def test_the_other_rows_stay_in_memory(small: TrainingSet, folder: Path) -> None:
    arrays = Arrays.load(folder)
    assert len(arrays.part) == len(small.part) - len(small.rows("train"))
    assert np.array_equal(resident(arrays, "valid_fit").scaled.numpy(), small.batch.scaled[small.rows("valid_fit")])


def test_a_damaged_file_is_named(folder: Path, tmp_path: Path) -> None:
    damaged = bytearray((folder / SHARDS).read_bytes())
    damaged[1_000:60_000] = bytes(59_000)
    (tmp_path / SHARDS).write_bytes(damaged)
    with pytest.raises(MillraceError, match=f"{SHARDS} cannot be read"):
        order(Shards(tmp_path / SHARDS), 1)


def test_what_is_made_ahead_comes_in_order_and_its_errors_too() -> None:
    def three() -> list[int]:
        yield from (1, 2, 3)  # type: ignore[misc]
        raise ValueError("no fourth")

    found = []
    with pytest.raises(ValueError, match="no fourth"):
        for item in ahead(three()):
            found.append(item)
    assert found == [1, 2, 3] and [*ahead(range(100))] == [*range(100)]


@pytest.mark.slow
def test_killed_ranks_end_with_the_same_weights_and_two_ranks_learn_what_one_learns(
    zygote: Zygote, folder: Path, tmp_path: Path
) -> None:
    def wanted(every_us: int = 20_000_000) -> Job:
        return job(folder, "train.feed=stream", "train.network.dropout=0.0", every_us=every_us)

    calm = run(zygote, tmp_path / "calm", wanted())
    hit = strike(zygote, tmp_path / "hit", [5, 38, 83], signal.SIGKILL)
    assert run(zygote, tmp_path / "hit", wanted(20_000)) == calm
    hit.join()
    assert (tmp_path / "hit" / "restarts.json").read_text().count("died of signal 9") >= 2
    assert_same(weights(tmp_path / "calm"), weights(tmp_path / "hit"))
    run(zygote, tmp_path / "two", wanted(), ranks=2)
    assert_same(weights(tmp_path / "calm"), weights(tmp_path / "two"), atol=1e-6)
