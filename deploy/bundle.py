"""From a chosen model to a bento: only what serving needs, named by its contents."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.contents import LOCK, SBOM, bill, locked, problems, version_of, write_sums
from models.served import SERVED
from pipelines.errors import MillraceError
from pipelines.home import Home, process_env
from pipelines.manifest import (
    ROOT,
    Note,
    code_digest,
    file_digest,
    read_json,
    write_atomic,
    write_json,
    write_page,
)  # fmt: skip
from pipelines.spec import Spec

SOURCES = (
    *(f"pipelines/{n}.py" for n in ("__init__", "clock", "errors", "home", "manifest", "predlog", "spec", "trainer")),
    *(f"features/{n}.py" for n in ("__init__", "cells", "facts", "few", "frame", "keys", "online", "packed", "preprocess")),
    *(f"features/{n}.py" for n in ("steps", "tokens", "views")),
    *(f"models/{n}.py" for n in ("__init__", "calibrate", "engines", "explain", "score", "served", "words")),
    *(f"deploy/{n}.py" for n in ("__init__", "answer", "batch", "contents", "front", "imports", "keys", "lean", "loaded")),
    *(f"deploy/{n}.py" for n in ("meter", "openapi", "predictions", "requests", "service", "tables", "together", "warm")),
    "deploy/page.html",
)
MADE = "2000-01-01T00:00:00+00:00"  # when BentoML says that it was made: the same contents are the same bytes
LIBRARIES = ("bentoml", "lightgbm", "numpy", "onnxruntime", "psutil", "pyarrow", "pydantic", "pyyaml", "starlette", "tzdata")


@dataclass(frozen=True)
class Bento:
    """A built bento: its tag, folder (home-relative) and size."""

    tag: str
    path: str
    size_mb: float


def build_bento(spec: Spec, home: Home, files_in: list[Path], defs_digest: str, scratch: Path) -> Bento:
    """Builds, or finds, the bento that holds these files. Same inputs, same tag, same bytes.

    Raises MillraceError with the builder's last words.
    """
    name = f"millrace_{spec.pipeline}"
    needed = direct(spec, files_in)
    pins = locked(needed)
    _stage(spec, files_in, defs_digest, scratch, needed)
    models = {p.name: file_digest(p) for p in sorted((scratch / "bundle").iterdir())}
    (scratch / LOCK).write_text("".join(f"{n}=={v}\n" for n, v in pins.items()), encoding="utf-8")
    (scratch / SBOM).write_text(json.dumps(bill(name, pins, models), indent=1) + "\n", encoding="utf-8")
    version = version_of(write_sums(scratch), pins)
    folder = home.root / "bentoml" / "bentos" / name / version
    if not folder.is_dir() or problems(folder / "src", version, ()):
        shutil.rmtree(folder, ignore_errors=True)
        _build(home, scratch, name, version, pins)
        about = folder / "bento.yaml"
        write_atomic(about, re.sub("(?m)^creation_time: .*$", f"creation_time: '{MADE}'", about.read_text(encoding="utf-8")))
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    return Bento(f"{name}:{version}", home.relative(folder), round(size, 3))


def direct(spec: Spec, files_in: list[Path]) -> tuple[str, ...]:
    """The packages that a bento of this spec, with these files, imports itself."""
    served = [read_json(path)["packages"] for path in files_in if path.name == SERVED]
    return (*LIBRARIES, *(["tokenizers"] if spec.features.text else []), *(name for names in served for name in names))


def _stage(spec: Spec, files_in: list[Path], defs_digest: str, scratch: Path, needed: tuple[str, ...]) -> None:
    modules = {f.call.partition(":")[0].replace(".", "/") + ".py" for f in spec.features.functions}
    for name in (*SOURCES, *sorted(modules)):
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    bundle = scratch / "bundle"
    bundle.mkdir()
    for path in files_in:
        shutil.copyfile(path, bundle / path.name)
    body = spec.model_dump(mode="json", by_alias=True, exclude={"tracking": True, "serve": {"rollout"}})
    (bundle / "spec.json").write_text(json.dumps(body, sort_keys=True, indent=1))
    about = {"pipeline": spec.pipeline, "defs_digest": defs_digest, "code": code_digest("features"), "direct": needed}
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


def package_into(
    spec: Spec, home: Home, model: Path, form: Path, verdict: Path, defs_digest: str, about: Mapping[str, str], out: Path
) -> Note:  # fmt: skip
    """The stage: builds the bento of a model, in the form that was chosen, and notes it in `out`. `about`: what it was made from,
    for its manifest.
    """
    from models.score import Model  # seconds, and the command line imports this module for less

    files = [model / name for name in (*Model.load(model).files, "preprocess.json")] + [verdict / "replay.parquet"]
    if read_json(form / SERVED)["members"]:
        files += [path for path in sorted(form.iterdir()) if path.is_file() and path.name != "done.json"]
    with tempfile.TemporaryDirectory(dir=home.root) as scratch, tempfile.TemporaryDirectory() as made:
        card, manifest = Path(made) / "model_card.md", Path(made) / "manifest.json"
        card.write_text(_card(spec, read_json(model / "model.json"), verdict), encoding="utf-8")
        write_json(manifest, dict(about))
        bento = build_bento(spec, home, [*files, card, manifest], defs_digest, Path(scratch))
    write_json(out / "bento.json", asdict(bento))
    write_page(
        out / "page.md", f"{spec.pipeline}: bento", [("Bento", [("tag", bento.tag), ("MB", f"{bento.size_mb:g}")])]
    )
    return Note(f"{bento.tag}, {bento.size_mb:.1f} MB")


def _card(spec: Spec, model: Mapping[str, Any], verdict: Path) -> str:
    """What who runs the bento should know of its model. Figures are on the test part, which no model has learned from."""
    judged, ruled = read_json(verdict / "evaluation.json"), read_json(verdict / "verdict.json")
    found = {name: judged["metrics"]["challenger"][name] for name in ("auc", "log_loss", "brier", "ece")}
    lines = [
        f"# {spec.pipeline}: {spec.title}", "",
        f"The answer is a probability; from {spec.serve.threshold:g} on the decision is yes. The model: {model['chosen']}.",
        f"Rows are those of `{spec.rows.source}`, named by `{'`, `'.join(spec.row_key)}`. Not meant for rows of another origin,",
        "or as a reading of causes, or where a wrong answer harms someone and no person looks at it.", "",
        f"## On {ruled['rows']:,} test rows", "", "| figure | value | interval |", "| --- | --- | --- |",
        *(f"| {name} | {one['value']:.4f} | {one['low']:.4f} to {one['high']:.4f} |" for name, one in found.items()),
        "", "## Why it was let through", "", *(f"- {line}" for line in ruled["reasons"]), "",
        "`manifest.json` says what it was made from, `requirements.txt` and `sbom.cdx.json` what it runs with.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def load_bento(folder: Path) -> Bento:
    """The bento that `package_into` noted."""
    body = read_json(folder / "bento.json")
    return Bento(body["tag"], body["path"], body["size_mb"])
