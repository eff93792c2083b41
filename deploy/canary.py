"""Drives a challenger through shadow and canary to champion, or takes it back. Whoever kills it: its deputy goes on.

The release log says where the challenger stands and `live.reconcile` makes it so; a step begins anew where it was watched
by nobody.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deploy.deputy import deputy
from deploy.guard import Seen, Side, figures, higher_than, log_losses, reasons
from deploy.live import NotReady, Role, cut_off, endpoints, kill, memory_mb, place_of, promote_now, reconcile, serving
from deploy.loaded import Loaded
from deploy.monitor import answers, outcomes
from deploy.process import Service, call, reason
from deploy.proxy import Proxy, Traffic
from deploy.rollout import bento_spec, events, find_release, settle, stages_of, step
from deploy.rollout_page import write_rollout_page
from deploy.stages import CANARY, CHALLENGER, CHAMPION, SHADOW, Stage, under_way
from features.facts import Columns
from features.frame import as_array
from pipelines.clock import parse_time, wall_us
from pipelines.errors import MillraceError, Refused, UsageError
from pipelines.home import Home
from pipelines.manifest import lock
from pipelines.predlog import FEATURE, WHOLE, complete
from pipelines.spec import Guard, Rollout, Spec

TICK_S = 0.25  # between two looks
COPY_S = 0.1  # of a tick at most that copies take, but for the first
HUNG_S = 2.0  # without an answer, while some are waited for

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Rolled:
    """How a rollout ended: promoted or retired, and why; `report` is home-relative."""

    outcome: str
    release: str
    why: str
    line: str
    report: str


class LogTail:
    """The prediction log as it grows."""

    def __init__(self, root: Path) -> None:
        self.root, self._changed, self._seen = root, dict[str, int](), set[Path]()
        self._new()

    def take(self) -> list[dict[str, Any]]:
        """Rows that were written since the last call."""
        rows: list[dict[str, Any]] = []
        for path in self._new():
            try:
                rows += pq.ParquetFile(path).read().to_pylist()
            except (pa.ArrowException, OSError):  # such as one that retention takes away now
                continue
        return rows

    def _new(self) -> list[Path]:
        found = []
        for hour in self.root.glob("hour=*"):
            changed = hour.stat().st_mtime_ns
            if self._changed.get(hour.name) != changed:
                found += [p for p in complete(hour) if not p.name.startswith(WHOLE) and p not in self._seen]
                self._changed[hour.name] = changed
        self._seen |= set(found)
        return sorted(found)


def roll_out(home: Home, spec: Spec, *, tell: Tell, replaced: bool = False) -> Rolled:
    """Brings the release on its way to its end; waits for that where another process does it.

    `replaced`: a deputy goes on if this process is killed. Raises MillraceError where none is on its way, or no proxy serves
    the pipeline.
    """
    rules, pipeline = spec.serve.rollout, spec.pipeline
    if rules is None:
        raise UsageError(f"{pipeline} has no rollout: write serve: {{rollout: {{}}}}, or add --set serve.rollout={{}}")
    with lock(home.lock(f"rollout-{pipeline}"), what=f"a rollout of {pipeline}", wait=True, tell=tell):
        settle(home, pipeline)
        coming, told = under_way(stages_of(home, pipeline)), serving(home, pipeline)
        if told is None:
            raise MillraceError(f"no proxy serves {pipeline}: type `millrace serve {pipeline} --background`")
        if coming is None:
            return _left(home, spec)
        traffic = Traffic(told.log_port)
        try:
            with deputy(home, spec) if replaced else nullcontext():
                return _Driver(home, spec, rules, traffic, tell).run(coming.release)
        finally:
            traffic.close()


def _left(home: Home, spec: Spec) -> Rolled:
    """Finishes what one that was killed at the very end has left, and says how the last rollout ended."""
    reconcile(home, spec.pipeline)
    last = next((e["body"]["release"] for e in reversed(list(events(home, spec.pipeline))) if e["event"] == CHALLENGER), "")
    if not last:
        raise MillraceError(f"no release of {spec.pipeline} is on its way: `millrace promote {spec.pipeline} RELEASE --canary`")
    return _ended(home, spec, last)


def _ended(home: Home, spec: Spec, release: str) -> Rolled:
    report, last = write_rollout_page(home, spec), stages_of(home, spec.pipeline)[release]
    outcome = "promoted" if last.state == CHAMPION else "retired"
    return Rolled(outcome, release, last.why, f"{outcome}: {release} ({last.why})", home.relative(report))


class _Driver:
    def __init__(self, home: Home, spec: Spec, rules: Rollout, traffic: Traffic, tell: Tell) -> None:
        self.home, self.spec, self.rules, self.traffic, self.tell = home, spec, rules, traffic, tell
        self.pipeline, self.proxy = spec.pipeline, Proxy(home, spec.pipeline)
        self.log = LogTail(home.predictions(self.pipeline))

    def run(self, release: str) -> Rolled:
        while (stage := under_way(stages_of(self.home, self.pipeline))) and stage.release == release:
            write_rollout_page(self.home, self.spec)
            try:
                reconcile(self.home, self.pipeline)
                seen = Seen()
                why = self._watch(stage, seen) if stage.state != CHALLENGER else []
                if why is None:
                    continue  # someone else has moved it
                if why:
                    self._take_back(stage, "; ".join(why), seen)
                else:
                    self._go_on(stage, seen)
            except NotReady as error:  # the challenger's: reconcile says of the champion's what it is
                self._take_back(stage, f"start: {error}", Seen())
        reconcile(self.home, self.pipeline)
        return _ended(self.home, self.spec, release)

    def _go_on(self, stage: Stage, seen: Seen) -> None:
        later = [share for share in self.rules.canary if share > stage.share]
        shown = {"seen": figures(seen, self.spec.serve.threshold)} if stage.state != CHALLENGER else {}
        why = f"{stage.words} passed" if shown else stage.why
        if stage.state == CHALLENGER and self.rules.shadow:
            step(self.home, self.pipeline, stage, SHADOW, why=why)
        elif later:
            step(self.home, self.pipeline, stage, CANARY, why=why, share=later[0], **shown)
        else:
            release = find_release(self.home, self.pipeline, stage.release)
            try:
                promote_now(self.home, self.pipeline, release, why=why, expected=stage.parent, seen=shown.get("seen"))
            except Refused as error:
                self._take_back(stage, str(error), seen)
        now = stages_of(self.home, self.pipeline)[stage.release]
        self.tell(f"{stage.release}: {now.words} ({now.why})")

    def _take_back(self, stage: Stage, why: str, seen: Seen) -> None:
        """Traffic first, then the log: whoever is killed between finds it bad, or dead, again."""
        cut_off(self.home, self.pipeline, stage.release)
        if "errors:" in why:  # what it had to say is written within a second
            time.sleep(min(2.0, 1.5 * self.spec.serve.log_flush / 1e6))
            self._read_logs(stage, seen)
            why = "; ".join(reasons(self.rules.guard, seen, self._budget_ms)) or why
        kill(self.home, self.pipeline, stage.release)
        shown = {"seen": figures(seen, self.spec.serve.threshold)} if seen.challenger.answers else {}
        step(self.home, self.pipeline, stage, "retire", why=why, **shown)
        self.tell(f"{stage.release}: taken back: {why}")

    @property
    def _budget_ms(self) -> float:
        return self.spec.serve.latency_budget / 1e3

    def _watch(self, stage: Stage, seen: Seen) -> list[str] | None:
        """Why it has to go, nothing when its step is over; None when the log says something else by now."""
        began, told, guard = time.monotonic(), serving(self.home, self.pipeline), self.rules.guard
        lasts = (self.rules.shadow if stage.state == SHADOW else self.rules.step) / 1e6
        if (found := self._services(stage)) is None:
            return None
        champion, challenger = found
        self.shadow_log = LogTail(Path(challenger.log).parent / "shadow") if stage.state == SHADOW else None
        self.log.take()
        self.traffic.take()
        waits, self.last_answer, next_look = began + lasts, began, began + lasts
        while True:
            time.sleep(TICK_S)
            now = under_way(stages_of(self.home, self.pipeline))
            if now is None or (now.release, now.state, now.share) != (stage.release, stage.state, stage.share):
                return None
            if serving(self.home, self.pipeline) != told or told is None:
                raise MillraceError(f"{self.pipeline} is served no more: type `millrace serve {self.pipeline}`, then go on")
            if not challenger.alive():
                return [f"crash: its endpoint died: {reason(Path(challenger.log))}"]
            if not champion.alive():
                return None  # the next turn starts it again
            for side, service in ((seen.champion, champion), (seen.challenger, challenger)):
                side.rss_mb = [*side.rss_mb[:1], memory_mb(service)]
            self._look(stage, champion, challenger, seen)
            if why := reasons(guard, seen, self._budget_ms):
                return why
            if time.monotonic() < next_look:
                continue
            next_look = time.monotonic() + lasts
            try:
                compare(self.home, self.spec, guard, stage, seen)
            except (MillraceError, ValueError) as error:  # such as a delivery that is refused: no fault of the challenger's
                seen.quality = f"quality was not compared: {error}"
            if why := reasons(guard, seen, self._budget_ms):
                return why
            count = seen.challenger.answers
            if not now.held and count >= guard.min_requests:
                return []
            if time.monotonic() > waits:
                waits = time.monotonic() + max(lasts, 10.0)
                self.tell(f"{stage.release}: {now.words}, {count:,} answers; a step takes {guard.min_requests}")

    def _services(self, stage: Stage) -> tuple[Service, Service] | None:
        """The endpoints of champion and challenger; None where the champion's has died, which the next turn starts again.
        Raises NotReady where the challenger's has."""
        told, runs = serving(self.home, self.pipeline), endpoints(self.home, self.pipeline)
        found = []
        for name, shadow in ((stage.parent, False), (stage.release, stage.state == SHADOW)):
            role = Role(find_release(self.home, self.pipeline, name), 0, shadow)
            slot = place_of(runs, role, told.offset_us if told else 0)
            if not slot:
                if name == stage.parent:
                    return None
                raise NotReady(f"no endpoint of {name} runs")
            found.append(runs[slot])
        return found[0], found[1]

    def _look(self, stage: Stage, champion: Service, challenger: Service, seen: Seen) -> None:
        """One look at what both answered meanwhile."""
        rows = self._read_logs(stage, seen)
        if stage.state == SHADOW:
            self._copy([r for r in rows if r["release"] == stage.parent], challenger, seen)
            return
        runs = {slot: service.release for slot, service in endpoints(self.home, self.pipeline).items()}
        for answered in self.traffic.take():
            side = self._side(stage, runs.get(answered.slot, ""), seen)
            if side is not None:
                side.answers += 1
                side.failed += answered.failed
                side.ms += [answered.ms] if answered.ms >= 0 else []
                if side is seen.challenger:
                    self.last_answer = time.monotonic()
        slot = next(s for s, release in runs.items() if release == stage.release)
        row = self.proxy.stat()[slot]
        waiting = int(row["scur"])
        self.last_answer = self.last_answer if waiting else time.monotonic()
        seen.challenger.hung = waiting if time.monotonic() - self.last_answer > HUNG_S else 0
        if row["status"].startswith("DOWN"):
            seen.challenger.failed = max(seen.challenger.failed, seen.challenger.answers, 5)
            seen.challenger.answers = seen.challenger.failed
            seen.challenger.errors.append("the proxy does not find it ready any more")
        elif seen.challenger.failed and not seen.challenger.errors:
            seen.challenger.errors += [said] if (said := reason(Path(challenger.log))[:300]) else []

    def _side(self, stage: Stage, release: str, seen: Seen) -> Side | None:
        return {stage.parent: seen.champion, stage.release: seen.challenger}.get(release)

    def _read_logs(self, stage: Stage, seen: Seen) -> list[dict[str, Any]]:
        """New rows of the prediction log; the scores of both are noted."""
        rows = self.log.take()
        for row in rows + (self.shadow_log.take() if self.shadow_log else []):
            side = self._side(stage, row["release"], seen)
            if side is not None:
                side.scores.append(row["score"])
        return rows

    def _copy(self, rows: list[dict[str, Any]], challenger: Service, seen: Seen) -> None:
        """Asks the challenger what the champion was asked, one after another, for a part of the tick."""
        began = time.monotonic()
        for _, group in groupby(rows, key=lambda r: r["request_id"]):
            asked = list(group)
            seen.champion.answers += 1
            seen.champion.ms.append(asked[0]["latency_us"] / 1e3)
            sent, body = time.monotonic(), {"rows": [_request(row) for row in asked]}
            if sent - began > COPY_S or not all(self.spec.serve.shown(name) for row in body["rows"] for name in row):
                seen.not_copied += 1  # no time, or not known any more what was asked
                continue
            try:
                status, answer = call(f"{challenger.url}/{asked[0]['route']}", body, timeout=10)
            except (OSError, ValueError) as error:
                status, answer = 599, {"error": f"no answer: {error}"}
            if status == 409:  # closed since the champion was asked
                continue
            seen.challenger.answers += 1
            seen.challenger.ms.append((time.monotonic() - sent) * 1e3)
            if status == 200:
                seen.pairs += [(row["score"], a["probability"]) for row, a in zip(asked, answer["rows"], strict=True)]
            else:
                seen.challenger.failed += 1
                said = str(answer.get("error"))
                seen.challenger.errors.append((reason(Path(challenger.log)) if status == 500 else said)[:300])


