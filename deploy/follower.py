"""The process that tells one tracker of one run: `python -m deploy.follower TRACKER PIPELINE RUN_ID`.

It reads what the run leaves on disk, and may fail, hang or be killed without anybody minding. `finish` on stdin: the manifest
is written, tell the rest and end. The end of stdin: the run is gone. Without RUN_ID it only lets MLflow's alias follow the
champion.
"""

import importlib
import json
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deploy.runs import flat
from pipelines.errors import MillraceError
from pipelines.home import Home, open_home
from pipelines.manifest import read_json, write_json
from pipelines.run import spec_from

LOOK_S = 1.0  # between two looks at the run's files
RETRY_S = 30.0  # from one try at a tracker that fails to the next
NICE = 10  # while the run works
PARAMS = {"seed", "split", "train", "tune", "gbdt", "gate"}  # sections of the spec
TAGS = ("outcome", "release", "chosen", "result_digest", "git_commit")
FILES = ("manifest.json", "spec.json", "report.html", "model_card.md")


@dataclass(frozen=True)
class Subject:
    """A run as it is when its training begins. `params`: fields of the spec by their dotted names."""

    pipeline: str
    run_id: str
    title: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Point:
    """Values of one step of a learning curve, by epoch of a network or round of trees."""

    curve: str
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Ended:
    """What there is to say of a run that has ended. `released`: the release that it made the champion, or empty."""

    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    files: tuple[Path, ...]
    model: tuple[Path, ...]
    released: str


class Tracker(Protocol):
    """One run in one tracker. Said again, everything is there once."""

    def points(self, points: Sequence[Point]) -> None: ...

    def end(self, ended: Ended) -> None: ...

    def broken_off(self) -> None: ...


class Follower:
    """Tells a tracker of a run until that ends; one that fails is tried again while there is time."""

    def __init__(self, home: Home, tracker: str, pipeline: str, run_id: str) -> None:
        self.home, self.tracker = home, tracker
        self.pipeline, self.run_id = pipeline, run_id
        self.folder = home.runs(pipeline) / run_id
        self.asked, self.gone = threading.Event(), False
        self.sent: dict[str, int] = {}

    def listen(self) -> None:
        """Until stdin ends."""
        for line in sys.stdin:
            if line.strip() == "finish":
                _give_way(0)
                self.asked.set()
        self.gone = not self.asked.is_set()
        self.asked.set()

    def work(self) -> bool:
        """Whether the tracker was told everything."""
        while True:
            last = self.asked.is_set()
            try:
                return self._tell()
            except Exception as error:
                traceback.print_exc()
                self._say("failing", _words(error))
            if last or self.gone:
                return False
            self.asked.wait(RETRY_S)

    def _tell(self) -> bool:
        adapter = importlib.import_module(f"deploy.track_{self.tracker}")
        tracker: Tracker = adapter.open_tracker(self.home, _subject(self.home, self.pipeline, self.run_id))
        self.sent = {}
        self._say("open")
        while not self.asked.wait(LOOK_S):
            tracker.points(self._new(_progress(self.folder)))
        if self.gone:
            tracker.broken_off()
            return False
        manifest = read_json(self.folder / "manifest.json")
        tracker.points(self._new(_curves(self.home, manifest)))
        tracker.end(_ended(self.home, self.folder, manifest))
        self._say("done")
        return True

    def _new(self, points: Iterator[Point]) -> list[Point]:
        new = [p for p in points if p.step > self.sent.get(p.curve, 0)]
        self.sent |= {p.curve: p.step for p in new}
        return new

    def _say(self, state: str, line: str = "") -> None:
        write_json(self.folder / "tracking" / f"{self.tracker}.json", {"state": state, "line": line})


def _words(error: BaseException) -> str:
    """What an error came of, in one line, without what a URL may hold of passwords."""
    cause: BaseException | None = error
    while cause is not None:
        error, cause = cause, cause.__cause__ or cause.__context__
    text = re.sub(r"//[^/@\s]+@", "//", " ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 240 else text[:239] + "…"


def _subject(home: Home, pipeline: str, run_id: str) -> Subject:
    folder = home.runs(pipeline) / run_id
    spec, inputs = spec_from(folder / "spec.json"), read_json(folder / "inputs.json")
    body = spec.model_dump(mode="json", by_alias=True, include=PARAMS)
    tags = {name: str(inputs[name]) for name in ("as_of", "snapshot", "parent") if inputs.get(name)}
    return Subject(pipeline, run_id, spec.title, dict(flat(body)), tags)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items()
            if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)}  # fmt: skip


