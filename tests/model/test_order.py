"""The order of training rows: a function of seed and epoch, cut alike for every world size, resumed where it was."""

import pytest
import torch

from models.arrays import Shape, epoch_shape
from models.data import Loader, Resident

ROWS = 1_000
DATA = Resident(torch.arange(ROWS, dtype=torch.float32)[:, None], torch.zeros(ROWS, 0, dtype=torch.int64), torch.zeros(ROWS))
SHAPE = Shape(batch=64, steps=15)


def loader(rank: int = 0, world: int = 1, seed: int = 7, shape: Shape = SHAPE) -> Loader:
    return Loader(DATA, shape, seed, rank, world)


def epoch(source: Loader) -> list[list[int]]:
    """Row numbers of the batches of one epoch."""
    return [scaled[:, 0].int().tolist() for scaled, _, _ in source]


def test_an_epoch_sees_each_row_at_most_once_and_the_next_in_another_order() -> None:
    one = loader()
    first, second = epoch(one), epoch(one)
    for batches in (first, second):
        rows = [row for batch in batches for row in batch]
        assert len(batches) == len(one) == 15 and len(rows) == len(set(rows)) == 960
    assert first != second
    assert first == epoch(loader()) != epoch(loader(seed=8))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_that_one_rank_sees(world: int) -> None:
    whole, parts = loader(), [loader(rank, world) for rank in range(world)]
    for _ in range(2):
        cut = [epoch(part) for part in parts]
        for step, batch in enumerate(epoch(whole)):
            shards = [rows[step] for rows in cut]
            assert {len(shard) for shard in shards} == {64 // world}
            assert [batch[rank::world] for rank in range(world)] == shards


@pytest.mark.parametrize("seen", [0, 1, 14, 15, 16, 29])
def test_a_loader_resumes_at_the_next_batch(seen: int) -> None:
    """`seen` batches over two epochs; a state taken after the last of an epoch leads into the next one."""
    calm = loader()
    expected = epoch(calm) + epoch(calm)
    torn = loader()
    found: list[list[int]] = []
    batches = iter(torn)
    while len(found) < seen:
        if len(found) == 15:
            batches = iter(torn)
        found.append(next(batches)[0][:, 0].int().tolist())
    state = torn.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    while len(found) < 30:
        found += epoch(resumed)
    assert found == expected


def test_small_tables_get_smaller_batches_and_no_row_count_is_too_small() -> None:
    assert epoch_shape(100_000, 512, 1) == Shape(512, 195)
    assert epoch_shape(1_600, 512, 2) == Shape(96, 16)
    for rows in range(1, 200):
        shape = epoch_shape(rows, 512, 2)
        assert shape.steps >= 1 and shape.batch % 2 == 0
        assert shape.batch * shape.steps <= max(rows, shape.batch)
