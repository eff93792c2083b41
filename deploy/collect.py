"""`millrace gc`: what no run, release, backfill or landing file names any more leaves the home."""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.rollout import released
from features.ingest import landing_index, snapshot_files
from features.versions import drop, files_of, forget, objects_of, version_of
from pipelines.home import Home
from pipelines.manifest import read_json
from pipelines.run import run_lock


@dataclass(frozen=True)
class Collected:
    """By kind how many things no one names, and the bytes that they take alone; `deleted`: whether they are gone."""

    counts: dict[str, int]
    bytes: int
    deleted: bool
    line: str


def collect(home: Home, *, delete: bool = False) -> Collected:
    """Looks for what nothing names, and removes it where told to. Runs are kept out meanwhile.

    Of DVC's remotes only the home's own is cleared: others may share another one.
    """
    pipelines = sorted(p.name for p in (home.root / "snapshots").glob("*"))
    with ExitStack() as held:
        for pipeline in pipelines:
            held.enter_context(run_lock(home, pipeline))
        named = {pipeline: _named(home, pipeline) for pipeline in pipelines}
        idle: dict[str, list[Path]] = {"snapshots": [], "objects": [], "features": [], "artifacts": []}
        for pipeline in pipelines:
            idle["snapshots"] += [p for p in snapshot_files(home, pipeline) if p.stem not in named[pipeline]]
            done = home.root.glob(f"features/{pipeline}/*/*/done.json")
            idle["features"] += [p.parent for p in done if read_json(p)["snapshot"] not in named[pipeline]]
        used = set(_used(home, named))
        idle["objects"] = [p for p in home.objects.glob("*.parquet") if p.stem not in used]
        idle["artifacts"] = _artifacts(home)
        versions, stale = _versions(home, named)
        size = sum({(s := f.stat()).st_ino: s.st_size for paths in idle.values() for p in paths for f in _each(p)}.values())
        if delete:
            for path in (p for paths in idle.values() for p in paths):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            for pipeline in pipelines:
                _forget_memos(home, pipeline)
                forget(home, pipeline, versions[pipeline])
            if stale:
                drop(home, stale, str(home.dvc / "remote"))
    counts = {kind: len(paths) for kind, paths in idle.items()} | {"versions": sum(map(len, versions.values()))}
    words = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count) or "nothing"
    line = f"{words} ({size / 1e6:,.1f} MB) {'removed' if delete else 'that no run or release names; --delete removes it'}"
    return Collected(counts, size, delete, line)


def _named(home: Home, pipeline: str) -> set[str]:
    """Snapshots of runs, finished or not, and those before them; of releases; of backfills."""
    pins = [read_json(p) for top in (home.runs(pipeline), home.backfills(pipeline)) for p in top.glob("*/inputs.json")]
    found = {body.get(name, "") for body in pins for name in ("snapshot", "previous_snapshot", "landed")}
    return found | {release.snapshot for release in released(home, pipeline)}


def _used(home: Home, named: dict[str, set[str]]) -> Iterator[str]:
    """Objects of named snapshots, and of what has landed."""
    for pipeline, snapshots in named.items():
        for path in snapshot_files(home, pipeline):
            if path.stem in snapshots:
                yield from objects_of(read_json(path))
        yield from (entry["object"] for entry in landing_index(home, pipeline).values())


def _artifacts(home: Home) -> list[Path]:
    """Stage outputs of no run's record; none while a run or a backfill has yet to end, which may take them up."""
    runs = [p.parent for p in home.root.glob("runs/*/*/inputs.json")]
    fills = [p.parent for p in home.root.glob("backfills/*/*/inputs.json")]
    if any(not (f / "manifest.json").exists() for f in runs) or any(not (f / "done.json").exists() for f in fills):
        return []
    manifests = [read_json(folder / "manifest.json") for folder in runs]
    used = {path for manifest in manifests for path in manifest.get("stage_paths", {}).values()}
    return [p for p in sorted(home.root.glob("artifacts/*/*")) if home.relative(p) not in used]


def _versions(home: Home, named: dict[str, set[str]]) -> tuple[dict[str, set[str]], set[str]]:
    """Tracked snapshots that no one names, and the md5 of their files that no other tracked snapshot has."""
    tracked = {pipeline: {p.stem for p in (home.dvc / pipeline).glob("*.dvc")} for pipeline in named}
    idle = {pipeline: tracked[pipeline] - snapshots for pipeline, snapshots in named.items()}
    kept, stale = Counter[str](), set()
    for pipeline, snapshots in tracked.items():
        for snapshot in snapshots:
            md5s = {*files_of(home, pipeline, snapshot).values()}
            if snapshot in idle[pipeline]:
                version = version_of(home, pipeline, snapshot)
                stale |= md5s | ({version.md5} if version else set())
            else:
                kept.update(md5s)
    return idle, stale - kept.keys()


def _forget_memos(home: Home, pipeline: str) -> None:
    for path in home.snapshots(pipeline).glob("by_objects/*.json"):
        if not (home.snapshots(pipeline) / f"{read_json(path)['snapshot']}.json").exists():
            path.unlink()


def _each(path: Path) -> list[Path]:
    found: list[Any] = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return found
