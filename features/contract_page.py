"""The result of a contract: as data, as the sentence of a refusal, as JSON and as one self-contained HTML page."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment

from pipelines.clock import iso
from pipelines.manifest import FORMAT_VERSION, digest_of

TEMPLATE = Path(__file__).with_name("contract_page.html.j2")
IN_MESSAGE = 3  # sample rows of a failure that a message shows; the page shows all that were kept


@dataclass(frozen=True)
class Check:
    """One expectation and what came of it. `broken`: it could not be evaluated, which says nothing of the data.

    `count` of `of` values or rows are wrong; rules on a whole table have no such count.
    """

    table: str
    rule: str
    columns: tuple[str, ...]
    words: str
    expected: str
    found: str
    verdict: Literal["passed", "failed", "broken"]
    count: int | None = None
    of: int | None = None
    sample_columns: tuple[str, ...] = ()
    sample_rows: tuple[tuple[str, ...], ...] = ()

    @property
    def share(self) -> float | None:
        return self.count / self.of if self.count is not None and self.of else None

    @property
    def where(self) -> str:
        return f"{self.table}.{self.columns[0]}" if len(self.columns) == 1 else self.table

    def sentence(self) -> str:
        """Table, column, rule, what was found and expected, and the first sample rows, in one line."""
        columns = f" ({', '.join(self.columns)})" if len(self.columns) > 1 else ""
        text = f"{self.where}{columns} [{self.rule}]: {self.found}; expected {self.expected}"
        rows = self.sample_rows[:IN_MESSAGE]
        if rows:
            pairs = [" ".join(f"{c}={v}" for c, v in zip(self.sample_columns, row, strict=True)) for row in rows]
            more = (self.count or len(rows)) - len(rows)
            text += f": {' | '.join(pairs)}" + (f" | and {more:,} more" if more > 0 else "")
        return text


@dataclass(frozen=True)
class Arrived:
    """Rows of one table, and how many identical ones were counted once."""

    table: str
    rows: int
    previous: int | None
    duplicates: int


@dataclass(frozen=True)
class Aside:
    """Rows of one table that are in quarantine: `rows` of `of`, by rule and columns, and some of them."""

    table: str
    rows: int
    of: int
    file: str
    reasons: tuple[tuple[str, str, int], ...]
    sample_columns: tuple[str, ...] = ()
    sample_rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class ContractResult:
    """Every expectation of a contract, judged. `seconds` and `report` are no part of the digest or the JSON."""

    pipeline: str
    snapshot: str
    previous: str | None
    watermark_us: int
    timed: bool
    arrived: tuple[Arrived, ...]
    checks: tuple[Check, ...]
    aside: tuple[Aside, ...] = ()
    seconds: float = 0.0
    report: str = ""

    @property
    def expectations(self) -> int:
        return len(self.checks)

    @property
    def rows(self) -> dict[str, int]:
        return {table.table: table.rows for table in self.arrived}

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict == "failed")

    @property
    def broken(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict == "broken")

    @property
    def accepted(self) -> bool:
        return not self.failures and not self.broken

    @property
    def digest(self) -> str:
        return digest_of(as_json(self))

    def message(self) -> str:
        """What a refusal says: a line for every failure, and for every check that could not run."""
        failed, broken = self.failures, self.broken
        parts = [f"{len(failed)} of {self.expectations} expectations failed"] if failed else []
        parts += [f"{len(broken)} of {self.expectations} checks could not run"] if broken else []
        verb = "is refused by the contract" if failed else "could not be checked"
        lines = [f"snapshot {self.snapshot[:16]} of {self.pipeline!r} {verb}: {', and '.join(parts)}"]
        lines += [f"  {check.sentence()}" for check in (*failed, *broken)]
        if not failed:
            lines.append("  this is a fault of the spec or of Millrace, not of the data: correct the field named above")
        return "\n".join([*lines, f"  report: {self.report}" if self.report else ""]).rstrip()


def as_json(result: ContractResult) -> dict[str, Any]:
    """The result as a JSON object that depends on data and spec alone."""
    return asdict(replace(result, seconds=0.0, report="")) | {"accepted": result.accepted}


def from_json(value: dict[str, Any]) -> ContractResult:
    """The inverse of `as_json`, for reports."""
    skip = ("accepted", "format_version", "checks", "arrived", "aside")
    fields = {name: item for name, item in value.items() if name not in skip}
    return ContractResult(
        **fields,
        arrived=tuple(Arrived(**item) for item in value["arrived"]),
        checks=tuple(_check(item) for item in value["checks"]),
        aside=tuple(_aside(item) for item in value.get("aside", ())),
    )


def _check(item: dict[str, Any]) -> Check:
    lists = {
        "columns": tuple(item["columns"]),
        "sample_columns": tuple(item["sample_columns"]),
        "sample_rows": tuple(tuple(row) for row in item["sample_rows"]),
    }
    return Check(**{**item, **lists})


def _aside(item: dict[str, Any]) -> Aside:
    lists = {
        "reasons": tuple((rule, columns, count) for rule, columns, count in item["reasons"]),
        "sample_columns": tuple(item["sample_columns"]),
        "sample_rows": tuple(tuple(row) for row in item["sample_rows"]),
    }
    return Aside(**{**item, **lists})


def percent(share: float) -> str:
    """A share as a person reads it: `2.31 %`, `< 0.001 %`."""
    if 0 < share < 1e-5:
        return "< 0.001 %"
    digits = 0 if share in (0, 1) else 1 if share >= 0.1 else 2 if share >= 0.001 else 3
    text = f"{100 * share:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def render(result: ContractResult) -> str:
    """One HTML page that needs nothing else: verdict, failures with sample rows, what arrived, all expectations."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    environment.filters["number"] = lambda value: f"{value:,}"
    by_table = {table.table: [c for c in result.checks if c.table == table.table] for table in result.arrived}
    known = iso(result.watermark_us).replace("T", " ").removesuffix("Z").removesuffix(":00") if result.timed else ""
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(result=result, by_table=by_table, known=known, format_version=FORMAT_VERSION)
