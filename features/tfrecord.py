"""TFRecord without TensorFlow: frames of length and CRC, and `tf.train.Example`s read all at once.

N records. What almost every writer writes is read for all records together by numpy, a feature at a time; a file with any
other record is left to the `protobuf` package, record by record, which then also says what is wrong.
"""

import struct
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.errors import Refused

KINDS = {0x0A: "bytes_list", 0x12: "float_list", 0x1A: "int64_list"}  # by the first byte of a tf.train.Feature
ONE_KIND = {("string", "bytes_list"), ("timestamp", "bytes_list"), ("timestamp", "int64_list"), ("int64", "int64_list"),
            ("bool", "int64_list"), ("float64", "float_list")}  # fmt: skip


def records(where: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each record begins in the file, and its length without its frame (N, each): it begins 12 bytes on.

    Raises Refused naming the first that is corrupt or cut short.
    """
    import google_crc32c

    crc, begins, lengths, at = google_crc32c.value, list[int](), list[int](), 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        begins.append(at)
        lengths.append(length)
        at += 16 + length
    cut = at if at < len(data) else begins[-1] if at > len(data) else None  # the record that is not there as a whole
    found = _masked([crc(data[a : a + 8]) for a in begins])
    wrong = np.flatnonzero(found != _stored(data, [a + 8 for a in begins]))
    whole = [(a, n) for a, n in zip(begins, lengths, strict=True) if a != cut][: wrong[0] if len(wrong) else None]
    found = _masked([crc(data[a + 12 : a + 12 + n]) for a, n in whole])
    bad = np.flatnonzero(found != _stored(data, [a + 12 + n for a, n in whole]))
    if len(bad):
        raise Refused(f"{where}, record at byte {whole[bad[0]][0]:,}: the data do not match their checksum: corrupt")
    if len(wrong):
        told = "the length does not match its checksum: corrupt, or no TFRecord"
        raise Refused(f"{where}, record at byte {begins[wrong[0]]:,}: {told}")
    if cut is not None:
        needed = (lengths[-1] if cut in begins else 0) + cut + 16 - len(data)
        raise Refused(f"{where}, record at byte {cut:,}: cut short, it needs {needed:,} more bytes")
    return np.array(begins, np.int64), np.array(lengths, np.int64)


def _masked(crcs: list[int]) -> np.ndarray:
    crc = np.array(crcs, np.uint32)
    return (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)


def _stored(data: bytes, at: list[int]) -> np.ndarray:
    view = np.frombuffer(data, np.uint8)
    return view[np.array(at, np.int64)[:, None] + np.arange(4)].copy().view("<u4")[:, 0] if at else np.zeros(0, np.uint32)


class _Cursor:
    """Reads the same field of K messages of a buffer; `ok` (K): which were of the expected form so far."""

    def __init__(self, buffer: np.ndarray, at: np.ndarray) -> None:
        self.buffer, self.at, self.ok = buffer, at.copy(), np.ones(len(at), bool)

    def bytes(self) -> np.ndarray:
        found = self.buffer[np.minimum(self.at, len(self.buffer) - 1)]
        self.at += 1
        return found

    def tag(self, *expected: int) -> np.ndarray:
        found = self.bytes()
        self.ok &= np.isin(found, expected)
        return found

    def varint(self) -> np.ndarray:
        """uint64, 7 bits of each byte."""
        found, going = np.zeros(len(self.at), np.uint64), np.ones(len(self.at), bool)
        for shift in range(0, 70, 7):
            byte = self.bytes()
            found[going] |= (byte[going] & np.uint64(0x7F)).astype(np.uint64) << np.uint64(shift)
            self.at -= ~going
            going &= byte >= 0x80
            if not going.any():
                break
        self.ok &= ~going
        return found

    def length(self, end: np.ndarray) -> np.ndarray:
        """Where what follows ends (K): not beyond `end`."""
        size = self.varint()
        self.ok &= size <= np.maximum(end - self.at, 0).astype(np.uint64)
        return self.at + np.where(self.ok, size, 0).astype(np.int64)


def columns_at_once(
    data: bytes, begins: np.ndarray, lengths: np.ndarray, declared: Mapping[str, str]
) -> dict[str, pa.Array] | None:  # fmt: skip
    """The declared features (name → type) of every record as arrays (N), null where one has none; what no record has is absent.

    Texts and times in words are strings. None where a record is of any other form than writers use, or holds another type.
    """
    buffer = np.frombuffer(data, np.uint8)
    inside = _Cursor(buffer, begins + 12)
    inside.tag(0x0A)
    end = inside.length(begins + 12 + lengths)
    if not (inside.ok & (end == begins + 12 + lengths)).all():
        return None
    at, found = inside.at, {}
    columns: dict[str, _Column] = {}
    while len(left := np.flatnonzero(at < end)):
        entry = _Cursor(buffer, at[left])
        entry.tag(0x0A)
        stop = entry.length(end[left])
        entry.tag(0x0A)
        key_end = entry.length(stop)
        key, entry.at = entry.at, key_end.copy()
        entry.tag(0x12)
        entry.ok &= entry.length(stop) == stop
        told = np.flatnonzero(entry.at < stop)
        feature, kind = _Cursor(buffer, entry.at[told]), np.zeros(len(left), np.uint8)
        kind[told] = feature.tag(*KINDS)
        feature.ok &= feature.length(stop[told]) == stop[told]
        entry.at[told] = feature.at
        if not (entry.ok.all() and feature.ok.all()):
            return None
        for some, name in _by_name(buffer, key, key_end):
            if name is None:
                return None
            if name in declared:
                column = columns.setdefault(name, _Column(len(begins), declared[name]))
                if not column.take(buffer, left[some], kind[some], entry.at[some], stop[some]):
                    return None
        at[left] = stop
    for name, column in sorted(columns.items()):
        array = column.array(buffer)
        if array is None:
            return None
        found[name] = array
    return found


def _by_name(buffer: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Any:
    """(places, name) of keys that are equal; the name is None where it is not plain ASCII."""
    left = np.arange(len(begin))
    while len(left):
        first = buffer[begin[left[0]] : end[left[0]]]
        same = (end - begin)[left] == len(first)
        if same.any():
            same[same] = (buffer[begin[left[same], None] + np.arange(len(first))] == first).all(axis=1)
        yield left[same], first.tobytes().decode() if (first < 0x80).all() else None
        left = left[~same]


class _Column:
    """The values of one feature."""

    def __init__(self, rows: int, declared: str) -> None:
        self.declared, self.kind = declared, 0
        self.known, self.begin, self.end = np.zeros(rows, bool), np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.numbers = np.zeros(rows, np.int64)

    def take(self, buffer: np.ndarray, rows: np.ndarray, kind: np.ndarray, at: np.ndarray, end: np.ndarray) -> bool:
        """One list for each of these rows, which holds one value or none; False where one does not, or is of another kind."""
        given = end > at
        rows, kind, end = rows[given], kind[given], end[given]
        if not len(rows):
            return True
        self.kind = self.kind or int(kind[0])
        if not (kind == self.kind).all() or (self.declared, KINDS[self.kind]) not in ONE_KIND:
            return False
        value = _Cursor(buffer, at[given])
        if KINDS[self.kind] == "bytes_list":
            value.tag(0x0A)
            value.ok &= value.length(end) == end
        elif KINDS[self.kind] == "float_list":
            packed = value.tag(0x0A, 0x0D) == 0x0A
            value.ok &= ~packed | (value.bytes() == 4)
            value.at -= ~packed
            value.ok &= end - value.at == 4
        else:
            packed = value.tag(0x0A, 0x08) == 0x0A
            value.ok &= ~packed | (value.bytes() == end - value.at)
            value.at -= ~packed
            self.numbers[rows] = value.varint().view(np.int64)
            value.ok &= value.at == end
        self.known[rows], self.begin[rows], self.end[rows] = True, value.at, end
        return bool(value.ok.all())

    def array(self, buffer: np.ndarray) -> pa.Array | None:
        """The values, or None where they do not fit the declared type."""
        if KINDS.get(self.kind) == "bytes_list":
            size = np.where(self.known, self.end - self.begin, 0)
            offsets = np.concatenate([[0], np.cumsum(size)])
            if offsets[-1] >= 2**31:
                return None
            texts = buffer[np.repeat(self.begin - offsets[:-1], size) + np.arange(offsets[-1])]
            valid = pa.array(self.known).buffers()[1]
            array = pa.StringArray.from_buffers(len(size), pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(texts), valid)
            try:
                array.validate(full=True)
            except pa.ArrowInvalid:
                return None
            return array
        if KINDS.get(self.kind) == "float_list":
            four = buffer[np.where(self.known, self.begin, 0)[:, None] + np.arange(4)]
            return pa.array(four.copy().view("<f4")[:, 0].astype(np.float64), mask=~self.known)
        if not self.kind:
            return pa.nulls(len(self.known))
        if self.declared == "bool" and not np.isin(self.numbers, (0, 1)).all():
            return None
        kind = {"bool": pa.bool_(), "timestamp": pa.timestamp("us", "UTC")}.get(self.declared, pa.int64())
        return pa.array(self.numbers, mask=~self.known).cast(kind)


# tensorflow/core/example/{example,feature}.proto, the map as the repeated entries that it is on the wire, which is faster to read
_EXAMPLE = """
name: "example.proto" package: "tf" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: ".tf.BytesList" oneof_index: 0 label: LABEL_OPTIONAL }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: ".tf.FloatList" oneof_index: 0 label: LABEL_OPTIONAL }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: ".tf.Int64List" oneof_index: 0 label: LABEL_OPTIONAL } }
message_type { name: "Features"
  field { name: "feature" number: 1 type: TYPE_MESSAGE type_name: ".tf.Features.FeatureEntry" label: LABEL_REPEATED }
  nested_type { name: "FeatureEntry"
    field { name: "key" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".tf.Feature" label: LABEL_OPTIONAL } } }
message_type { name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".tf.Features" label: LABEL_OPTIONAL } }
"""


@cache
def example() -> Any:
    """The class of tf.train.Example."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))
