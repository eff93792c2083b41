"""The contract: what the spec says of its tables, as expectations that Great Expectations judges.

The only file that imports great_expectations, and inside functions: the import costs seconds.
"""

import logging
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.contract_page import Arrived, Aside, Check, ContractResult, as_json, percent, render
from features.history import Judged, judge_new, words_of
from features.ingest import ARROW, Snapshot, quarantined, read_table
from features.keys import KNOWN, text_keys
from features.quarantine import bad_rows
from pipelines.clock import iso
from pipelines.errors import MillraceError, Refused
from pipelines.home import Home
from pipelines.manifest import read_json, write_atomic, write_json
from pipelines.spec import Column, Source, Spec

SAMPLES = 8  # bad rows of a failure that the page shows
PEEK = 40  # bad values of a failure that are looked at, to name some
_NAMES = {str(kind): name for name, kind in ARROW.items()}
_LABELS = {KNOWN: "known-at"}


@dataclass(frozen=True)
class Rule:
    """One expectation: what a person reads, and what Great Expectations is asked."""

    table: str
    name: str  # field of the spec that says it
    columns: tuple[str, ...]
    words: str
    expected: str
    wrong: str  # "3 of 20 values (15 %) …"
    gx: str
    kwargs: dict[str, Any]
    to: str = ""  # table that is referred to


def check_contract(
    spec: Spec, home: Home, snapshot: Snapshot, previous: Snapshot | None = None, *, folder: Path | None = None
) -> ContractResult:
    """The result when every expectation holds; `contract.json` is then written to `folder`, if given.

    Raises Refused for bad data and MillraceError for a check that cannot run, after writing the page
    `quarantine/PIPELINE/SNAPSHOT16.html`; nothing else is written then.
    """
    started = time.monotonic()
    tables = {name: read_table(spec, home, snapshot, name) for name in spec.sources}
    result = ContractResult(
        pipeline=spec.pipeline,
        snapshot=snapshot.digest,
        previous=previous.digest if previous else None,
        watermark_us=snapshot.watermark_us,
        timed=spec.timed,
        arrived=tuple(_arrived(name, tables[name], snapshot, previous) for name in spec.sources),
        checks=tuple(_judged(spec, home, tables, snapshot, previous)),
        aside=tuple(_aside(spec, home, snapshot)),
    )
    result = replace(result, seconds=time.monotonic() - started)
    if result.accepted:
        if folder is not None:
            write_json(folder / "contract.json", as_json(result))
        return result
    page = home.root / "quarantine" / spec.pipeline / f"{snapshot.digest[:16]}.html"
    result = replace(result, report=home.relative(page))
    write_atomic(page, render(result))
    if result.failures:
        raise Refused(result.message(), report=result.report)
    raise MillraceError(result.message())


def _arrived(name: str, table: pa.Table, snapshot: Snapshot, previous: Snapshot | None) -> Arrived:
    before = previous.rows.get(name) if previous else None
    return Arrived(name, table.num_rows, before, snapshot.duplicates.get(name, 0))


def _aside(spec: Spec, home: Home, snapshot: Snapshot) -> Iterator[Aside]:
    """What the snapshot set aside, with rows from the quarantine while they are there."""
    listed = read_json(home.root / snapshot.path).get("set_aside", {})
    for name in [n for n in spec.sources if n in listed]:
        rows, file = listed[name]["rows"], quarantined(home, spec.pipeline, snapshot.digest, name)
        reasons = tuple((rule, columns, count) for rule, columns, count in listed[name]["reasons"])
        aside = Aside(name, rows, rows + snapshot.rows[name], home.relative(file), reasons)
        if file.exists():
            table = pq.read_table(file).slice(0, SAMPLES)
            broken = [c for _, columns, _ in reasons for c in columns.split(", ") if c in table.column_names]
            columns = [*dict.fromkeys(["_reasons", *spec.sources[name].key, *broken, "_file", "_row"])]
            shown = [tuple(_show(row[c]) for c in columns) for row in _times_as_text(table.select(columns)).to_pylist()]
            aside = replace(aside, sample_columns=tuple(c.removeprefix("_") for c in columns), sample_rows=tuple(shown))
        yield aside


