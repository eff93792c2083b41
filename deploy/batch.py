"""`python -m deploy.batch`, run inside a bento: parts of files scored as its endpoint answers. B rows.

The first line of stdin is the job, each later one a part of it; each part is answered by one line. One process works on one
part at a time with one thread, and holds `batch_rows` rows of it. It ends when stdin does, at once.
"""

from pathlib import Path

import deploy.imports

SRC = Path(__file__).resolve().parents[1]
deploy.imports.install(SRC)

import json  # noqa: E402
import os  # noqa: E402
import queue  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from deploy.loaded import Loaded, outside_horizon  # noqa: E402
from deploy.tables import (  # noqa: E402
    Counts,
    Job,
    Part,
    check_range,
    check_text,
    fields_of,
    in_path,
    open_source,
    values_of,
)
from features.online import OnlineStore, Served, serve_features  # noqa: E402
from features.preprocess import Batch  # noqa: E402
from pipelines.clock import iso  # noqa: E402
from pipelines.errors import MillraceError  # noqa: E402

WRITTEN = 131_072  # rows of a row group of what is written
LOOKED_UP = 2_000  # keys at once
BUFFER = 1 << 18  # bytes read at once of each column of a row group
TEXTS = pa.list_(pa.string())


class Scorer:
    """A release's bundle, and the served store where rows are named by their keys."""

    def __init__(self, bundle: Path, job: Job) -> None:
        self.job, self.loaded = job, Loaded.of(bundle)
        self.fields = fields_of(self.loaded.spec, job.way)
        self.store = OnlineStore(self.loaded.spec, Path(job.store)) if job.way == "keys" else None
        self.source = open_source(job.source)

    def score(self, part: Part) -> Counts:
        """Writes the scores of a part beside, and renames them when they are whole. Raises MillraceError."""
        target = Path(self.job.output) / part.name
        scratch = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            counts = _write(self._scored(part), scratch, part)
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            scratch.replace(target)
        except OSError as error:
            raise MillraceError(
                f"{target}: cannot be written ({error.strerror or error}); free space or rights there, and type the command "
                "again: finished parts stay"
            ) from None
        finally:
            scratch.unlink(missing_ok=True)
        return counts

    def _scored(self, part: Part) -> Iterator[tuple[pa.Table, Counts]]:
        """The rows that are written for a part, batch by batch."""
        where, said = f"{self.job.source}/{part.file}", in_path(part.file)
        for first, batch in self._batches(part, where):
            columns = {n: values_of(where, batch, said, f, first) for n, f in self.fields.items()
                       if n in batch.schema.names or n in said}  # fmt: skip
            kept = {n: c for n, c in zip(batch.schema.names, batch.columns, strict=True)
                    if n not in self.fields or self.job.way == "keys" or n in self.loaded.spec.row_key}  # fmt: skip
            if self.store is None:
                inputs = self.loaded.preprocess.transform_arrow(columns)
                check_range(where, dict(zip(self.loaded.preprocess.numbers, inputs.numbers.T, strict=True)), first)
                made, counts = self._answers(inputs), Counts(len(batch))
            else:
                made, counts = self._looked_up(where, columns, first, len(batch))
            yield pa.table({**kept, **made}), counts

    def _batches(self, part: Part, where: str) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches with the number of their first row. Raises MillraceError where the file breaks off."""
        at, (system, folder) = part.first, self.source
        try:
            with system.open_input_file(f"{folder}/{part.file}") as raw, _open(raw) as file:
                groups = range(part.begin, part.end)
                for batch in file.iter_batches(self.job.batch_rows, groups, use_threads=False):
                    yield at, batch
                    at += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise MillraceError(
                f"{where}: rows from {at:,} on (row groups {part.begin} to {part.end - 1}) cannot be read: {error}; put a whole "
                "copy there, and type the command again"
            ) from None

    def _answers(self, inputs: Batch) -> dict[str, pa.Array]:
        scores = self.loaded.model.predict(inputs)
        release = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(scores), np.int32)), [self.loaded.release])
        return {"probability": pa.array(scores), "decision": pa.array(scores >= self.loaded.spec.serve.threshold),
                "release": release.cast(pa.string())}  # fmt: skip

    def _looked_up(
        self, where: str, columns: Mapping[str, pa.Array], first: int, rows: int
    ) -> tuple[dict[str, pa.Array], Counts]:  # fmt: skip
        for name, column in columns.items():
            if self.fields[name].type in ("string", "text"):
                check_text(where, column, self.fields[name], first)
        numbers = {n: c.to_numpy(zero_copy_only=False) for n, c in columns.items() if self.fields[n].type == "float64"}
        check_range(where, numbers, first)
        asked = pa.table({n: c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c for n, c in columns.items()})
        parts = [self._asked(asked.slice(at, LOOKED_UP)) for at in range(0, rows, LOOKED_UP)]
        made = {name: pa.concat_arrays([part[name] for part in parts]) for name in parts[0]}
        refused, unknown = rows - made["refused"].null_count, pc.sum(made["unknown_entity"]).as_py()
        return made, Counts(rows, refused, unknown)

    def _asked(self, table: pa.Table) -> dict[str, pa.Array]:
        """Answers to rows named by their keys, at the job's instant. What `/predict` refuses is null, and says why."""
        assert self.store is not None
        loaded, now, store = self.loaded, self.job.now_us, self.store
        rows = [{n: None if v != v else v for n, v in row.items()} for row in table.to_pylist()]
        served = serve_features(store, rows, now)
        inputs = loaded.preprocess.transform(served.frame)
        refused = self._refused(rows, served)
        made, there = self._answers(inputs), refused.is_null()
        missing, unseen = loaded.preprocess.unknown(served.frame, inputs)
        return {
            "probability": pc.if_else(there, made["probability"], None), "decision": pc.if_else(there, made["decision"], None),
            "release": made["release"],
            "missing": pa.array(missing, TEXTS), "unseen": pa.array(unseen, TEXTS),
            "stale": pa.array([served.stale(i, loaded.spec.serve.stale_after) for i in range(len(rows))], TEXTS),
            "unknown_entity": pa.array(served.looked.unknown),
            "outside_horizon": pa.array(outside_horizon(loaded.spec, served.looked.own, now), pa.bool_()),
            "refused": refused,
        }  # fmt: skip

    def _refused(self, rows: Sequence[Mapping[str, Any]], served: Served) -> pa.Array:
        """Why `/predict` would refuse each row, or null: it is closed, or a field is not what is stored."""
        looked, found = served.looked, np.full(len(rows), None, object)
        for name, field in self.fields.items():
            if field.required or name not in rows[0]:
                continue
            given = [row[name] for row in rows]
            there = ~looked.unknown & np.array([v is not None for v in given])
            stored = looked.own[name]
            for i in np.flatnonzero(there & (stored != np.array(given, object))).tolist():
                if not (field.type == "float64" and float(stored[i]) == float(given[i])):
                    found[i] = found[i] or f"{name} is not what is stored"
        for i in np.flatnonzero(looked.closed_at <= served.now).tolist():
            found[i] = f"already_closed at {iso(int(looked.closed_at[i]))}"
        return pa.array(found, pa.string())


