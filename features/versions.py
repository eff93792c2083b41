"""Data versions: every snapshot that a run ended on is a directory that DVC tracks, and another home can check out.

The only file that imports dvc, and inside functions: the import costs half a second. `$MILLRACE_HOME/dvc/` is a DVC
repository without git: `PIPELINE/SNAPSHOT.dvc` names the files of a snapshot by their md5. Its cache shares the bytes of
`objects/` by hard links; its remote (`versions.remote` of the spec, else `dvc/remote/`) holds a copy.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import yaml

from features.ingest import landing_index, read_snapshot, values_digest, write_landing_index
from pipelines.errors import MillraceError
from pipelines.home import Home
from pipelines.manifest import ROOT, file_digest, lock, read_json, write_atomic, write_json

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class Version:
    """A snapshot as DVC knows it: md5 of its directory, bytes, files, and the remote that has it, or empty."""

    md5: str
    size: int
    files: int
    remote: str = ""


def remote_of(home: Home, remote: str) -> str:
    """The URL of a DVC remote; $NAMES in it are taken from the environment. Empty: the home's own."""
    return os.path.expandvars(remote) or str(home.dvc / "remote")


def version_of(home: Home, pipeline: str, snapshot: str) -> Version | None:
    """What is tracked under a snapshot's digest."""
    path = _dvc_file(home, pipeline, snapshot)
    if not path.exists():
        return None
    (out,) = yaml.safe_load(path.read_text(encoding="utf-8"))["outs"]
    pushed = path.with_suffix(".json")
    return Version(out["md5"], out["size"], out["nfiles"], read_json(pushed)["remote"] if pushed.exists() else "")


def start_tracking(home: Home, pipeline: str, snapshot: str, remote: str) -> None:
    """Has a snapshot tracked by a process beside this one, which nobody need wait for: `track` finishes what it leaves."""
    command = [sys.executable, "-m", "features.versions", pipeline, snapshot, remote]
    env = {**os.environ, "MILLRACE_HOME": str(home.root)}
    subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def track(home: Home, pipeline: str, snapshot: str, remote: str = "") -> Version:
    """Tracks a snapshot and pushes it; found when that is done. A remote that does not answer is tried again by the next.

    Raises MillraceError where DVC cannot write into the home.
    """
    url, path = remote_of(home, remote), _dvc_file(home, pipeline, snapshot)
    with lock(home.lock("dvc"), what="a version of data", wait=True):
        found = version_of(home, pipeline, snapshot)
        if found is not None and found.remote == url:
            return found
        with _repo(home, url) as repo:
            if found is None:
                folder = path.with_suffix("")
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    _lay_out(home, pipeline, snapshot, folder)
                    repo.add(str(folder))
                except BaseException:
                    path.unlink(missing_ok=True)  # half-written on a full disk
                    raise
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
            try:
                repo.push(targets=[str(path)])
            except Exception as error:  # whatever the remote's library raises
                logging.getLogger(__name__).warning("data version %s was not pushed to %s: %s", snapshot[:12], url, error)
            else:
                write_json(path.with_suffix(".json"), {"remote": url})
    version = version_of(home, pipeline, snapshot)
    assert version is not None
    return version


def _dvc_file(home: Home, pipeline: str, snapshot: str) -> Path:
    return home.dvc / pipeline / f"{snapshot}.dvc"


def _lay_out(home: Home, pipeline: str, snapshot: str, folder: Path) -> None:
    """`snapshot.json`, `objects/`, and `landing.json`: which landing file each object came from, and when it arrived."""
    body = home.snapshots(pipeline) / f"{snapshot}.json"
    shas = objects_of(read_json(body))
    (folder / "objects").mkdir(parents=True)
    for sha in shas:
        os.link(home.objects / f"{sha}.parquet", folder / "objects" / f"{sha}.parquet")
    shutil.copy(body, folder / "snapshot.json")
    index = landing_index(home, pipeline)
    landed = {name: {k: entry[k] for k in ("object", "arrival_us")} for name, entry in index.items() if entry["object"] in shas}
    write_json(folder / "landing.json", {"files": landed})


def objects_of(snapshot: dict[str, Any]) -> set[str]:
    """The objects that the body of a snapshot names."""
    return {sha for part in ("objects", "landed") for listed in snapshot.get(part, {}).values() for sha, _ in listed}


@dataclass(frozen=True)
class CheckedOut:
    """What a checkout brought: objects that were not there, and landing files."""

    snapshot: str
    objects: int
    landed: int