def _share_checks(spec: Spec, tables: dict[str, pa.Table], snapshot: Snapshot) -> Iterator[Check]:
    """Of sources that may set rows aside: no more than they may."""
    if not any(source.quarantine for source in spec.sources.values()):
        return
    bad = {} if snapshot.set_aside else bad_rows(spec, tables)  # a snapshot that set rows aside has no bad ones left
    for name, source in spec.sources.items():
        if not source.quarantine:
            continue
        rows = snapshot.set_aside.get(name, 0) if snapshot.set_aside else int(bad[name].mask.sum())
        of = tables[name].num_rows + snapshot.set_aside.get(name, 0)
        most = f"at most {percent(source.quarantine)} set aside"
        counts = ", ".join(f"{count:,} {rule} ({columns})" for (rule, columns), count in bad[name].counts.items()) if bad else ""
        found = f"{rows:,} of {of:,} rows ({percent(rows / of) if of else '0 %'}) {'bad' if bad else 'set aside'}"
        verdict: Any = "failed" if bad and bad[name].too_many else "passed"
        yield Check(name, "quarantine", (), f"{name} may have {most.replace('set aside', 'of its rows set aside')}", most,
                    found + (f": {counts}" if counts else ""), verdict, rows, of)  # fmt: skip


def _drift_checks(
    spec: Spec, home: Home, tables: dict[str, pa.Table], snapshot: Snapshot, previous: Snapshot | None
) -> Iterator[Check]:  # fmt: skip
    """Of sources with `drift`: what is new lies within what the days before let expect."""
    for name, source in spec.sources.items():
        if source.drift is None:
            continue
        found: list[Judged] = []
        if previous is not None and previous.digest != snapshot.digest:
            before = read_table(spec, home, previous, name)
            now, then = snapshot.watermark_us, previous.watermark_us
            found = list(judge_new(source, source.drift, tables[name], before, now=now, then=then))
        for judged in found:
            words, expected, value = words_of(name, judged)
            columns = (judged.column,) if judged.column else ()
            yield Check(name, "drift", columns, words, expected, value, "passed" if judged.within else "failed")
        if not found:
            why = f"not judged: nothing new, or fewer than {source.drift.days} past days"
            words = f"what is new in {name} must be as past days let expect"
            yield Check(name, "drift", (), words, "as past days", why, "passed")


def _judged(
    spec: Spec, home: Home, tables: dict[str, pa.Table], snapshot: Snapshot, previous: Snapshot | None
) -> Iterator[Check]:  # fmt: skip
    """Every check, table by table. Values are judged only where all types are right."""
    judge = _Judge()
    types = {}
    for name, source in spec.sources.items():
        listed = _types(tables[name], source)
        types[name] = judge.all([type_rule(name)], listed.to_pandas(), listed, ("column",))[0]
    sound = {name for name, check in types.items() if check.verdict == "passed"}
    for name, source in spec.sources.items():
        yield types[name]
        if name not in sound:
            continue
        before = _before(name, snapshot, previous)
        rules = [r for r in value_rules(name, source, spec.timed, before) if (r.to or name) in sound]
        frame = _Frame(tables, name)
        yield from judge.all(rules, frame.build(rules), tables[name], _key_columns(source, spec.timed))
    if len(sound) == len(tables):
        yield from _share_checks(spec, tables, snapshot)
        yield from _drift_checks(spec, home, tables, snapshot, previous)


def _before(name: str, snapshot: Snapshot, previous: Snapshot | None) -> int | None:
    """Rows that may be expected by those landed before: setting one aside is no loss."""
    if previous is None or name not in previous.rows:
        return None
    return max(0, previous.rows[name] + previous.set_aside.get(name, 0) - snapshot.set_aside.get(name, 0))


def type_rule(name: str) -> Rule:
    """That every declared column is there, with its type: one question over the list of columns."""
    return Rule(name, "type", ("declared", "found"), "every column must be there, with the type that the spec says",
                "the declared types", "missing or of another type", "ExpectColumnPairValuesToBeEqual",
                {"column_A": "found", "column_B": "declared"})  # fmt: skip


