"""What an endpoint takes and answers, as OpenAPI 3.1: made from the spec, with a real row as the example."""

from collections.abc import Mapping
from typing import Any

from deploy.requests import MAX_BYTES, MAX_EXPLAINED, MAX_ROWS, SHOWN, Field, longest_of
from features.frame import Feature
from pipelines.spec import Spec

Json = dict[str, Any]
LARGEST = 2**63 - 1
REFUSALS = {
    "400": "The body is no JSON.", "401": "No key that this endpoint knows.", "408": "The body did not come in time.",
    "409": "Rows whose outcome is known already; `rows` says which.", "413": f"The body has more than {MAX_BYTES:,} bytes.",
    "422": "A field is unknown, missing, or of another type; the sentence names it.",
    "429": "More requests than are answered in time, or than one client may send; see `Retry-After`.",
    "503": "What the answer needs is not there, such as a served store of this version.",
}  # fmt: skip


def document(
    spec: Spec, release: str, fields: Mapping[str, Mapping[str, Field]], features: tuple[Feature, ...], *,
    row: Json | None, values: Json | None, keys: bool,
) -> Json:  # fmt: skip
    """The document. `fields`: by route; `row`, `values`: a real row by its key, and the features that it has."""
    told = {f.name: f"{f.kind}, from {f.group}" for f in features}
    schemas = {
        "Row": _row(fields["predict"], {}), "Features": _row(fields["predict_features"], told),
        "Asked": _asked("Row", row), "AskedFeatures": _asked("Features", values),
        "Answer": _answer(_closed({**_SCORED, **_KEYED, "key": _object_of(spec.row_key, fields["predict"])}, "explanation")),
        "AnswerFeatures": _answer(_closed(_SCORED, "explanation")), "Explanation": _EXPLANATION, "Refusal": _REFUSAL,
    }  # fmt: skip
    paths = {
        "/predict": _post("Answers for rows named by their keys; features are those of the clock's now", "Asked", "Answer", keys),
        "/predict_features": _post("Answers for rows given as features; one that is left out is missing", "AskedFeatures",
                                   "AnswerFeatures", keys),
        "/info": _get("What answers here, and how fresh the served store is", "application/json", {"type": "object"}, keys),
        "/metrics": _get("Numbers for Prometheus", "text/plain", {"type": "string"}, keys),
        "/livez": _get("Whether the process lives", "text/plain", {"type": "string"}, False),
        "/readyz": _get("Whether model, features and preprocessing have answered; else why not", "text/plain",
                        {"type": "string"}, False),
    }  # fmt: skip
    body: Json = {
        "openapi": "3.1.0", "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {"title": spec.title, "version": release, "summary": f"The endpoint of {spec.pipeline}",
                 "description": f"The answer is a probability; from {spec.serve.threshold:g} on the decision is yes."},
        "paths": paths, "components": {"schemas": schemas},
    }  # fmt: skip
    if keys:
        schemes = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}
        body["components"]["securitySchemes"] = schemes
    return body


def _row(fields: Mapping[str, Field], told: Mapping[str, str]) -> Json:
    properties = {}
    for name, field in fields.items():
        properties[name] = _typed(field) | ({"description": told[name]} if name in told else {})
    required = [field.name for field in fields.values() if field.required]
    found: Json = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**found, "required": required} if required else found


def _object_of(names: tuple[str, ...], fields: Mapping[str, Field]) -> Json:
    return _closed({name: _typed(fields[name]) for name in names})


def _typed(field: Field) -> Json:
    """What a field may hold. A field that is not required may be null."""
    kinds: dict[str, Json] = {
        "string": {"type": "string", "maxLength": longest_of("string"), "pattern": "^[^\\u001f]*$"},
        "text": {"type": "string", "maxLength": longest_of("text"), "pattern": "^[^\\u001f]*$"},
        "int64": {"type": "integer", "minimum": -LARGEST, "maximum": LARGEST},
        "float64": {"type": "number", "exclusiveMinimum": -(2.0**63), "exclusiveMaximum": 2.0**63},
        "bool": {"type": "boolean"},
        "timestamp": {"type": "string", "format": "date-time", "pattern": "^(?!000[01]|9999)"},
    }
    found = kinds[field.type]
    return found if field.required else {**found, "type": [found["type"], "null"]}


