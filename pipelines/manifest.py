"""Digests, atomic files, pinned inputs and stage outputs: what makes a run repeatable."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipelines.errors import Busy, MillraceError

FORMAT_VERSION = 1
ROOT = Path(__file__).resolve().parents[1]
_LAYERS = ("pipelines", "features", "models", "deploy", "tasks", "flows")


def canonical_json(value: Any) -> str:
    """JSON text that depends on the value alone: sorted keys, no spaces, exact floats."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def code_digest(layer: str) -> str:
    """SHA-256 over the sources that a stage of this layer may import (its own and all below)."""
    sources = hashlib.sha256()
    for name in _LAYERS[: _LAYERS.index(layer) + 1]:
        for path in sorted(p for p in (ROOT / name).rglob("*") if p.suffix in (".py", ".j2")):
            sources.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return sources.hexdigest()


@cache
def library_versions(*names: str) -> dict[str, str]:
    """Installed versions of the named distributions."""
    return {name: metadata.version(name) for name in names}


def write_atomic(path: Path, data: str | bytes, *, mode: int = 0o644) -> None:
    """The file holds `data` whole or is as it was: written beside, synced, renamed; `mode`: who may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """A file or folder is on the disk, whatever happens to the power. Raises OSError."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Atomic, readable JSON with `format_version`."""
    body = {"format_version": FORMAT_VERSION, **value}
    write_atomic(path, json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_page(path: Path, title: str, sections: Sequence[tuple[str, Sequence[tuple[str, ...]]]]) -> None:
    """A Markdown page of tables, for the Prefect UI; the first row of a wide table is its head."""
    lines = [f"# {title}"]
    for heading, rows in sections:
        lines += ["", f"## {heading}", ""]
        wide = bool(rows) and len(rows[0]) > 2
        head: tuple[str, ...] = rows[0] if wide else ("", "")
        body = rows[1:] if wide else rows
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in body]
    write_atomic(path, "\n".join(lines) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises MillraceError for another format version or a broken file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MillraceError(f"{path}: not found; run `millrace run PIPELINE` to make it again") from None
    except ValueError as error:  # UTF-8 or JSON
        raise MillraceError(f"{path}: not JSON ({error}); delete it and run again") from None
    if not isinstance(value, dict):
        raise MillraceError(f"{path}: expected a JSON object, found {type(value).__name__}; delete it and run again")
    found = value.get("format_version")
    if found != FORMAT_VERSION:
        raise MillraceError(
            f"{path}: format_version {found}, this Millrace writes and reads {FORMAT_VERSION}; "
            "run `pip install -U millrace` if the home is newer, or point MILLRACE_HOME at another folder"
        )
    return value


@contextmanager
def lock(path: Path, *, what: str, wait: bool = False, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds an exclusive file lock. Where another process has it: raises Busy naming `what`, or tells so and waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                file.seek(0)
                raise Busy(
                    f"{what} is already running (process {file.read().strip() or 'unknown'}); "
                    "wait until it ends, or stop it, and type the command again"
                ) from None
            if tell is not None:
                tell(f"{what} goes on in another process: its end is waited for")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@dataclass(frozen=True)
class Artifact:
    """Reference to what a stage left: home-relative folder, the digest of its files, and a line about it.

    `ok` is false where the stage came to a no, such as a verdict.
    """

    stage: str
    path: str
    digest: str
    line: str = ""
    ok: bool = True


@dataclass(frozen=True)
class Note:
    """What a stage says of itself when it is done. It holds no time, so that it may be digested."""

    line: str
    ok: bool = True


def find_artifact(home: Path, stage: str, key: str) -> Artifact | None:
    """The complete output of a stage for this key, or None. A broken folder is removed."""
    folder = home / "artifacts" / stage / key
    done = folder / "done.json"
    if not folder.exists():
        return None
    if done.is_file():
        body = read_json(done)
        files = body["files"]
        if all((folder / f).is_file() and file_digest(folder / f) == d for f, d in files.items()):
            return _artifact(home, folder, body)
    shutil.rmtree(folder)
    return None


def _artifact(home: Path, folder: Path, done: dict[str, Any]) -> Artifact:
    path = folder.relative_to(home).as_posix()
    return Artifact(done["stage"], path, digest_of(done["files"]), done["line"], done["ok"])


def make_artifact(home: Path, stage: str, key: str, build: Callable[[Path], Note]) -> Artifact:
    """The output of a stage: found, or built in a scratch folder that takes its name when it is whole.

    Files under `volatile/` (times, logs) are kept, and lie outside its digest.
    """
    found = find_artifact(home, stage, key)
    if found is not None:
        return found
    folder = home / "artifacts" / stage / key
    scratch = folder.with_name(f".{key}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        note = build(scratch)
        kept = [p for p in sorted(scratch.rglob("*")) if p.is_file() and scratch / "volatile" not in p.parents]
        files = {p.relative_to(scratch).as_posix(): file_digest(p) for p in kept}
        done = {"stage": stage, "key": key, "files": files, "line": note.line, "ok": note.ok}
        write_json(scratch / "done.json", done)
        scratch.replace(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return _artifact(home, folder, done)