def value_rules(name: str, source: Source, timed: bool, rows_before: int | None) -> list[Rule]:
    """What the spec says of a table's values and rows."""
    rules = list(_row_rules(name, source, rows_before))
    rules += _key_rules(name, source, timed)
    for column, declared in source.columns.items():
        rules += _column_rules(name, column, declared, source.nulls(column))
    rules += _time_rules(name, source)
    for low, high in source.order:
        most = "not be after" if source.columns[low].type == "timestamp" else "be at most"
        rules.append(_pair_rule(name, "order", source, low, high, f"{low} must {most} {high}"))
    for reference in source.references:
        columns, share = reference.columns, reference.share
        found = f"found in {reference.to}"
        words = f"{_and(columns)} must be {found}"
        at_least = "all" if share == 1 else f"at least {percent(share)}"
        rules.append(
            Rule(name, "references", columns, words if share == 1 else f"{words} in {at_least} of the rows",
                 f"{at_least} {found}", f"not {found}", "ExpectColumnValuesToBeInSet",
                 {"column": f"~{reference.to} {' '.join(columns)}", "value_set": ["found"], "mostly": share},
                 reference.to)
        )  # fmt: skip
    return rules


def _row_rules(name: str, source: Source, before: int | None) -> Iterator[Rule]:
    ask = "ExpectTableRowCountToBeBetween"
    yield Rule(name, "rows_min", (), f"{name} must have at least {source.rows_min:,} row{_s(source.rows_min)}",
               f"at least {source.rows_min:,}", "", ask, {"min_value": source.rows_min})  # fmt: skip
    if before is not None:
        least = math.ceil(round(before * (1 - source.rows_shrink), 6))
        loss = f"lose more than {percent(source.rows_shrink)} of its rows" if source.rows_shrink else "lose rows"
        yield Rule(name, "rows_shrink", (), f"{name} must not {loss}",
                   f"at least {least:,} (the previous snapshot had {before:,})", "", ask,
                   {"min_value": least})  # fmt: skip


def _key_columns(source: Source, timed: bool) -> tuple[str, ...]:
    known = (source.known_at.column or KNOWN,) if source.known_at and timed else ()
    return (*source.key, *known)


def _key_rules(name: str, source: Source, timed: bool) -> Iterator[Rule]:
    columns = _key_columns(source, timed)
    labels = [_LABELS.get(c, c) for c in columns]
    text = ("key", columns, f"no two rows may have the same {_and(labels)}", "every row once",
            "share it with another row")  # fmt: skip
    if len(columns) == 1:
        yield Rule(name, *text, "ExpectColumnValuesToBeUnique", {"column": columns[0]})
    else:
        yield Rule(name, *text, "ExpectCompoundColumnsToBeUnique", {"column_list": list(columns)})
    for column in set(source.key) - set(source.columns):  # row_digest
        yield _null_rule(name, column, column, 0.0)


def _null_rule(name: str, column: str, read: str, nulls: float) -> Rule:
    label = _LABELS.get(column, column)
    words = f"{label} may be null in at most {percent(nulls)} of the rows" if nulls else f"{label} must not be null"
    return Rule(name, "nulls", (column,), words, f"at most {percent(nulls)} null" if nulls else "no nulls", "null",
                "ExpectColumnValuesToNotBeNull", {"column": read, "mostly": round(1 - nulls, 12)})  # fmt: skip


def _column_rules(name: str, column: str, declared: Column, nulls: float) -> Iterator[Rule]:
    number, text = declared.type == "float64", declared.type == "string"
    if nulls < 1:
        yield _null_rule(name, column, f"~kind {column}" if number else column, nulls)
    if number:
        yield Rule(name, "finite", (column,), f"{column} must hold finite numbers only", "neither NaN nor infinite",
                   "not finite", "ExpectColumnValuesToBeInSet",
                   {"column": f"~kind {column}", "value_set": ["number"]})  # fmt: skip
    if declared.min is not None or declared.max is not None:
        limits = _limits(declared.min, declared.max)
        yield Rule(name, "range", (column,), f"{column} must be {limits}", limits, "outside",
                   "ExpectColumnValuesToBeBetween",
                   {"column": column, "min_value": declared.min, "max_value": declared.max})  # fmt: skip
    read = column if text else f"~text {column}"
    if declared.values is not None:
        listed = f"one of {', '.join(declared.values)}"
        yield Rule(name, "values", (column,), f"{column} must be {listed}", listed, "something else",
                   "ExpectColumnValuesToBeInSet",
                   {"column": read, "value_set": list(declared.values)})  # fmt: skip
    if declared.pattern is not None:
        yield Rule(name, "pattern", (column,), f"{column} must match {declared.pattern}", declared.pattern, "different",
                   "ExpectColumnValuesToMatchRegex", {"column": read, "regex": declared.pattern})  # fmt: skip


