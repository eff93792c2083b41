"""`python -m bench.bento`: what a bento weighs, how fast it is up, and whether its contents are proven.

The example without time is run whole and released. Its bento is built once more in another home, started several times until it
answers, and spoiled in every way that the tests know.

Figures: `size_mb` of the bento, `packages` that it is locked to, `packages_mb` (their files here), `start_s` (median from the
command to the first answer), `ready_cpu_s` (CPU time of that), `digest_equal` (all bytes of two builds in different folders),
`verify_s`, `verify_refused` of `poisons`.
"""

import shutil
import statistics
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path

from bench.record import options, released, report
from bench.serving import cpu_s
from deploy.bundle import build_bento
from deploy.contents import read_lock, tree_digest, unlike
from deploy.process import free_port, start, stop
from deploy.rollout import bento_folder, bento_spec, champion
from pipelines.home import Home, open_home
from tests.command import QUICK
from tests.e2e.test_contents import POISONS

GIVEN = {"spec.json", "bundle.json", "requirements.txt", "sbom.cdx.json"}  # what the builder makes itself


def installed_mb(src: Path) -> float:
    """The files of the locked packages, as they are installed here."""
    found = 0
    for name in read_lock(src):
        where = distribution(name)
        paths = [Path(str(where.locate_file(file))) for file in where.files or []]
        found += sum(path.stat().st_size for path in paths if path.is_file())
    return found / 1e6


def started(home: Home, folder: Path, release: str) -> tuple[float, float]:
    """Wall and CPU seconds until an endpoint answers."""
    began = time.perf_counter()
    service = start(home, folder, port=free_port(), release=release, log=home.root / "bench.log", extra={})
    took = time.perf_counter() - began
    used = cpu_s(service.pid)
    stop(service)
    return took, used


def refused(folder: Path, work: Path) -> int:
    """How many of the poisons are seen."""
    found = 0
    for i, (spoil, _) in enumerate(POISONS.values()):
        copy = Path(shutil.copytree(folder, work / str(i) / folder.name))
        if (copy / "src/bundle/gbdt.txt").is_file():
            spoil(copy / "src")
            found += bool(unlike(copy / "src"))
    return found


def main() -> None:
    """Measures and reports."""
    told = options("bento")
    work = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    try:
        home = released(work / "home", "tumours", (*QUICK, "train.max_epochs=1"))  # LightGBM wins
        release = champion(home, "tumours")
        assert release is not None
        folder = bento_folder(home, release)
        other, scratch = open_home(work / "elsewhere/and/deeper"), work / "scratch"
        scratch.mkdir()
        inputs = [p for p in sorted((folder / "src/bundle").iterdir()) if p.name not in GIVEN]
        again = build_bento(bento_spec(home, release), other, inputs, release.defs_digest, scratch)
        starts = [started(home, folder, release.release) for _ in range(2 if told.quick else 7)]
        began = time.perf_counter()
        assert not unlike(folder / "src")
        looked = time.perf_counter() - began
        figures = {
            "size_mb": round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6, 3),
            "packages": len(read_lock(folder / "src")), "packages_mb": round(installed_mb(folder / "src"), 1),
            "start_s": round(statistics.median(took for took, _ in starts), 2),
            "ready_cpu_s": round(statistics.median(used for _, used in starts), 2),
            "digest_equal": tree_digest(folder) == tree_digest(other.root / again.path),
            "verify_s": round(looked, 3), "verify_refused": refused(folder, work / "poisoned"), "poisons": len(POISONS),
        }  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rows = [{"start_s": round(took, 3), "cpu_s": round(used, 3)} for took, used in starts]
    report("bento", figures, rows, told.json, "bentoml", "lightgbm", "numpy")


if __name__ == "__main__":
    main()
