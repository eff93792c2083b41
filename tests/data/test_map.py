"""The map of bad input in tests/README.md names every kind, and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
README = (TESTS / "README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (.+?) \| (\S+::.+) \|$", README, flags=re.MULTILINE))
OPEN = README.partition("## Still open")[2]
# what the product must answer clearly
KINDS = (
    "empty landing", "a truncated Parquet file", "not Parquet at all", "a column missing", "a column renamed",
    "a column of another type", "two files disagreeing on types", "same key and known-at with different values",
    "a bad cell in CSV or JSON lines", "a TFRecord that is corrupt or cut short", "garbage under any form's name",
    "values that a narrower type would lose", "a column that files before had", "more bad rows than may be set aside",
    "a delivery unlike the days before", "a landed file changed", "a landed file deleted", "naive timestamps",
    "known-at before event time in an observation", "a table with 0 rows", "all-null column", "label with one class",
    "NaN/inf in numbers", "non-UTF-8 strings", "unknown spec field (nearest name suggested)", "window with a bad unit",
    "split with an empty part", "unknown pipeline", "a home that is read-only", "a home that is full",
    "a home of a newer format", "a home that was moved", "a second run while one is running",
    "Prefect server not reachable", "port taken",
    "events from the future", "clock skew between sources", "DST nights", "keys that change type", "10 million distinct keys",
    "a join larger than memory", "a view with no rows", "an expired TTL", "a store that is down",
    "a half-finished materialise or feed", "two writers at once", "a source that is written to while it is read",
    "endpoint: malformed JSON", "endpoint: wrong types", "endpoint: unknown field", "endpoint: unknown entity",
    "endpoint: flight already departed", "endpoint: NaN", "endpoint: 10 MB body", "endpoint: 0 and 1,001 rows",
    "endpoint: never 5xx, never a stack trace",
    "scoring files: no such input, not Parquet, cut short, empty", "scoring files: missing columns, wrong types, null keys",
    "scoring files: an output that holds something else, or was made of something else",
    "scoring files: corrupt in the middle, a full disk", "scoring files: killed, or the store fed meanwhile",
    "training: a corrupt newest checkpoint", "training: a disk that is full while a checkpoint is written",
    "training: a checkpoint of another spec, code or library", "training: a loss that is not finite",
    "training: a rank that hangs, is stopped, or keeps failing", "training: out of memory",
    "training: options that do not exist or do not fit together", "training: fp8 without the hardware, no compiler",
    "training: a module path that does not import, a module that cannot be trained", "training: SIGTERM",
    "training: a port that is taken", "training: fewer rows than a batch, too few for a step",
    "more requests than can be answered; clients that do not send",
    "prediction log: a full disk or queue, kills while it is tidied, what cannot be private",
    "clients that drip, cut the connection, or flood with new ones", "requests without a key, or too many of one client",
    "admin calls without a key, or from a web page", "requests that no client of good will sends",
    "a store that is down when the endpoint starts", "a store's server that takes questions and says nothing",
    "a clock that is set forwards or back while serving",
    "connections that are used for hours, lie idle, are half closed or cut, or stay through a rollout", "10,000 keys at once",
    "a poisoned bento: a file changed, missing or added, other libraries",
    "inference: a candidate that answers NaN, flips splits, cannot be made or is not installed",
    "inference: a compiled file that is damaged, missing, or made for another CPU",
    "text: a column that is none, a folder that is no encoder, an encoder that cannot be made",
    "training: a cap, budget or schedule of power that is wrong or cannot be kept",
    "releases: a challenger that is slow, hangs, answers NaN, crashes on start, needs an unknown feature, leaks memory",
    "releases: a controller or a proxy that is killed", "releases: no proxy installed, a port taken",
    "releases: a client that sends slowly, a body too large, no endpoint ready",
    "tracking: a package that is not installed", "tracking: a server that is down, or never answers",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_mapped_or_said_to_be_open(kind: str) -> None:
    assert kind in ROWS or f"- {kind}" in OPEN


@pytest.mark.parametrize("kind", ROWS)
def test_its_tests_exist(kind: str) -> None:
    """Every id: the file, the function in it, and the case among the texts of the file."""
    assert kind in KINDS
    for found in re.finditer(r"(\S+\.py)::(\w+)(?:\[(.+?)\])?(?:, |$)", ROWS[kind]):
        file, name, case = found.groups()
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, found[0]
        assert case is None or case in {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}, found[0]
    assert len(re.findall("::", ROWS[kind])) == len(re.findall(r"\S+\.py::\w+(?:\[.+?\])?(?:, |$)", ROWS[kind]))