def _points(curve: str, rows: Sequence[Any]) -> Iterator[Point]:
    """Networks leave a record for each epoch, trees the log loss of each round."""
    for step, row in enumerate(rows, 1):
        values = row if isinstance(row, Mapping) else {"log_loss": row}
        yield Point(curve, int(values.get("epoch", step)), _numbers({k: v for k, v in values.items() if k != "epoch"}))


def _progress(folder: Path) -> Iterator[Point]:
    """Epochs of the network so far."""
    paths = list(folder.glob("checkpoints/*/network/progress.jsonl"))
    if paths:
        with suppress(OSError, ValueError):  # just being replaced
            lines = max(paths, key=lambda p: p.stat().st_mtime_ns).read_text(encoding="utf-8").splitlines()
            yield from _points("network", [json.loads(line) for line in lines])


def _curves(home: Home, manifest: Mapping[str, Any]) -> Iterator[Point]:
    path = home.root / manifest["stage_paths"]["train"] / "curves.json"
    for curve, rows in read_json(path).items() if path.is_file() else ():
        if curve != "format_version":
            yield from _points(curve, rows)


def _ended(home: Home, folder: Path, manifest: Mapping[str, Any]) -> Ended:
    train = home.root / manifest["stage_paths"]["train"]
    metrics = {f"test/{metric}": of["value"] for metric, of in manifest["metrics"]["challenger"].items()}
    metrics |= {f"test_{model}/{metric}": of["value"] for model, metrics_of in manifest["metrics"].items()
                for metric, of in metrics_of.items() if model != "challenger"}  # fmt: skip
    metrics |= {f"gain_on_{model}/{metric}": of["value"] for model, gains in manifest["gains"].items()
                for metric, of in gains.items()}  # fmt: skip
    metrics |= {f"rows/{name}": count for name, count in manifest["counts"].items()}
    metrics |= {f"seconds/{cost['stage']}": cost["seconds"] for cost in manifest["stages"]}
    metrics |= {f"training/{name}": value for name, value in flat(manifest["training"])}
    metrics["training/restarts"] = len(manifest["training"]["restarts"])
    for path in sorted(folder.glob("checkpoints/*/network/timing.json"), key=lambda p: p.stat().st_mtime_ns)[-1:]:
        metrics |= {f"timing/{name}": value for name, value in flat(read_json(path)) if name != "format_version"}
    tags = {name: str(manifest[name]) for name in TAGS if manifest[name]}
    best = {f"best.{name}": value for name, value in flat(manifest["hyper_parameters"])}
    model = tuple(p for p in sorted(train.iterdir()) if p.is_file() and p.name not in ("done.json", "page.md"))
    return Ended(best, _numbers(metrics), tags, tuple(folder / name for name in FILES if (folder / name).is_file()), model,
                 manifest["release"] if manifest["outcome"] in ("promoted", "challenger") else "")  # fmt: skip


def _give_way(nice: int) -> None:
    """How far training comes first. Where Linux groups processes by session, `nice` counts within one; the group has its own."""
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


def main(tracker: str, pipeline: str, run_id: str = "") -> bool:
    """Whether the tracker was told everything."""
    os.nice(NICE // 2)  # for good
    _give_way(NICE)
    home = open_home()
    if run_id:
        follower = Follower(home, tracker, pipeline, run_id)
        threading.Thread(target=follower.listen, daemon=True).start()
        return follower.work()
    state = {"state": "done", "line": ""}
    try:
        importlib.import_module("deploy.track_mlflow").mirror(home, pipeline)
    except Exception as error:
        traceback.print_exc()
        state = {"state": "failing", "line": _words(error)}
    write_json(home.root / "mlflow" / f"mirror-{pipeline}.json", state)
    return state["state"] == "done"


if __name__ == "__main__":
    try:
        code = 0 if main(*sys.argv[1:]) else 1
    except MillraceError as said:
        print(said, file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)  # a library's own threads may hang
