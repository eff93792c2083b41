"""From JSON to rows: strict types, finite numbers, and one sentence that says what to send."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from features.frame import Feature
from pipelines.clock import parse_time
from pipelines.errors import nearest
from pipelines.spec import Spec

MAX_ROWS = 1_000
MAX_NAME, MAX_TEXT = 1_000, 100_000  # characters of a string, and of what is read as tokens
MAX_BYTES = 4_000_000
_NOT_TEXT = re.compile("[\x1f\ud800-\udfff]")  # the separator of keys, and halves of characters that are no text


class BadRequest(Exception):
    """A 4xx answer: status and one sentence."""

    def __init__(self, status: int, message: str, **details: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.details = status, message, details


@dataclass(frozen=True)
class Field:
    """A field of a request row and the type that it must have."""

    name: str
    type: str
    required: bool


def key_fields(spec: Spec) -> dict[str, Field]:
    """The fields that `/predict` takes: the row key, and what may stand in for an unknown row."""
    columns = spec.row_source.columns
    found = {}
    for name in spec.row_key:
        found[name] = Field(name, columns[name].type if name in columns else "string", True)
    for name in spec.serve.request:
        found.setdefault(name, Field(name, field_type(spec, spec.rows.source, name), False))
    return found


def feature_fields(features: tuple[Feature, ...]) -> dict[str, Field]:
    """The fields that `/predict_features` takes: every feature; one that is left out is missing."""
    types = {"number": "float64", "category": "string", "text": "text"}
    return {f.name: Field(f.name, types[f.kind], False) for f in features}


def field_type(spec: Spec, source: str, column: str) -> str:
    """What a field may hold: the declared type of a column, or text for one that is read as tokens."""
    text = source == spec.rows.source and column in spec.features.texts
    return "text" if text else spec.sources[source].columns[column].type


def longest_of(kind: str) -> int:
    """Characters that a value of a type has at most."""
    return MAX_TEXT if kind == "text" else MAX_NAME


def parse(body: bytes, fields: dict[str, Field]) -> list[dict[str, Any]]:
    """The rows of a request, timestamps as int µs. Raises BadRequest."""
    rows = listed(body, "rows")
    if not 1 <= len(rows) <= MAX_ROWS:
        raise BadRequest(422, f"{len(rows)} rows; send 1 to {MAX_ROWS:,}")
    return [typed_row(f"rows[{i}]", row, fields) for i, row in enumerate(rows)]


def listed(body: bytes, name: str) -> list[Any]:
    """The list that is the one field of a JSON body. Raises BadRequest."""
    if len(body) > MAX_BYTES:
        raise BadRequest(413, f"the body has {len(body):,} bytes; at most {MAX_BYTES:,} are taken: send fewer rows")
    try:
        value = json.loads(body, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"the body is not JSON ({str(error)[:80]}); send {{\"{name}\": [{{…}}]}}") from None
    if not isinstance(value, dict) or set(value) != {name} or not isinstance(value[name], list):
        raise BadRequest(422, f'send an object with one field, {{"{name}": [{{…}}, …]}}')
    found: list[Any] = value[name]
    return found


def _constant(name: str) -> NoReturn:
    raise BadRequest(422, f"{name} is not a number that can be answered; leave the field out if it is unknown")


def typed_row(where: str, row: object, fields: dict[str, Field]) -> dict[str, Any]:
    """The fields of one row, in their types, timestamps as int µs. Raises BadRequest, naming the field by `where`."""
    if not isinstance(row, dict):
        raise BadRequest(422, f"{where} is {_kind(row)}; send an object of fields")
    for name in row:
        if name not in fields:
            known = list(fields)
            shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
            raise BadRequest(422, f"{where}.{str(name)[:60]}: unknown field (known: {shown}{nearest(name, known)})")
    for field in fields.values():
        if field.required and row.get(field.name) is None:
            raise BadRequest(422, f"{where}.{field.name} is missing; send a {_WANTED[field.type]}")
    return {name: _value(f"{where}.{name}", value, fields[name].type) for name, value in row.items()}


EARLIEST, LATEST = parse_time("0002-01-01"), parse_time("9999-01-01")  # whose local times Python can tell
_WANTED = {
    "string": "text", "text": "text", "int64": "whole number", "float64": "number", "bool": "true or false",
    "timestamp": "time such as \"2013-12-30T12:00:00Z\"",
}  # fmt: skip


def _value(where: str, value: object, kind: str) -> Any:
    if value is None:
        return None
    if kind == "timestamp" and isinstance(value, str):
        try:
            at = parse_time(value)
        except (ValueError, OverflowError) as error:
            raise BadRequest(422, f"{where}: {error}") from None
        if not EARLIEST <= at <= LATEST:
            raise BadRequest(422, f"{where} is out of range; send a time in the years 2 to 9998")
        return at
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "string": isinstance(value, str),
        "text": isinstance(value, str),
        "int64": number and isinstance(value, int),
        "float64": number,
        "bool": isinstance(value, bool),
        "timestamp": False,
    }[kind]
    if not fits:
        raise BadRequest(422, f"{where} is {_kind(value)}; send a {_WANTED[kind]}")
    if number and not (abs(value) < 2**63 and math.isfinite(value)):  # type: ignore[arg-type]
        raise BadRequest(422, f"{where} is out of range; send a finite number")
    longest = longest_of(kind)
    if isinstance(value, str) and (len(value) > longest or _NOT_TEXT.search(value)):
        raise BadRequest(422, f"{where} is longer than {longest:,} characters, or holds a control or a half character")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
