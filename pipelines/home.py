"""Where files live: every path below $MILLRACE_HOME, and the environment of every process."""

import ctypes
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import MillraceError
from pipelines.manifest import ROOT, read_json, write_json


@dataclass(frozen=True)
class Home:
    """The folder that holds everything that is not code."""

    root: Path

    def landing(self, pipeline: str) -> Path:
        return self.root / "landing" / pipeline

    @property
    def objects(self) -> Path:
        return self.root / "objects"

    def snapshots(self, pipeline: str) -> Path:
        return self.root / "snapshots" / pipeline

    def features(self, pipeline: str, defs_digest: str, snapshot: str) -> Path:
        return self.root / "features" / pipeline / defs_digest[:16] / snapshot[:16]

    def online(self, pipeline: str, defs_digest: str) -> Path:
        return self.root / "online" / pipeline / defs_digest[:16]

    def runs(self, pipeline: str) -> Path:
        return self.root / "runs" / pipeline

    @property
    def dvc(self) -> Path:
        return self.root / "dvc"

    @property
    def erased(self) -> Path:
        return self.root / "erased"

    @property
    def lineage(self) -> Path:
        return self.root / "lineage"

    def backfills(self, pipeline: str) -> Path:
        return self.root / "backfills" / pipeline

    def releases(self, pipeline: str) -> Path:
        return self.root / "releases" / pipeline

    def predictions(self, pipeline: str) -> Path:
        return self.root / "predictions" / pipeline

    def services(self, pipeline: str) -> Path:
        return self.root / "services" / pipeline

    def lock(self, name: str) -> Path:
        return self.root / "locks" / name

    def relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def open_home(path: Path | None = None) -> Home:
    """The home at `path`, $MILLRACE_HOME or `.millrace` in the checkout, made when missing.

    Raises MillraceError when it cannot be written or is of another format.
    """
    root = (path or Path(os.environ.get("MILLRACE_HOME") or ROOT / ".millrace")).absolute()
    marker = root / "home.json"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            write_json(marker, {"what": "Millrace home"})
        else:
            read_json(marker)
        probe = root / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(b"millrace")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise MillraceError(
            f"home {root}: cannot be written ({error.strerror}); free space or rights there, "
            "or point MILLRACE_HOME at another folder"
        ) from None
    return Home(root)


def free_mb(home: Home) -> int:
    """Free disk at the home, MB."""
    return shutil.disk_usage(home.root).free // 1_000_000


def give_back_memory() -> None:
    """Hands freed memory back to the system: processes that start later need it."""
    import pyarrow as pa  # not where only a path is asked for

    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def process_env(home: Home) -> dict[str, str]:
    """Variables that every Millrace process runs under: UTC, no telemetry, all stores inside the home."""
    root = home.root
    return {
        "MILLRACE_HOME": str(root),
        "TZ": "UTC",
        "PYTHONSAFEPATH": "1",
        "PREFECT_HOME": str(root / "prefect"),
        "PREFECT_LOCAL_STORAGE_PATH": str(root / "prefect" / "storage"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "WARNING"),
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "BENTOML_HOME": str(root / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        "OTEL_SDK_DISABLED": "true",
        "GX_ANALYTICS_ENABLED": "false",
        "FEAST_NO_PROGRESS": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
