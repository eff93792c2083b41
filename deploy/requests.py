"""From JSON to rows: strict types, finite numbers, and one sentence that says what to send."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import parse_qs

from features.frame import Feature
from pipelines.clock import parse_time
from pipelines.errors import nearest
from pipelines.spec import Spec

MAX_ROWS = 1_000
MAX_NAME, MAX_TEXT = 1_000, 100_000  # characters of a string, and of what is read as tokens
MAX_BYTES = 4_000_000
MAX_EXPLAINED, SHOWN = 20, 10  # rows of a request that wants to be explained, and features that are named unless it says how many
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


@dataclass(frozen=True)
class Asked:
    """What a request asks: its rows, and how many features of each answer are to be explained (0: none)."""

    rows: list[dict[str, Any]]
    explain: int = 0


def asked(body: bytes, fields: dict[str, Field], query: str = "") -> Asked:
    """A request in its types, timestamps as int µs. `query`: what follows the `?`, where `explain` may stand too.

    Raises BadRequest.
    """
    whole = _object(body, "rows", ("explain",))
    rows = whole["rows"]
    if not 1 <= len(rows) <= MAX_ROWS:
        raise BadRequest(422, f"{len(rows)} rows; send 1 to {MAX_ROWS:,}")
    explain = max(_explain(whole.get("explain", False)), _queried(query) if query else 0)
    if explain and len(rows) > MAX_EXPLAINED:
        raise BadRequest(422, f"{len(rows)} rows to be explained; send at most {MAX_EXPLAINED} with `explain`")
    return Asked([typed_row(f"rows[{i}]", row, fields) for i, row in enumerate(rows)], explain)


def _explain(value: object) -> int:
    if isinstance(value, bool):
        return SHOWN if value else 0
    if isinstance(value, int) and 1 <= value <= MAX_ROWS:
        return value
    raise BadRequest(422, f"explain is true, false, or how many features are to be named, 1 to {MAX_ROWS:,}")


def _queried(query: str) -> int:
    fields = parse_qs(query, keep_blank_values=True)
    for name in fields:
        if name != "explain":
            raise BadRequest(422, f"{name[:60]!r} is no parameter (known: explain)")
    text = fields.get("explain", ["false"])[-1]
    return _explain({"true": True, "false": False}.get(text, int(text) if re.fullmatch("[0-9]{1,8}", text) else None))


def listed(body: bytes, name: str) -> list[Any]:
    """The list that is the one field of a JSON body. Raises BadRequest."""
    found: list[Any] = _object(body, name, ())[name]
    return found


def _object(body: bytes, name: str, optional: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object with one field that is a list, and perhaps others. Raises BadRequest."""
    if len(body) > MAX_BYTES:
        raise BadRequest(413, f"the body has {len(body):,} bytes; at most {MAX_BYTES:,} are taken: send fewer rows")
    try:
        value = _DECODE(body.decode(json.detect_encoding(body)))
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"the body is not JSON ({str(error)[:80]}); send {{\"{name}\": [{{…}}]}}") from None
    if not isinstance(value, dict) or {*value} - {*optional} != {name} or not isinstance(value[name], list):
        more = f"; {' and '.join(optional)} may stand beside it" if optional else ""
        raise BadRequest(422, f'send an object with one field, {{"{name}": [{{…}}, …]}}{more}')
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, no field of which stands in it twice: of two values it is not said which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if name in {n for n, _ in pairs[:i]})
        raise BadRequest(422, f"{name[:60]!r} stands twice in one object; send it once")
    return found


def _constant(name: str) -> NoReturn:
    raise BadRequest(422, f"{name} is not a number that can be answered; leave the field out if it is unknown")


_DECODE = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_once).decode


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
_FITS: dict[str, tuple[type, ...]] = {
    "string": (str,), "text": (str,), "int64": (int,), "float64": (int, float), "bool": (bool,), "timestamp": (),
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
    if not isinstance(value, _FITS[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise BadRequest(422, f"{where} is {_kind(value)}; send a {_WANTED[kind]}")
    if isinstance(value, str):
        longest = longest_of(kind)
        if len(value) > longest or _NOT_TEXT.search(value):
            raise BadRequest(422, f"{where} is longer than {longest:,} characters, or holds a control or a half character")
    elif isinstance(value, int | float) and not (abs(value) < 2**63 and math.isfinite(value)):
        raise BadRequest(422, f"{where} is out of range; send a finite number")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