def _open(raw: pa.NativeFile) -> pq.ParquetFile:
    """Reads row groups piece by piece, whatever their size, and their checksums where there are some."""
    return pq.ParquetFile(raw, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True)


def _write(scored: Iterator[tuple[pa.Table, Counts]], path: Path, part: Part) -> Counts:
    """Writes what comes, in row groups of WRITTEN rows, and what it was made of."""
    writer: pq.ParquetWriter | None = None
    counts, held = Counts(), []
    try:
        for table, more in scored:
            if writer is None:
                words = [f.name for f in table.schema if not pa.types.is_floating(f.type)]
                writer = pq.ParquetWriter(path, table.schema.remove_metadata(), use_dictionary=words)
            held.append(table)
            counts += more
            if sum(t.num_rows for t in held) >= WRITTEN:
                writer.write_table(pa.concat_tables(held))
                held = []
        if counts.rows != part.rows or writer is None:
            raise MillraceError(f"{part.file}: {counts.rows:,} rows were read of row groups that say they have {part.rows:,}; "
                                "replace the file by a whole copy")  # fmt: skip
        if held:
            writer.write_table(pa.concat_tables(held))
        writer.add_key_value_metadata({"millrace.made_of": part.made_of, "millrace.counts": json.dumps(asdict(counts))})
    finally:
        if writer is not None:
            writer.close()
    return counts


def _lines() -> Iterator[str]:
    """Lines of stdin. When it ends, so does the process: who asked is gone, or needs no more."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def main() -> None:
    """Answers each part by its counts, or by an error."""
    pa.set_cpu_count(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    lines = _lines()
    scorer = None
    for line in lines:
        try:
            if scorer is None:
                scorer = Scorer(SRC / "bundle", Job(**json.loads(line)))
                answer: dict[str, Any] = deploy.imports.proof(SRC)
            else:
                answer = asdict(scorer.score(Part(**json.loads(line))))
        except MillraceError as error:
            answer = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
