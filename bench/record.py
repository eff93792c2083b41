"""How every benchmark reports: a table for a person, and JSON with hardware, versions and commit."""

import argparse
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from models.inference import cpu_name
from pipelines.clock import iso, wall_us
from pipelines.home import Home
from pipelines.manifest import ROOT, library_versions
from tests.command import millrace


@dataclass(frozen=True)
class Options:
    """What every benchmark is told: less work, and where the JSON goes."""

    quick: bool
    json: Path


def options(name: str) -> Options:
    """Options from the command line; by default the JSON goes to `bench/results/NAME.json`."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}")
    parser.add_argument("--quick", action="store_true", help="less work: a smoke test")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / f"{name}.json", metavar="FILE")
    given = parser.parse_args()
    return Options(given.quick, given.json)


def released(root: Path, pipeline: str, sets: Sequence[str]) -> Home:
    """A new home with the sample and one release of a pipeline. Smoke tests, which make one for all, name it by BENCH_HOME."""
    made = os.environ.get("BENCH_HOME")
    if made and (Path(made) / "releases" / pipeline).is_dir():
        shutil.copytree(made, root, ignore=shutil.ignore_patterns("services"))
        return Home(root)
    for done in (millrace(root, "sample", pipeline), millrace(root, "run", pipeline, sets=sets)):
        assert done.code == 0, done.err
    return Home(root)


def report(name: str, figures: dict[str, Any], rows: list[dict[str, Any]], out: Path, *libraries: str) -> None:
    """Prints the figures and writes the JSON, with the versions of what is measured."""
    libraries = libraries or ("numpy", "torch", "prefect", "bentoml")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    body = {
        "name": name, "commit": commit.stdout.strip(), "when": iso(wall_us()),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)},
        "versions": {"python": platform.python_version(), **library_versions(*libraries)},
        "rows": rows, "figures": figures,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(body, indent=1) + "\n")
    for key, value in figures.items():
        print(f"{key:<24} {value}")
    print(f"written to {out}")