def _time_rules(name: str, source: Source) -> Iterator[Rule]:
    """Known-at is there, and for an observation not before the event."""
    if source.known_at is None or source.event_time is None:
        return
    known = source.known_at.column or KNOWN
    if source.known_at.arrival:
        yield _null_rule(name, KNOWN, KNOWN, 0.0)
    if source.kind == "observation":
        late = f"{source.event_time} must not be after {_LABELS.get(known, known)}"
        words = f"nothing may be known before it happens: {late}"
        yield _pair_rule(name, "known_at", source, source.event_time, known, words, wrong="known too early")


def _pair_rule(
    name: str, rule: str, source: Source, low: str, high: str, words: str, *, wrong: str = "the other way round"
) -> Rule:
    side = {c: f"~plain {c}" if c in source.columns and source.columns[c].type == "string" else c for c in (low, high)}
    return Rule(
        name, rule, (low, high), words, f"{low} ≤ {_LABELS.get(high, high)}", wrong,
        "ExpectColumnPairValuesAToBeGreaterThanB",
        # Without ignore_row_if a null on either side counts as a violation.
        {"column_A": side[high], "column_B": side[low], "or_equal": True, "ignore_row_if": "either_value_is_missing"},
    )  # fmt: skip


def _types(table: pa.Table, source: Source) -> pa.Table:
    """A row for each declared column: its name, its declared type and the one that was found."""
    there = {field.name: str(field.type) for field in table.schema}
    found = [_NAMES.get(there[c], there[c]) if c in there else "missing" for c in source.columns]
    declared = [column.type for column in source.columns.values()]
    return pa.table({"column": list(source.columns), "declared": declared, "found": found})


class _Frame:
    """The columns that rules read, as pandas; text is categorical, which makes a rule three times as fast."""

    def __init__(self, tables: dict[str, pa.Table], name: str) -> None:
        self.tables, self.table = tables, tables[name]

    def build(self, rules: list[Rule]) -> pd.DataFrame:
        read: dict[str, Rule] = {}
        for rule in rules:
            for field in ("column", "column_A", "column_B"):
                if field in rule.kwargs:
                    read.setdefault(rule.kwargs[field], rule)
            read.update(dict.fromkeys(rule.kwargs.get("column_list", ()), rule))
        return pd.DataFrame({c: self.column(c, rule) for c, rule in read.items()}, index=range(self.table.num_rows))

    def column(self, name: str, rule: Rule) -> pd.Series:
        if rule.to:
            return self.found(rule)
        if name.startswith("~kind "):
            return _kinds(self.array(name.removeprefix("~kind ")))
        if name.startswith("~text "):
            return _series(self.array(name.removeprefix("~text ")).cast(pa.string()))
        if name.startswith("~plain "):
            return self.array(name.removeprefix("~plain ")).to_pandas()
        return _series(self.array(name))

    def array(self, name: str) -> pa.Array:
        column = self.table[name].combine_chunks()
        return column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)

    def found(self, rule: Rule) -> pd.Series:
        """Whether the referred table holds the values; null where one of them is null."""
        target = self.tables[rule.to]
        keys = text_keys([self.table[c] for c in rule.columns], self.table.num_rows)
        known = text_keys([target[c] for c in rule.columns], target.num_rows)
        found = pc.is_in(keys, value_set=known).to_numpy(zero_copy_only=False)
        null = keys.is_null().to_numpy(zero_copy_only=False)
        return _category(np.where(null, -1, np.where(found, 0, 1)), ["found", "not found"])


def _series(array: pa.Array) -> pd.Series:
    if pa.types.is_string(array.type):
        return array.dictionary_encode().to_pandas()
    if pa.types.is_floating(array.type):  # NaN and infinity have a rule of their own
        array = pc.if_else(pc.is_finite(array), array, pa.scalar(None, array.type))
    return array.to_pandas()