def check_out(home: Home, pipeline: str, snapshot: str, version: Version, remote: str = "") -> CheckedOut:
    """Brings a snapshot with its objects into a home; its landing files too, where nothing of the pipeline has landed.

    Raises MillraceError where the remote lacks it, or holds other values under its name.
    """
    url = remote or version.remote or remote_of(home, "")
    path = _dvc_file(home, pipeline, snapshot)
    folder = path.with_suffix("")
    with lock(home.lock("dvc"), what="a version of data", wait=True), _repo(home, url) as repo:
        new = not path.exists()
        if new:
            out = {"md5": version.md5, "size": version.size, "nfiles": version.files, "hash": "md5", "path": snapshot}
            write_atomic(path, yaml.safe_dump({"outs": [out]}, sort_keys=False))
        try:
            repo.pull(targets=[str(path)], force=True)
            brought = _take_in(home, folder)
            landed = _land(home, pipeline, folder)
            write_atomic(home.snapshots(pipeline) / f"{snapshot}.json", (folder / "snapshot.json").read_bytes())
            write_json(path.with_suffix(".json"), {"remote": url})
        except Exception as error:
            if new:
                path.unlink(missing_ok=True)
            if isinstance(error, MillraceError):
                raise
            raise MillraceError(
                f"snapshot {snapshot[:12]} of {pipeline} ({version.md5}) cannot be had from {url}: {str(error).splitlines()[0]}; "
                "give the remote that the run was pushed to (--remote)"
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return CheckedOut(read_snapshot(home, pipeline, snapshot).digest, brought, landed)


def _take_in(home: Home, folder: Path) -> int:
    """Objects that the home lacks, each held against the digest of its values that is its name."""
    home.objects.mkdir(parents=True, exist_ok=True)
    new = [path for path in sorted((folder / "objects").glob("*.parquet")) if not (home.objects / path.name).exists()]
    for path in new:
        if values_digest(pq.ParquetFile(path).read().replace_schema_metadata(None)) != path.stem:
            raise MillraceError(f"object {path.stem[:12]} holds other values than its name says: the remote was changed")
    for path in new:
        scratch = home.objects / f".{path.name}.{os.getpid()}"
        os.link(path, scratch)
        scratch.replace(home.objects / path.name)
    return len(new)


def _land(home: Home, pipeline: str, folder: Path) -> int:
    """Writes objects as the landing files that they came from, with their arrival."""
    root = home.landing(pipeline)
    if landing_index(home, pipeline) or (root.exists() and any(p.is_file() for p in root.rglob("*"))):
        return 0
    files = {}
    for landed, entry in read_json(folder / "landing.json")["files"].items():
        name = landed if landed.endswith(".parquet") else f"{landed}.parquet"  # what an object is written as
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "objects" / f"{entry['object']}.parquet", root / name)
        stat = (root / name).stat()
        sha = file_digest(root / name)
        files[name] = {**entry, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha, "columns": ""}
    write_landing_index(home, pipeline, files)
    return len(files)


def forget(home: Home, pipeline: str, snapshots: set[str]) -> None:
    """Stops tracking snapshots; `drop_unused` then removes their bytes."""
    for snapshot in snapshots:
        for suffix in (".dvc", ".json"):
            _dvc_file(home, pipeline, snapshot).with_suffix(suffix).unlink(missing_ok=True)


def drop(home: Home, md5s: set[str], remote: str) -> None:
    """Removes files by their md5 from the cache and from a remote."""
    with lock(home.lock("dvc"), what="a version of data", wait=True), _repo(home, remote) as repo:
        for store in (repo.cache.local, repo.cloud.get_remote_odb("store")):
            for md5 in md5s:
                if store.exists(md5):
                    store.delete(md5)


def drop_half_made(home: Home, pipeline: str) -> None:
    """Waits for who tracks a snapshot now, and removes what one that was killed has laid out."""
    with lock(home.lock("dvc"), what="a version of data", wait=True):
        for folder in [p for p in (home.dvc / pipeline).glob("*") if p.is_dir()]:
            shutil.rmtree(folder)


def files_of(home: Home, pipeline: str, snapshot: str) -> dict[str, str]:
    """The md5 of every file of a tracked snapshot, its directory's under an empty name."""
    version = version_of(home, pipeline, snapshot)
    listing = home.dvc / ".dvc/cache/files/md5" / (version.md5[:2] if version else "") / (version.md5[2:] if version else "")
    if version is None or not listing.is_file():
        return {}
    return {"": version.md5} | {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_text())}


@contextmanager
def _repo(home: Home, url: str) -> Iterator["Repo"]:
    """The home's DVC repository, made when missing, with its remote at `url`."""
    os.environ["DVC_NO_ANALYTICS"] = "1"
    from dvc.repo import Repo

    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    (home.dvc / ".dvc").mkdir(parents=True, exist_ok=True)
    config = {
        "core": {"analytics": False, "no_scm": True, "remote": "store", "site_cache_dir": str(home.dvc / ".dvc/site")},
        "cache": {"type": ["hardlink", "copy"]},
        "remote": {"store": {"url": url}},
    }
    with Repo(str(home.dvc), config=config) as repo:  # no file of it, which a full disk could leave half-written
        yield repo


if __name__ == "__main__":
    from pipelines.home import open_home

    track(open_home(), *sys.argv[1:])
