"""Lands a pipeline's sample data: by the spec's own writer, or from a table that an installed package ships."""

import csv
import gzip
import importlib
import io
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipelines.arrow import owned
from pipelines.clock import parse_time
from pipelines.errors import UsageError
from pipelines.home import Home
from pipelines.manifest import write_json
from pipelines.spec import Sample, Spec


@dataclass(frozen=True)
class Landed:
    """Rows per table after the call, files that it added, and what was wrong in the data."""

    rows: dict[str, int]
    files: int
    notes: tuple[str, ...]


def land(spec: Spec, home: Home, *, until: str | None = None, daily: bool = False) -> Landed:
    """Writes the sample to the landing folder, which is append-only: what is there stays."""
    if spec.sample is None:
        raise UsageError(f"{spec.pipeline} has no sample: put Parquet files under {home.landing(spec.pipeline)}")
    landing = home.landing(spec.pipeline)
    if spec.sample.call:
        module, _, name = spec.sample.call.partition(":")
        writer = getattr(importlib.import_module(module), name)
        report = writer(landing, until_us=parse_time(until) if until else None, daily=daily)
        landed = Landed(dict(report.rows), len(report.files), tuple(report.notes))
    else:
        landed = _from_package(spec.sample, landing)
    write_json(landing.parent / f"{spec.pipeline}.notes.json", {"notes": list(landed.notes)})
    return landed


def _from_package(wanted: Sample, landing: Path) -> Landed:
    assert wanted.package and wanted.file and wanted.source
    path = _package_file(wanted.package, wanted.file)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    names = list(wanted.column_names or ())
    if not names:
        names = next(csv.reader(io.StringIO(data.decode().split("\n")[wanted.skip_rows])))
    skip = wanted.skip_rows + (0 if wanted.column_names else 1)
    options = pa_csv.ReadOptions(column_names=names, skip_rows=skip)
    table = pa_csv.read_csv(owned(data), options)
    target = landing / wanted.source / f"{Path(wanted.file).name.partition('.')[0]}.parquet"
    rows = {wanted.source: table.num_rows}
    if target.exists():
        return Landed(rows, 0, ())
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}")
    pq.write_table(table, scratch)
    scratch.replace(target)
    return Landed(rows, 1, ())


def _package_file(package: str, file: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise UsageError(f"sample.package {package!r} is not installed: type `pip install {package}`") from None
    found = next((f for f in files if f.as_posix() == file), None)
    if found is None:
        raise UsageError(f"sample.file {file!r} is not shipped by {package}")
    return Path(str(found.locate()))
