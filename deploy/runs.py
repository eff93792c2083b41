"""`millrace runs`: the runs of a pipeline, from what they leave in the home; no tracker is needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.clock import iso
from pipelines.home import Home
from pipelines.manifest import read_json
from pipelines.run import finished

OPEN = "unfinished"  # running now, or taken up by the next run
PREFIX = 12  # digits of a digest that are shown
HEAD = (
    f"  {'run':<16} {'ended (UTC)':<16} {'result':<10} {'model':<11} {'test AUC':>8} {'log loss':>8} {'seconds':>8}  "
    "result_digest"
)


@dataclass(frozen=True)
class Listed:
    """A run in the list: when it ended, how, and its test figures; empty or None where it did not come so far."""

    run_id: str
    ended: str
    outcome: str
    champion: bool
    model: str
    auc: float | None
    log_loss: float | None
    seconds: float
    result_digest: str

    @property
    def line(self) -> str:
        figures = " ".join(f"{'–' if v is None else f'{v:.4f}':>8}" for v in (self.auc, self.log_loss))
        return (f"{'*' if self.champion else ' '} {self.run_id:<16} {self.ended[:16].replace('T', ' '):<16} {self.outcome:<10} "
                f"{self.model:<11} {figures} {self.seconds:>8,.1f}  {self.result_digest[:PREFIX]}").rstrip()  # fmt: skip


def list_runs(home: Home, pipeline: str) -> list[Listed]:
    """Runs of a pipeline, oldest first, those that have not ended last. The champion's own is marked."""
    now = champion_run(home, pipeline)
    found = [_listed(manifest, now) for manifest in finished(home, pipeline)]
    ended = {run.run_id for run in found}
    pinned = sorted(home.runs(pipeline).glob("*/inputs.json"), key=lambda p: p.stat().st_mtime_ns)
    left = [p.parent.name for p in pinned if p.parent.name not in ended]
    return found + [Listed(name, "", OPEN, False, "", None, None, 0.0, "") for name in left]


def _listed(manifest: Mapping[str, Any], champions: str) -> Listed:
    figures = manifest.get("metrics", {}).get("challenger", {})
    auc, log_loss = (figures[m]["value"] if m in figures else None for m in ("auc", "log_loss"))
    seconds = sum(cost["seconds"] for cost in manifest["stages"])
    return Listed(manifest["run_id"], iso(manifest["finished_wall_us"]), manifest["outcome"], manifest["run_id"] == champions,
                  manifest.get("chosen", ""), auc, log_loss, round(seconds, 1), manifest["result_digest"])  # fmt: skip


def champion_run(home: Home, pipeline: str) -> str:
    """The run that made the champion; empty where there is none."""
    pointer = home.releases(pipeline) / "champion.json"
    release = read_json(pointer)["release"] if pointer.is_file() else ""
    made = [m["run_id"] for m in finished(home, pipeline)
            if m["outcome"] in ("promoted", "challenger") and m["release"] == release]  # fmt: skip
    return made[0] if made else ""


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their dotted names; a list counts as one."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif value not in (None, "", (), [], {}):
        yield name, value