def _asked(kind: str, example: Json | None) -> Json:
    rows = {"type": "array", "minItems": 1, "maxItems": MAX_ROWS, "items": {"$ref": f"#/components/schemas/{kind}"}}
    about = f"why: the features that count most, {SHOWN} or as many as it says; with at most {MAX_EXPLAINED} rows"
    explain = {**_EXPLAIN, "description": about}
    found: Json = {
        "type": "object", "additionalProperties": False, "required": ["rows"], "properties": {"rows": rows, "explain": explain},
        "if": {"required": ["explain"], "properties": {"explain": {"not": {"const": False}}}},
        "then": {"properties": {"rows": {"maxItems": MAX_EXPLAINED}}},
    }  # fmt: skip
    return {**found, "examples": [{"rows": [example]}]} if example is not None else found


def _closed(properties: Json, *optional: str) -> Json:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required}


_EXPLAIN: Json = {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 1, "maximum": MAX_ROWS}]}
_NAMES = {"type": "array", "items": {"type": "string"}}
_EXPLANATION = _closed({
    "log_odds": {"type": "number", "description": "of the answer: base + all contributions + others"},
    "base": {"type": "number", "description": "without any feature"},
    "contributions": {"type": "array", "items": _closed({
        "feature": {"type": "string"}, "value": {"type": ["number", "string", "null"]}, "log_odds": {"type": "number"}})},
    "others": {"type": "number", "description": "the sum of the features that are not named"},
    "exact": {"type": "boolean", "description": "false: the sum is exact, the shares of a network are sampled"},
})  # fmt: skip
_SCORED: Json = {
    "probability": {"type": "number", "minimum": 0, "maximum": 1}, "decision": {"type": "boolean"},
    "missing": {**_NAMES, "description": "features without a value"},
    "unseen": {**_NAMES, "description": "categories that training did not know"},
    "explanation": {"$ref": "#/components/schemas/Explanation"},
}  # fmt: skip
_KEYED: Json = {
    "stale": {**_NAMES, "description": "views whose newest fact is too old"},
    "unknown_entity": {"type": "boolean", "description": "the served store does not know the row"},
    "outside_horizon": {"type": "boolean", "description": "asked too early or too late"},
}  # fmt: skip
_REFUSAL: Json = {
    "type": "object", "required": ["error"], "additionalProperties": False,
    "properties": {"error": {"type": "string", "description": "one sentence that says what to send"}, "code": {"type": "string"},
                   "rows": {"type": "array", "items": {"type": "integer"}}},
}  # fmt: skip


def _answer(row: Json) -> Json:
    return _closed({
        "request_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"}, "release": {"type": "string"},
        "now": {"type": ["string", "null"], "format": "date-time", "description": "the clock's"},
        "store_down": {"type": "string", "description": "why stored features are missing"},
        "rows": {"type": "array", "items": row},
    }, "store_down")  # fmt: skip


def _post(about: str, asked: str, answer: str, keys: bool) -> Json:
    statuses = REFUSALS if keys else {status: text for status, text in REFUSALS.items() if status != "401"}
    if asked == "AskedFeatures":
        statuses = {status: text for status, text in statuses.items() if status != "409"}
    query = {"name": "explain", "in": "query", "required": False, "description": "as the field of the same name",
             "schema": _EXPLAIN}  # fmt: skip
    return {"post": {
        "summary": about, "operationId": asked, "parameters": [query],
        "requestBody": {"required": True, "content": _json(asked)},
        "responses": {"200": {"description": "The answers, in the order of the rows.", "headers": _ID, "content": _json(answer)},
                      **{status: _refused(status, text) for status, text in statuses.items()}},
        **({"security": [{"bearer": []}, {"key": []}]} if keys else {}),
    }}  # fmt: skip


_ID = {"X-Request-Id": {"description": "names the request, in logs too", "schema": {"type": "string"}}}
_AGAIN = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}


def _refused(status: str, text: str) -> Json:
    headers = {**_ID, **_AGAIN} if status in ("429", "503") else _ID
    return {"description": text, "headers": headers, "content": _json("Refusal")}


def _json(schema: str) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _get(about: str, media: str, schema: Json, keys: bool) -> Json:
    found: Json = {"summary": about, "responses": {"200": {"description": about, "content": {media: {"schema": schema}}}}}
    if keys:
        found |= {"security": [{"bearer": []}, {"key": []}]}
        found["responses"]["401"] = {"description": REFUSALS["401"], "content": _json("Refusal")}
    if about.startswith("Whether model"):
        found["responses"]["503"] = {"description": "Not yet, and why.", "content": {media: {"schema": schema}}}
    return {"get": found}
