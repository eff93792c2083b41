"""Names of countries, regions, languages, scripts and currencies in many languages, as the package pycountry ships them."""

import gettext
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UsageError

ROMANCE = ("ca", "es", "fr", "gl", "it", "pt", "ro", "sc")
OTHERS = ("br", "cs", "da", "de", "eo", "et", "eu", "fi", "ga", "hr", "hu", "id", "is", "lt", "lv", "nl", "pl", "sk", "sl",
          "sr@latin", "sv", "tr", "vi")  # fmt: skip
KINDS = {"iso3166-1": "country", "iso3166-2": "region", "iso4217": "currency", "iso639-3": "language", "iso15924": "script"}


@dataclass(frozen=True)
class Written:
    """Rows by table, files that were added, and what was wrong: nothing."""

    rows: dict[str, int]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def write_sample(landing: Path, *, until_us: int | None = None, daily: bool = False) -> Written:
    """One file of names, each once: `name`, `kind` and whether it stands in a Romance language. It has no times."""
    rows = sorted(dict(sorted(_names())).items())  # a name that stands in several is Romance if one of them is
    path = landing / "names" / "names.parquet"
    if path.exists():
        return Written({"names": len(rows)}, ())
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    columns = {"name": [name for (name, _), _ in rows], "kind": [kind for (_, kind), _ in rows],
               "romance": [romance for _, romance in rows]}  # fmt: skip
    pq.write_table(pa.table(columns), scratch)
    scratch.replace(path)
    return Written({"names": len(rows)}, (f"names/{path.name}",))


def _names() -> Iterator[tuple[tuple[str, str], bool]]:
    try:
        files = metadata.files("pycountry") or []
    except metadata.PackageNotFoundError:
        raise UsageError("the sample needs the package pycountry: type `pip install pycountry`") from None
    for file in files:
        if file.suffix == ".mo" and file.stem in KINDS and (language := file.parts[-3]) in (*ROMANCE, *OTHERS):
            with Path(str(file.locate())).open("rb") as opened:
                translated = vars(gettext.GNUTranslations(opened))["_catalog"]
            for english, name in translated.items():
                if isinstance(english, str) and english and name != english:
                    yield (name, KINDS[file.stem]), language in ROMANCE
