"""What tells of an entity in text: pages, JSON, messages and logs, as Millrace and Python write them.

A single text is known by itself, wherever it stands as a word. A number, a truth or a time is not ("3" is everywhere), nor is
a text where other columns have to hold too: these are known beside the names of their columns, in one record
(`flight=7`, `"flight": 7`), and in tables of sample rows. Figures such as counts and extremes tell of no one, and stay.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from html import escape, unescape
from typing import Any

from features.erased import Entity, spellings

GONE = "erased"
QUOTE = r"""(?:\\?["']|&quot;|&#3[49];|`)?"""
RECORDS = re.compile(r"""([{}|]|\n(?!\s*["\]]))""")  # an object, a row of a table, a line; JSON has a line for each field


@dataclass(frozen=True)
class Redactor:
    """Takes an entity out of texts."""

    entity: Entity

    @cached_property
    def forms(self) -> dict[str, tuple[str, ...]]:
        """By column the ways in which its value may be written."""
        return {name: _forms(text) for name, text in self.entity.texts}

    @cached_property
    def word(self) -> re.Pattern[str]:
        return re.compile(rf"(?<![A-Za-z0-9])(?:{_any(self.forms[self.entity.columns[0]])})(?![A-Za-z0-9])")

    @cached_property
    def named(self) -> list[re.Pattern[str]]:
        """Each column with its value beside it."""
        return [
            re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?P<sign>{QUOTE}\s*[:=]\s*)(?P<open>{QUOTE})"
                       rf"(?P<value>{_any(forms)})(?![A-Za-z0-9]|[.:]\d)")
            for name, forms in self.forms.items()
        ]  # fmt: skip

    def clean(self, text: str) -> str:
        """The text without what tells of the entity; JSON stays JSON."""
        if not all(any(form in text for form in forms) for forms in self.forms.values()):
            return text
        if self.entity.words:
            return self.word.sub(GONE, text)
        text = _TABLE.sub(self._table, text)
        if '"sample_rows"' in text and (body := _json_object(text)) is not None and self._samples(body):
            text = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        records = RECORDS.split(text)
        for i, record in enumerate(records):
            if all(pattern.search(record) for pattern in self.named):
                for pattern in self.named:
                    records[i] = pattern.sub(_masked, records[i])
        return "".join(records)

    def _is(self, row: dict[str, Any]) -> bool:
        return all(str(row.get(name)) in forms for name, forms in self.forms.items())

    def _table(self, table: re.Match[str]) -> str:
        """An HTML table without its rows that hold the values below the names of their columns."""
        head = _cells(table[0], "th")
        return _ROW.sub(lambda row: "" if self._is(dict(zip(head, _cells(row[0], "td"), strict=False))) else row[0], table[0])

    def _samples(self, body: Any) -> int:
        """Drops sample rows of a contract's result (JSON); how many."""
        if not isinstance(body, dict | list):
            return 0
        gone = sum(self._samples(item) for item in (body.values() if isinstance(body, dict) else body))
        if isinstance(body, dict) and "sample_rows" in body:
            rows = [row for row in body["sample_rows"] if not self._is(dict(zip(body["sample_columns"], row, strict=True)))]
            gone += len(body["sample_rows"]) - len(rows)
            body["sample_rows"] = rows
        return gone


_TABLE, _ROW = re.compile(r"<table.*?</table>", re.DOTALL), re.compile(r"\s*<tr[^>]*>(?:(?!</tr>).)*</tr>", re.DOTALL)


def _cells(row: str, tag: str) -> list[str]:
    return [unescape(cell).strip() for cell in re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", row, re.DOTALL)]


def _forms(text: str) -> tuple[str, ...]:
    """A value as it is, and as JSON, HTML and `repr` write it."""
    found = [form for plain in spellings(text) for form in (
        plain, json.dumps(plain)[1:-1], json.dumps(plain, ensure_ascii=False)[1:-1], repr(plain)[1:-1],
        escape(plain), escape(plain, quote=False).replace("'", "&#39;").replace('"', "&#34;"), plain.replace("|", "\\|"),
    )]  # fmt: skip
    return tuple(sorted(dict.fromkeys(found), key=len, reverse=True))


def _any(forms: tuple[str, ...]) -> str:
    return "|".join(re.escape(form) for form in forms)


def _masked(match: re.Match[str]) -> str:
    bare = match["open"] == "" and re.match(r'(\\?"|&quot;|&#34;)\s*:', match["sign"])  # a number in JSON
    return match[0][: match.start("value") - match.start()] + ("null" if bare else GONE)


def _json_object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