def _kinds(array: pa.Array) -> pd.Series:
    """What each number is. Seen on Arrow: pandas takes NaN for null, and infinity passes an open range."""
    nan = pc.is_nan(array).fill_null(False).to_numpy(zero_copy_only=False)
    infinite = pc.is_inf(array).fill_null(False).to_numpy(zero_copy_only=False)
    null = array.is_null().to_numpy(zero_copy_only=False)
    return _category(np.select([null, nan, infinite], [-1, 1, 2], 0), ["number", "NaN", "infinite"])


def _category(codes: np.ndarray, names: list[str]) -> pd.Series:
    return pd.Series(pd.Categorical.from_codes(codes.astype(np.int8), pd.Index(names)))


class _Judge:
    """Great Expectations over one pandas frame at a time."""

    def __init__(self) -> None:
        os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

        logging.getLogger("great_expectations").setLevel(logging.ERROR)
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        asset = context.data_sources.add_pandas("tables").add_dataframe_asset("table")
        self.definition = asset.add_batch_definition_whole_dataframe("whole")

    def all(self, rules: list[Rule], frame: pd.DataFrame, table: pa.Table, key: tuple[str, ...]) -> list[Check]:
        """The rules' checks, in their order. `table` and `key` give the sample rows."""
        numbers = range(len(rules))
        checks = self.ask(rules, numbers, "BASIC", frame, table, key)
        failed = [number for number in numbers if checks[number].verdict == "failed"]
        if failed:  # positions of bad rows cost a third more, so only these are asked for them
            checks |= self.ask(rules, failed, "SUMMARY", frame, table, key)
        return [checks[number] for number in numbers]

    def ask(
        self, rules: list[Rule], numbers: Sequence[int], form: str, frame: pd.DataFrame, table: pa.Table,
        key: tuple[str, ...],
    ) -> dict[int, Check]:  # fmt: skip
        import great_expectations as gx

        asked, checks = [], {}
        for number in numbers:
            try:
                asked.append(_expectation(_quick(rules[number], frame, name_values=form == "SUMMARY"), number))
            except Exception as error:  # a rule that cannot even be said
                checks[number] = _broken(rules[number], str(error))
        batch = self.definition.get_batch(batch_parameters={"dataframe": frame})
        results = batch.validate(
            gx.ExpectationSuite("contract", expectations=asked),
            result_format={"result_format": form, "partial_unexpected_count": PEEK},
        )
        for result in results.results:  # those that broke come first, so order says nothing
            assert result.expectation_config and result.expectation_config.meta
            number = result.expectation_config.meta["number"]
            rule, fault = rules[number], _fault(result.exception_info)
            checks[number] = _broken(rule, fault) if fault else _check(rule, result, frame, table, key)
        return checks


def _expectation(rule: Rule, number: int) -> Any:
    import great_expectations.expectations as gxe

    return getattr(gxe, rule.gx)(**rule.kwargs, meta={"number": number})


def _quick(rule: Rule, frame: pd.DataFrame, *, name_values: bool) -> Rule:
    """A pattern over few distinct values, asked of each of them once; as the set of those that match it where values are named.

    Great Expectations copies what an expectation holds some hundred times, so a set of thousands costs more than the question.
    """
    column = rule.kwargs["column"] if rule.name == "pattern" else None
    if column is None or not isinstance(frame[column].dtype, pd.CategoricalDtype) or len(frame[column].cat.categories) > 20_000:
        return rule
    values = frame[column].cat.categories
    try:
        match = np.array([re.search(rule.kwargs["regex"], value) is not None for value in values], bool)
    except re.error:
        return rule  # Great Expectations says what is wrong with it
    ask = {"column": column, "value_set": values[match].tolist()}
    if not name_values:
        ask = {"column": f"~match {column}", "value_set": ["matches"]}
        codes = frame[column].cat.codes.to_numpy()
        frame[ask["column"]] = _category(np.where(codes < 0, -1, np.append(~match, False)[codes]), ["matches", "differs"])
    return replace(rule, gx="ExpectColumnValuesToBeInSet", kwargs=ask)