def compare(home: Home, spec: Spec, guard: Guard, stage: Stage, seen: Seen) -> None:
    """Compares log losses on rows that the champion answered since the challenge and whose label is known by now.

    The challenger's model answers them from the features as they were served.
    """
    since = max(parse_time(e["when"]) for e in events(home, spec.pipeline)
                if e["event"] == CHALLENGER and e["body"]["release"] == stage.release)  # fmt: skip
    if wall_us() < since:
        seen.quality = "quality was not compared: the clock was set back behind the challenge"
        return
    log = answers(home, spec.pipeline, stage.parent)
    log = log.filter(pc.greater_equal(log["wall"].cast(pa.int64()), since)).combine_chunks().sort_by("wall")
    if not log.num_rows:
        return
    loaded = Loaded.of(home.root / find_release(home, spec.pipeline, stage.release).bento / "src" / "bundle")
    lacking = [f.name for f in loaded.features if FEATURE + f.name not in log.column_names or not spec.serve.shown(f.name)]
    if lacking:
        seen.quality = f"quality was not compared: {lacking[0]!r} is not logged of the champion's answers"
        return
    label, old = outcomes(bento_spec(home, find_release(home, spec.pipeline, stage.parent)), home, log)
    known = label >= 0
    if not known.any():
        return
    frame: Columns = {f.name: as_array(log[FEATURE + f.name], "string" if f.kind == "category" else "float64")[known]
                      for f in loaded.features}  # fmt: skip
    new = loaded.model.predict(loaded.preprocess.transform(frame))
    was, now = (log_losses(label[known], np.asarray(score)) for score in (old[known], new))
    seen.worse = higher_than(now - was, guard.max_log_loss_rise)
    seen.quality = f"log loss {now.mean():.4f} on {len(now):,} rows with a label by now, the champion's {was.mean():.4f}"


def _request(row: dict[str, Any]) -> dict[str, Any]:
    """The request that a logged row answers."""
    if row["route"] == "predict_features":
        return {n.removeprefix(FEATURE): v for n, v in row.items() if n.startswith(FEATURE) and v is not None}
    return {**json.loads(row["key"]), **json.loads(row["request"])}

