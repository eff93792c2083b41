"""All records at once or one by one: the same columns, whatever a writer wrote, or a random bit changed."""

import random
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest

from features.landed import read_landed
from features.tfrecord import columns_at_once, example, records
from pipelines.errors import Refused
from pipelines.spec import Source
from tests.data.test_landed import SPEC, as_tfrecord, frame, rows_of

SOURCE: Source = SPEC.sources["trips"]
TYPES = {name: column.type for name, column in SOURCE.columns.items()}


def both(data: bytes) -> tuple[bool, pa.Table | None, pa.Table | None]:
    """Whether it was read at once; what was read then; and what one by one (None: refused)."""
    at_once = columns_at_once(data, *records("a file", data), TYPES) is not None
    fast = landed(data)
    with patch("features.landed.columns_at_once", return_value=None):
        return at_once, fast, landed(data)


def landed(data: bytes) -> pa.Table | None:
    try:
        return read_landed("a.tfrecord", data, SOURCE, timed=True)[0]
    except Refused:
        return None


def same(fast: pa.Table | None, slow: pa.Table | None) -> bool:
    """The same values, or both refused; NaN is NaN."""
    return (fast is None) == (slow is None) and (fast is None or str(fast.to_pydict()) == str(slow.to_pydict()))


def test_what_writers_write_is_read_at_once() -> None:
    at_once, fast, slow = both(as_tfrecord(rows_of(3, 500)))
    assert at_once and fast is not None and fast.num_rows == 500 and same(fast, slow)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_any_list_and_other_features_are_the_same(seed: int) -> None:
    """Features in another order in each record, twice, empty, of other columns, in lists that are not packed."""
    draw, framed = random.Random(seed), []
    for row in rows_of(seed, 60):
        made = example()()
        names = [*row, "other", *draw.sample([*row], 2)]
        draw.shuffle(names)
        for name in names:
            entry = made.features.feature.add(key=name)
            value, kind = row.get(name, 3), draw.random()
            if value is None or kind < 0.05:
                entry.value.SetInParent()
            elif isinstance(value, int):
                entry.value.int64_list.value.append(int(value))
            elif isinstance(value, float):
                entry.value.float_list.value.append(value)
            else:
                entry.value.bytes_list.value.append(str(value).encode())
        framed.append(frame(made.SerializeToString()))
    at_once, fast, slow = both(b"".join(framed))
    assert at_once and same(fast, slow)


def test_lists_that_are_not_packed() -> None:
    feature = b"\x0a\x02id" + b"\x12\x04\x1a\x02\x08\x07"
    late = b"\x0a\x04late" + b"\x12\x07\x12\x05\x0d" + np.float32(1.5).tobytes()
    entries = b"".join(b"\x0a" + bytes([len(e)]) + e for e in (feature, late))
    data = frame(b"\x0a" + bytes([len(entries)]) + entries)
    found = columns_at_once(data, *records("a file", data), TYPES)
    assert found is not None and found["id"].to_pylist() == [7] and found["late"].to_pylist() == [1.5]
    _, fast, slow = both(data)
    assert same(fast, slow)


def test_a_changed_byte_is_never_read_otherwise_than_by_protobuf() -> None:
    draw, taken = random.Random(5), 0
    whole = as_tfrecord(rows_of(9, 3))
    begins, lengths = records("a file", whole)
    payloads = [whole[b + 12 : b + 12 + n] for b, n in zip(begins.tolist(), lengths.tolist(), strict=True)]
    for _ in range(300):
        changed = [bytearray(payload) for payload in payloads]
        one = draw.choice(changed)
        one[draw.randrange(len(one))] = draw.randrange(256)
        at_once, fast, slow = both(b"".join(frame(bytes(payload)) for payload in changed))
        taken += at_once
        assert same(fast, slow)
    assert 60 < taken < 300


def test_a_record_with_two_values_or_another_type_is_left_to_protobuf() -> None:
    for cells in ({"late": [1.0, 2.0]}, {"name": 3}, {"full": 2}, {"name": b"\xff"}):
        rows = [{**row, **cells} if i == 1 else row for i, row in enumerate(rows_of(4, 3))]
        assert both(as_tfrecord(rows)) == (False, None, None)