def _fault(info: dict[str, Any]) -> str:
    """Why an expectation could not be evaluated; empty when it was. Keyed by metric when it was not."""
    for part in (info, *info.values()):
        if isinstance(part, dict) and part.get("raised_exception"):
            return str(part.get("exception_message") or "exception").strip()
    return ""


def _broken(rule: Rule, fault: str) -> Check:
    found = f"the check could not run ({' '.join(fault.split())[:200]})"
    return Check(rule.table, rule.name, rule.columns, rule.words, rule.expected, found, "broken")


def _check(rule: Rule, result: Any, frame: pd.DataFrame, table: pa.Table, key: tuple[str, ...]) -> Check:
    verdict: Any = "passed" if bool(result.success) else "failed"
    labels = tuple(_LABELS.get(c, c) for c in rule.columns)
    check = Check(rule.table, rule.name, labels, rule.words, rule.expected, "", verdict)
    facts = result.result
    if "observed_value" in facts:
        return replace(check, found=_row_found(int(facts["observed_value"])))
    count, of = int(facts["unexpected_count"]), int(facts["element_count"]) - int(facts.get("missing_count") or 0)
    check = replace(check, count=count, of=of, found=_found(rule, count, of, frame, facts))
    if verdict == "passed":
        return check
    before = [c for c in key if c not in rule.columns or c != key[-1]]  # known-at stands beside what it is held to
    columns = tuple(dict.fromkeys((*before, *rule.columns)))
    at = [int(position) for position in facts.get("partial_unexpected_index_list", ())[:SAMPLES]]
    rows = _times_as_text(table.select(columns).take(pa.array(at, pa.int64()))).to_pylist()
    return replace(
        check,
        sample_columns=tuple(_LABELS.get(c, c) for c in columns),
        sample_rows=tuple(tuple(_show(row[c]) for c in columns) for row in rows),
    )


def _row_found(rows: int) -> str:
    return f"{rows:,} row{_s(rows)}"


def _found(rule: Rule, count: int, of: int, frame: pd.DataFrame, facts: dict[str, Any]) -> str:
    """What was there, in words."""
    if of == 0:
        return "nothing to check"
    unit = "column" if rule.name == "type" else "row" if len(rule.columns) > 1 else "value"
    if count in (0, of):
        text = f"all {of:,} {unit}s" if of > 1 else f"the only {unit}"
        text += f" {rule.wrong}" if count else ""
    else:
        text = f"{count:,} of {of:,} {unit}s ({percent(count / of)}) {rule.wrong}"
    if rule.name == "range":
        values = frame[rule.kwargs["column"]]
        return f"{text}, from {_number(values.min())} to {_number(values.max())}"
    if rule.name == "finite" and count:
        kinds = frame[rule.kwargs["column"]].value_counts()
        return f"{text}: " + ", ".join(f"{kinds[kind]:,} {kind}" for kind in ("NaN", "infinite") if kinds[kind])
    if rule.name in ("values", "pattern") and count:
        some = list(dict.fromkeys(_show(value) for value in facts["partial_unexpected_list"]))
        return f"{text}: {', '.join(some[:3])}{', …' if len(some) > 3 else ''}"
    return text


def _times_as_text(table: pa.Table) -> pa.Table:
    for number, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            texts = [None if us is None else iso(us) for us in table[field.name].cast(pa.int64()).to_pylist()]
            table = table.set_column(number, field.name, pa.array(texts, pa.string()))
    return table


def _show(value: Any) -> str:
    """A value as a person reads it in a table; text that would hide or fool is quoted."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:.15g}" if math.isfinite(value) else f"{value:+}inity"
    if isinstance(value, str):
        plain = value.isprintable() and value == value.strip() and value not in ("", "null")
        short = value if len(value) <= 60 else value[:59] + "…"
        return short if plain else repr(short)
    return str(value)


def _number(value: float) -> str:
    if pd.isna(value):
        return "nothing"
    if not float(value).is_integer() or abs(value) >= 1e15:
        return f"{float(value):,.6g}"
    return f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))  # 2014 is a year


def _limits(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"at most {_number(high)}" if high is not None else f"at least {_number(low or 0)}"
    return f"between {_number(low)} and {_number(high)}"


def _and(names: tuple[str, ...] | list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
