"""Requests that no client of good will sends: the grammar of `bench.fuzz`. Each kind gives the bytes of one request."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.e2e.buses import EVERY, NOW, trip_at

ROUTES = ("/predict", "/predict_features")
PAGES = ("/", "/docs", "/openapi.json", "/docs.json", "/info", "/metrics", "/livez", "/readyz", "/healthz", "/schema.json")
GOOD: dict[str, dict[str, Any]] = {"/predict": trip_at(NOW + 2 * EVERY), "/predict_features": {"line": "L1", "length": 4.5}}
ODD: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 1.5, -0.0, 1e300, -1e300, 5e-324, "", " ", "x" * 999,
    "x" * 1001, "\x00", "\x1f", "\ud800", "😀", "\u202e", "' OR 1=1 --", "{{7*7}}", "../../etc/passwd", "<script>", [], {}, [[]],
    {"a": 1}, "NaN", "2024-05-06", "2024-05-06T12:00:00Z", "2024-02-30T00:00:00Z", "0001-01-01T00:00Z", "0010-01-01T00:00:00Z",
    "9999-12-31T23:59:59.999999-23:59", "2024-05-06T12:00:60Z", "1e999", "0x10", "١٢", "5002",
]  # fmt: skip
NUMBERS = (
    "NaN", "-Infinity", "1e999", "-1e999", "9" * 20, "9" * 400, "9" * 5_000, "1." + "0" * 5_000, "1e-99999", "-", "01", "+1",
    ".5", "1.", "0x1F", "1_000", "1e", "--1", "9223372036854775807", "-9223372036854775808", "9.2e18",
)  # fmt: skip
NESTS = ((b"[", b"]"), (b'{"rows":[', b"]}"), (b'{"a":', b"}"))
DOUBLED = (
    b'{"rows": [{}], "rows": [{}]}', b'{"rows": [{"line": "L1", "line": "L2"}]}',
    b'{"rows": [{"li\\u006ee": "L1", "line": "L1"}]}',
    b'{"rows": [{"line": "L1"}], "explain": 1, "explain": 2}', b'{"__proto__": {}, "rows": [{}]}',
)  # fmt: skip
METHODS = (b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD", b"TRACE", b"POST", b"CONNECT", b"FOO", b"get", b"P\x00ST")
PATHS = (
    "/predict/", "//predict", "/predict%00", "/..%2f..%2fetc/passwd", "/../../etc/passwd", "/%ff%fe", "/predict;x=1", "*",
    "/predict#x", "/static_content/../../x", "/static_content/", "/assets/x", "/predict?" + "a" * 3_000, "/" + "a" * 50_000,
    "/preflight/features",
    "/predict?explain=1", "/predict?explain=true", "/predict?explain=-1", "/predict?explain=" + "9" * 400,
    "/predict?explain=%00",
    "/predict?explain=%ff", "/predict?explain=1&explain=2", "/predict?explain=", "/predict?" + "&" * 500,
    "/predict?x[]=1&y=%zz", "http://evil/predict", "/push", "/admin",
)  # fmt: skip
HEADERS: tuple[Sequence[bytes], ...] = (
    [b"Content-Type: application/vnd.bentoml+pickle"], [b"Content-Encoding: gzip"],
    [b"Content-Type: multipart/form-data; boundary=x"],
    [b"traceparent: 0123456789"], [b"traceparent: 00-" + b"0" * 32 + b"-" + b"1" * 16 + b"-01"],
    [b"traceparent: " + b"0" * 9_000],
    [b"Authorization: Bearer " + b"x" * 5_000], [b"X-API-Key: \xff\xfe"], [b"X-Forwarded-For: " + b"1.2.3.4, " * 500],
    [b"X: " + b"y" * 70_000], [b"A%d: b" % i for i in range(300)], [b"Expect: 100-continue"], [b"Bad Header: x"], [b": x"],
    [b"X\x00: y"], [b"X: a\r\n b"], [b"Upgrade: h2c"], [b"Accept: */*;q=nan"], [b"Host: y"], [b"Range: bytes=0-1"],
    [b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: x", b"Sec-WebSocket-Version: 13"],
    [b"If-None-Match: *"], [b"Cookie: " + b"a=b; " * 1_000], [b"X-Request-Id: " + b"z" * 2_000],
)  # fmt: skip
LENGTHS = (b"-1", b"abc", b"", b"0", b"+5", b"1e3", b"99999999999999999999", b"5, 5", b"5 5", b"40", b"0x10")
ENDS = (b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"zz\r\n", b"-1\r\n\r\n", b"0;a=b\r\n\r\n", b"ffffffffffffffff1\r\n")
CODINGS = (b"chunked", b"chunked", b"gzip, chunked", b"Chunked")
NOISE = (
    b"\x16\x03\x01\x02\x00\x01\x00", b"GET", b"\r\n" * 50, b"POST /predict HTTP/9.9", b"PRI * HTTP/2.0\r\n\r\nSM",
    b"POST /predict HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}",
)  # fmt: skip
Kind = Callable[[random.Random], bytes]


def http(route: str, body: bytes, *headers: bytes, method: bytes = b"POST", length: bool = True) -> bytes:
    """A request; without `length` nothing says how long its body is."""
    lines = [method + b" " + route.encode() + b" HTTP/1.1", b"Host: x", *headers]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def asking(route: str, count: int = 1, **more: Any) -> bytes:
    """A good body."""
    return json.dumps({"rows": [GOOD[route]] * count, **more}).encode()


def posted(draw: random.Random, body: bytes) -> bytes:
    return http(draw.choice(ROUTES), body, b"Content-Type: application/json")


def damaged(draw: random.Random) -> bytes:
    route = draw.choice(ROUTES)
    body = bytearray(asking(route, draw.randrange(1, 4), explain=True))
    for _ in range(draw.randrange(1, 8)):
        at = draw.randrange(len(body) or 1)
        body[at : at + draw.randrange(4)] = draw.randbytes(draw.randrange(4))
    return http(route, bytes(body))


def odd_values(draw: random.Random) -> bytes:
    route = draw.choice(ROUTES)
    row = {name: draw.choice(ODD) if draw.random() < 0.3 else value for name, value in GOOD[route].items()}
    if draw.random() < 0.2:
        row[str(draw.choice(ODD))] = draw.choice(ODD)
    return http(route, json.dumps({"rows": [row], **({"explain": draw.choice(ODD)} if draw.random() < 0.2 else {})}).encode())


def numbers(draw: random.Random) -> bytes:
    text = draw.choice(NUMBERS).encode()
    return posted(draw, b'{"rows": [{"line": "L1", "trip": %s, "length": %s}]}' % (text, text))


def nested(draw: random.Random) -> bytes:
    depth, (opens, closes) = draw.choice((10, 500, 990, 5_000, 50_000)), draw.choice(NESTS)
    inside = opens * depth + b"1" + closes * draw.choice((depth, 0))
    return posted(draw, inside if draw.random() < 0.5 else b'{"rows": [{"line": ' + inside + b"}]}")


def huge(draw: random.Random) -> bytes:
    size = draw.choice((10_000, 200_000, 3_999_000, 4_000_001))
    row, rows = b'{"rows": [{"line": "%s"}]}' % (b"x" * size), b'{"rows": [%s]}' % b",".join([b"{}"] * (size // 3))
    return posted(draw, draw.choice((row, rows, b" " * size)))


def doubled(draw: random.Random) -> bytes:
    return posted(draw, draw.choice(DOUBLED))


def no_utf8(draw: random.Random) -> bytes:
    body = asking("/predict")
    text = body.decode()
    return posted(draw, draw.choice((
        text.encode("utf-16"), text.encode("utf-32"), b"\xef\xbb\xbf" + body, draw.randbytes(200), body.replace(b"L",
        b"\xff\xfe"),
        text.replace("L", "\\ud83d").encode(),
    )))  # fmt: skip


def methods(draw: random.Random) -> bytes:
    return http(draw.choice((*ROUTES, *PAGES)), b"{}", method=draw.choice(METHODS))


def paths(draw: random.Random) -> bytes:
    return http(draw.choice(PATHS), asking("/predict"), method=draw.choice((b"POST", b"GET")))


def headers(draw: random.Random) -> bytes:
    path, method = draw.choice((*ROUTES, *PAGES[:6])), draw.choice((b"POST", b"GET"))
    return http(path, asking("/predict"), *draw.choice(HEADERS), method=method)


def lengths(draw: random.Random) -> bytes:
    more = draw.choice(([], [b"Content-Length: 3"], [b"Transfer-Encoding: chunked"]))
    return http("/predict", asking("/predict"), b"Content-Length: " + draw.choice(LENGTHS), *more, length=False)


def chunked(draw: random.Random) -> bytes:
    body = asking("/predict")
    parts = [body[i : i + 7] for i in range(0, len(body), 7)]
    whole = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return http("/predict", whole + draw.choice(ENDS), b"Transfer-Encoding: " + draw.choice(CODINGS), length=False)


def many(draw: random.Random) -> bytes:
    return http("/predict", asking("/predict", draw.choice((0, 20, 21, 200, 1_001, 10_000)), explain=draw.random() < 0.3))


def right(draw: random.Random) -> bytes:
    route = draw.choice(ROUTES)
    return http(route, asking(route, explain=draw.random() < 0.2))


def pages(draw: random.Random) -> bytes:
    return http(draw.choice(PAGES), b"", method=b"GET", length=False)


def noise(draw: random.Random) -> bytes:
    return draw.choice((draw.randbytes(300), *NOISE)) + draw.randbytes(draw.choice((0, 9))) + b"\r\n\r\n"


KINDS: dict[str, tuple[Kind, int]] = {  # and how often
    "damaged": (damaged, 20), "odd values": (odd_values, 20), "numbers": (numbers, 8), "nested": (nested, 4), "huge": (huge, 1),
    "doubled": (doubled, 3), "no UTF-8": (no_utf8, 5), "methods": (methods, 5), "paths": (paths, 6), "headers": (headers, 8),
    "lengths": (lengths, 5), "chunked": (chunked, 5), "many": (many, 1), "right": (right, 8), "pages": (pages, 4),
    "noise": (noise, 3),
}  # fmt: skip
# whose answer does not hang on what the connection brings next
WHOLE = ("damaged", "odd values", "numbers", "nested", "huge", "doubled", "no UTF-8", "many", "right", "pages")
