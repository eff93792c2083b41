"""A run: its pinned inputs, its name, and its record. Everything later reads the pins, never the pointers."""

import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipelines.clock import iso, wall_us
from pipelines.home import Home
from pipelines.manifest import Artifact, digest_of, lock, read_json, write_json
from pipelines.spec import Spec

# what the answer to a question does not depend on: where it is served, and on how many processes
_NOT_RESULT = {"serve": {"port", "admin_port", "workers", "log_flush", "store", "inference", "max_gap", "rollout", "access_log",
                         "api_keys", "rate_limit"},
               "train": {"ranks", "checkpoint_every", "max_restarts", "hang_after", "strategy", "profile", "power"},
               "tune": {"workers"}, "sample": True, "monitor": True, "versions": True, "tracking": True}  # fmt: skip


def result_spec(spec: Spec) -> dict[str, Any]:
    """The part of a spec that a result depends on."""
    return spec.model_dump(mode="json", by_alias=True, exclude=_NOT_RESULT)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """Pinned inputs of a run. Times are µs UTC; `parent` is the champion's release, or empty.

    `auto`: its features are proposed and chosen; `chosen` is where that was done (home-relative), empty until then.
    """

    pipeline: str
    run_id: str
    as_of_us: int
    snapshot: str
    previous_snapshot: str
    parent: str
    anchor_wall_us: int
    spec_digest: str
    code: str
    auto: bool = False
    unchanged: bool = False
    line: str = ""
    chosen: str = ""

    def says(self, line: str) -> "Run":
        """The same run with a line about it."""
        return replace(self, line=line)

    @property
    def page(self) -> str:
        """Where the page about what arrived, or about the features that were chosen, lies (home-relative)."""
        return f"{self.chosen}/page.md" if self.chosen else f"runs/{self.pipeline}/{self.run_id}/arrived.md"

    def folder(self, home: Home) -> Path:
        return home.runs(self.pipeline) / self.run_id

    def spec(self, home: Home) -> Spec:
        """The spec as it was when the run was pinned or taken up, with the features that were chosen since."""
        return spec_from((home.root / self.chosen if self.chosen else self.folder(home)) / "spec.json")

    def with_features(self, home: Home, chosen: Artifact) -> "Run":
        """The same run, whose spec is from now on the one that an artifact holds."""
        run = replace(self, chosen=chosen.path, line=chosen.line)
        return replace(run, spec_digest=digest_of(result_spec(run.spec(home))))


def spec_from(path: Path) -> Spec:
    """The spec that a stage wrote."""
    body = read_json(path)
    del body["format_version"]
    return Spec.model_validate(body)


_PINS = {f.name for f in fields(Run)} - {"unchanged", "line", "chosen"}


def _pinned(body: dict[str, Any]) -> dict[str, Any]:
    return {name: body[name] for name in _PINS if name in body}


def run_lock(home: Home, pipeline: str) -> AbstractContextManager[None]:
    """The lock that every run of a pipeline holds, started from the command line or by a worker."""
    return lock(home.lock(f"run-{pipeline}"), what=f"a run of {pipeline}")


def finished(home: Home, pipeline: str) -> list[dict[str, Any]]:
    """Manifests of the runs that ended, oldest first."""
    found = [read_json(p) for p in home.runs(pipeline).glob("*/manifest.json")]
    return sorted(found, key=lambda m: (m["finished_wall_us"], m["run_id"]))


def ended_us(home: Home, pipeline: str) -> int:
    """When a run that ends now has ended, wall µs: after all before it, also where the clock was set back since."""
    return max([wall_us(), *(m["finished_wall_us"] + 1 for m in finished(home, pipeline)[-1:])])


def accepted(home: Home, pipeline: str) -> dict[str, Any] | None:
    """The manifest of the newest run that no contract stopped."""
    return next((m for m in reversed(finished(home, pipeline)) if m["result_digest"]), None)


def unfinished(home: Home, pipeline: str) -> Run | None:
    """The newest run of a pipeline that has pins and no manifest."""
    folders = [p.parent for p in home.runs(pipeline).glob("*/inputs.json")]
    open_ones = [f for f in folders if not (f / "manifest.json").exists()]
    if not open_ones:
        return None
    newest = max(open_ones, key=lambda f: (f / "inputs.json").stat().st_mtime_ns)
    body = read_json(newest / "inputs.json")
    return Run(**_pinned(body))


def take_up(home: Home, run: Run, spec: Spec) -> Run:
    """An unfinished run, with those settings of today's spec on which its result does not depend."""
    write_json(run.folder(home) / "spec.json", spec.model_dump(mode="json", by_alias=True))
    return run.says(f"takes up run {run.run_id} where it was left")


def packaged_alike(home: Home, run_id: str, spec: Spec) -> bool:
    """Whether a run was told the same of what is to compute its answers."""
    path = home.runs(spec.pipeline) / run_id / "spec.json"
    was, now = read_json(path)["serve"] if path.exists() else {}, spec.serve.model_dump(mode="json")
    return all(was.get(name) == now[name] for name in ("inference", "max_gap"))


def pin(
    home: Home, spec: Spec, *, as_of_us: int, snapshot: str, previous: str, parent: str, code: str
) -> Run:  # fmt: skip
    """Writes the inputs of a new run, or says that the last one had the same (`unchanged`)."""
    spec_digest = digest_of(result_spec(spec))
    base = digest_of([spec.pipeline, spec_digest, as_of_us, snapshot, parent])[:12]
    last = accepted(home, spec.pipeline)
    same = {"spec_digest": spec_digest, "as_of_us": as_of_us, "snapshot": snapshot, "code": code}
    same_inputs = last and all(last["inputs"].get(k) == v for k, v in same.items())
    if last and same_inputs and not spec.train.profile and packaged_alike(home, last["run_id"], spec):
        return Run(**_pinned(last["inputs"]), unchanged=True)
    attempt = 1 + len(list(home.runs(spec.pipeline).glob(f"{base}-*")))
    run = Run(
        spec.pipeline, f"{base}-{attempt}", as_of_us, snapshot, previous, parent, wall_us(), spec_digest, code,
        auto=spec.features.auto is not None,
    )
    write_json(run.folder(home) / "spec.json", spec.model_dump(mode="json", by_alias=True))
    body = {k: v for k, v in asdict(run).items() if k in _PINS}
    flow_run = os.environ.get("PREFECT__FLOW_RUN_ID", "")
    write_json(run.folder(home) / "inputs.json", {**body, "as_of": iso(as_of_us), "prefect_flow_run": flow_run})
    return run
