"""Keys as text, so that training, the stores and a request name a group in one way."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SEPARATOR = "\x1f"
FEW = 1_000  # rows whose whole keys cost no more than a look at one column
KNOWN = "_known_at"  # column that every table read from a snapshot carries


def text_keys(columns: Sequence[pa.Array | pa.ChunkedArray], length: int) -> pa.Array:
    """One text per row naming its key (shape [length]); null where any key column is null.

    Timestamps count as µs. No columns: the one key that all rows share, the empty text.
    """
    parts = []
    for column in columns:
        array = one_chunk(column)
        if pa.types.is_timestamp(array.type):
            array = array.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
        parts.append(array if pa.types.is_string(array.type) else array.cast(pa.string()))
    if not parts:
        return pa.repeat(pa.scalar(""), length)
    if len(parts) == 1:
        return parts[0]
    return pc.binary_join_element_wise(*parts, SEPARATOR)


def text_key(values: Sequence[object]) -> str | None:
    """The same text for one key given as Python values (timestamps as int µs); None when any is None."""
    parts = []
    for value in values:
        if value is None:
            return None
        parts.append(str(value).lower() if isinstance(value, bool) else str(value))
    return SEPARATOR.join(parts)


def one_chunk(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The column as one array; not copied where it is one."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def filled(array: pa.Array, missing: object) -> np.ndarray:
    """Values with `missing` for null; not copied where there is none."""
    whole = pc.coalesce(array, pa.scalar(missing, array.type)) if array.null_count else array  # sooner than fill_null
    return whole.to_numpy(zero_copy_only=False)


def grouped(keys: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The distinct non-null keys in order, and the position of each key among them (int64, −1 where null)."""
    encoded = keys.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    rank = np.full(len(order) + 1, -1)
    rank[order.to_numpy()] = np.arange(len(order))
    return encoded.dictionary.take(order), rank[filled(encoded.indices, len(order))]


def true(mask: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A mask as numpy has it (bool, N): null is false."""
    return filled(one_chunk(mask), False)


def codes_of(keys: pa.Array, known: pa.Array) -> np.ndarray:
    """Position of each key in `known` (int64), −1 where it is null or not there."""
    return filled(pc.index_in(keys, value_set=known, skip_nulls=True), -1).astype(np.int64)


def rows_among(table: pa.Table, key: Sequence[str], wanted: pa.Table) -> np.ndarray:
    """Positions of the rows of a table whose key is that of a row of another one (int64, ascending); a null is none."""
    rows = np.arange(table.num_rows if wanted.num_rows else 0)
    for name in key:  # a look at one column leaves fewer for the next, and few to be compared whole
        if len(rows) > FEW and table[name].type == wanted[name].type:
            some = table[name] if len(rows) == table.num_rows else table[name].take(pa.array(rows))
            rows = rows[true(pc.is_in(some, value_set=one_chunk(wanted[name]), skip_nulls=True))]
    if len(rows) and key:
        names = text_keys(key_arrays(table.select([*key]).take(pa.array(rows)), key), len(rows))
        rows = rows[codes_of(names, text_keys(key_arrays(wanted, key), wanted.num_rows)) >= 0]
    return rows


def key_runs(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Keys of a sorted dictionary column, and where each begins (K + 1)."""
    array = one_chunk(column.unify_dictionaries())
    codes = array.indices.to_numpy()
    begins = np.flatnonzero(np.diff(codes, prepend=-1))
    return array.dictionary.take(pa.array(codes[begins])), np.append(begins, len(codes))


def key_arrays(table: pa.Table, names: Sequence[str]) -> list[pa.ChunkedArray]:
    """Key columns of a table, in the order of the names."""
    return [table.column(name) for name in names]


def request_key(row: Mapping[str, object], names: Sequence[str]) -> str | None:
    """Text key of one request row."""
    return text_key([row.get(name) for name in names])
