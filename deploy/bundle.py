"""From a chosen model to a bento: only what serving needs, named by its contents."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.errors import MillraceError
from pipelines.home import Home, process_env
from pipelines.manifest import (
    ROOT,
    Note,
    code_digest,
    digest_of,
    file_digest,
    library_versions,
    read_json,
    write_json,
    write_page,
)  # fmt: skip
from pipelines.spec import Spec

SOURCES = (
    *(f"pipelines/{n}.py" for n in ("__init__", "clock", "errors", "home", "manifest", "predlog", "spec", "trainer")),
    *(f"features/{n}.py" for n in ("__init__", "cells", "facts", "frame", "keys", "online", "preprocess", "steps", "tokens")),
    "features/views.py",
    *(f"models/{n}.py" for n in ("__init__", "calibrate", "score", "words")),
    *(f"deploy/{n}.py" for n in ("__init__", "answer", "batch", "contents", "imports", "loaded", "predictions", "requests",
                                 "service", "tables")),
)
LIBRARIES = ("bentoml", "lightgbm", "numpy", "onnxruntime", "pyarrow", "pydantic", "pyyaml", "starlette", "tzdata")


@dataclass(frozen=True)
class Bento:
    """A built bento: its tag, folder (home-relative) and size."""

    tag: str
    path: str
    size_mb: float


def build_bento(spec: Spec, home: Home, files_in: list[Path], defs_digest: str, scratch: Path) -> Bento:
    """Builds, or finds, the bento that holds these files. Same inputs, same tag.

    Raises MillraceError with the builder's last words.
    """
    _stage(spec, files_in, defs_digest, scratch)
    files = {p.relative_to(scratch).as_posix(): file_digest(p) for p in sorted(scratch.rglob("*")) if p.is_file()}
    pins = library_versions(*LIBRARIES)
    version = digest_of([files, pins])[:12]
    name = f"millrace_{spec.pipeline}"
    folder = home.root / "bentoml" / "bentos" / name / version
    if not all((folder / "src" / f).is_file() and file_digest(folder / "src" / f) == d for f, d in files.items()):
        shutil.rmtree(folder, ignore_errors=True)
        _build(home, scratch, name, version, pins)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    return Bento(f"{name}:{version}", home.relative(folder), round(size, 3))


def _stage(spec: Spec, files_in: list[Path], defs_digest: str, scratch: Path) -> None:
    modules = {f.call.partition(":")[0].replace(".", "/") + ".py" for f in spec.features.functions}
    for name in (*SOURCES, *sorted(modules)):
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    bundle = scratch / "bundle"
    bundle.mkdir()
    for path in files_in:
        shutil.copyfile(path, bundle / path.name)
    body = spec.model_dump(mode="json", by_alias=True, exclude={"tracking"})
    (bundle / "spec.json").write_text(json.dumps(body, sort_keys=True, indent=1))
    about = {"pipeline": spec.pipeline, "defs_digest": defs_digest, "code": code_digest("features")}
    write_json(bundle / "bundle.json", about)


def _build(home: Home, scratch: Path, name: str, version: str, pins: dict[str, str]) -> None:
    """Runs the builder in a process of its own: it imports the service module, import guard and all."""
    options = {
        "service": "deploy.service:Millrace", "name": name, "version": version, "build_ctx": str(scratch),
        "include": ["**/*"], "exclude": ["**/__pycache__/**"],
        "python": {"packages": [f"{n}=={v}" for n, v in pins.items()], "lock_packages": False},
    }  # fmt: skip
    code = "import json, sys, bentoml; o = json.loads(sys.argv[1]); bentoml.bentos.build(o.pop('service'), **o)"
    env = {**os.environ, **process_env(home), "PYTHONPATH": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(options)], cwd=scratch, env=env, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    if done.returncode:
        raise MillraceError(f"the bento could not be built: {done.stderr.strip().splitlines()[-1][:500]}")


def package_into(spec: Spec, home: Home, model: Path, verdict: Path, defs_digest: str, out: Path) -> Note:
    """The stage: builds the bento of a model and notes it in `out`."""
    from models.score import Model  # seconds, and the command line imports this module for less

    files = [model / name for name in (*Model.load(model).files, "preprocess.json")] + [verdict / "replay.parquet"]
    with tempfile.TemporaryDirectory(dir=home.root) as scratch:
        bento = build_bento(spec, home, files, defs_digest, Path(scratch))
    write_json(out / "bento.json", asdict(bento))
    write_page(
        out / "page.md", f"{spec.pipeline}: bento", [("Bento", [("tag", bento.tag), ("MB", f"{bento.size_mb:g}")])]
    )
    return Note(f"{bento.tag}, {bento.size_mb:.1f} MB")


def load_bento(folder: Path) -> Bento:
    """The bento that `package_into` noted."""
    body = read_json(folder / "bento.json")
    return Bento(body["tag"], body["path"], body["size_mb"])
