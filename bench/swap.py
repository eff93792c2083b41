"""`python -m bench.swap`: releases under load, behind the proxy: promotions, rollbacks, and challengers that are bad.

An open loop asks at a fixed rate over real sockets, from a process of its own, whether answers come or not. Figures:
`lost_requests` (no answer, or a 5xx, that no bad challenger gave), `wrong_version_answers` (by a release that was neither the
champion nor on its way at any moment between sending and answer: after a promotion or rollback has returned, whatever is sent is
to be answered by the new champion; before it was begun, by the old one), `promote_s` and `rollback_s` (from the command to the
last request drained: medians; most of it is the start of an endpoint, while the old one answers), and of the bad ones, which have
no shadow and begin at `canary_weight` percent: `bad_challenger_rollback_s` (p95; from the sending of the first request that it
answered, broke or delayed by a second, to the later of its end in the release log and the last such answer), and
`users_hit_share` (largest; users with such an answer, of those who asked between challenge and end; every user asks once or
twice).
"""

import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import options, report
from deploy.canary import roll_out
from deploy.live import promote_now, roll_back
from deploy.rollout import champion, promote
from flows.serving import serve_champion, stop_all
from pipelines.home import Home, process_env
from pipelines.spec import Guard
from tests.e2e.buses import make_buses
from tests.e2e.releases import Asked, Load, by_steps, challenged_by, make_release

RATE, USERS, WEIGHT = 40, 5_000, 10
RULES = {"shadow": "0s", "canary": [WEIGHT, 50], "step": "3s", "guard": Guard(max_rss_growth_mb=60)}
BAD: dict[str, dict[str, Any]] = {
    "answers with errors": {"function": "fails"}, "answers NaN": {"shift": float("nan")}, "is slow": {"function": "slow"},
    "hangs": {"function": "hangs"}, "leaks memory": {"function": "leaks"}, "crashes on start": {"without": "gbdt.txt"},
    "answers with other scores": {"shift": 3.0},
}  # fmt: skip


@dataclass
class Course:
    """What was done when (monotonic seconds): changes of the champion, each with its begin, end, and who it was before and after;
    and when a challenger was on its way.
    """

    changes: list[tuple[float, float, str, str]] = field(default_factory=list)
    canaries: list[tuple[float, float, str]] = field(default_factory=list)

    def allowed(self, asked: Asked) -> set[str]:
        """Who may have answered a request."""
        found = {name for begin, end, name in self.canaries if asked.sent < end and asked.done > begin}
        after = [change for change in self.changes if change[1] <= asked.sent]
        found.add(after[-1][3] if after else self.changes[0][2])
        return found | {to for begin, end, _, to in self.changes if asked.sent < end and asked.done > begin}


def load(port: int, rate: float, users: int, up: Any, over: Any, path: Path) -> None:
    """Asks until told that it is over, and writes what was answered."""
    with Load(port, rate, users) as asking:
        up.set()
        over.wait()
    path.write_text("\n".join(json.dumps(asdict(a)) for a in asking.asked))


def is_hit(asked: Asked, bad: str) -> bool:
    """Whether a request came to feel a bad challenger."""
    return asked.lost or asked.release == bad or asked.done - asked.sent > 1


def of_bad(kind: str, begin: float, end: float, bad: str, why: str, asked: Sequence[Asked]) -> dict[str, Any]:
    """What a bad challenger cost."""
    meanwhile = [a for a in asked if begin <= a.sent <= end]
    hit = [a for a in meanwhile if is_hit(a, bad)]
    took = max(end, *(a.done for a in hit)) - hit[0].sent if hit else 0.0
    share = len({a.user for a in hit}) / len({a.user for a in meanwhile})
    return {"challenger": kind, "rollback_s": round(took, 2), "users_hit_share": round(share, 4), "requests": len(meanwhile),
            "hit": len(hit), "failed": sum(a.lost for a in hit), "why": why}  # fmt: skip


def main() -> None:
    """Measures and reports."""
    told = options("swap")
    folder = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    count, kinds = (2, list(BAD)[:1]) if told.quick else (10, list(BAD))
    course, times = Course(), {"promote": list[float](), "canary": list[float](), "rollback": list[float]()}
    try:
        buses = make_buses(folder)
        home = Home(buses.home.root)
        os.environ.update(process_env(home))
        spec = by_steps(buses.spec, **RULES)
        patient = by_steps(buses.spec, **RULES | {"step": "30s"})  # long enough that each is found at the first share
        good = [make_release(buses, shift=i / 10_000) for i in range(2 if told.quick else 5)]
        bad = {kind: make_release(buses, **BAD[kind]) for kind in kinds}
        promote(home, "buses", good[0], expected="", why="bench")
        service = serve_champion(home, spec, port=0, background=True)
        assert service is not None
        spawn = multiprocessing.get_context("spawn")
        up, over, path = spawn.Event(), spawn.Event(), folder / "asked.jsonl"
        asking = spawn.Process(target=load, args=(service.port, RATE, USERS, up, over, path))
        asking.start()
        assert up.wait(60)
        time.sleep(1)
        taken_back: list[str] = []
        spans: list[tuple[str, float, float, str, str]] = []

        def changed(kind: str, change: Any) -> None:
            """Makes a change, and notes when and from whom to whom."""
            before, begin = champion(home, "buses"), time.monotonic()
            found = change()
            after, end = champion(home, "buses"), time.monotonic()
            assert before and after
            if before == after:  # a good one that did not stay
                taken_back.append(found.why)
                print(f"{kind}: {found.why}", flush=True)
                return
            course.changes.append((begin, end, before.release, after.release))
            times[kind].append(end - begin)
            print(f"{kind:<9} {after.release}  {end - begin:5.1f} s", flush=True)
            time.sleep(1)

        while len(times["promote"]) + len(times["canary"]) < count:
            i = len(times["promote"]) + len(times["canary"]) + len(taken_back)
            release = good[(i + 1) % len(good)]
            if champion(home, "buses") == release:
                release = good[(i + 2) % len(good)]
            if i % 4 == 1:
                begin = time.monotonic()
                challenged_by(home, release)
                changed("canary", lambda: roll_out(home, spec, tell=lambda line: None))
                course.canaries.append((begin, time.monotonic(), release.release))
            else:
                changed("promote", lambda release=release: promote_now(home, "buses", release, why="bench"))
            if i % 2 and len(times["rollback"]) < len(times["promote"]):
                changed("rollback", lambda: roll_back(home, "buses", to=None, why="bench"))
        for kind, release in bad.items():
            begin = time.monotonic()
            challenged_by(home, release)
            found = roll_out(home, patient, tell=lambda line: None)
            end = time.monotonic()
            assert found.outcome == "retired", (kind, found)
            course.canaries.append((begin, end, release.release))
            spans.append((kind, begin, end, release.release, found.why))
            print(f"{kind}: {found.why} ({end - begin:.1f} s)", flush=True)
            time.sleep(1)
        over.set()
        asking.join()
        asked = [Asked(**json.loads(line)) for line in path.read_text().splitlines()]
    finally:
        stop_all(Home(folder / "home"), None)
        shutil.rmtree(folder, ignore_errors=True)
    seconds = max(a.sent for a in asked) - min(a.sent for a in asked)
    broke = [(begin, end) for _, begin, end, _, _ in spans]
    rows = [of_bad(kind, begin, end, name, why, asked) for kind, begin, end, name, why in spans]
    hurt = [any(begin <= a.sent <= end for begin, end in broke) for a in asked]
    fine = [a for a, one in zip(asked, hurt, strict=True) if not one]
    ms = np.array([(a.done - a.sent) * 1e3 for a in fine])
    figures = {
        "promotions": len(times["promote"]) + len(times["canary"]), "of_them_by_canary": len(times["canary"]),
        "good_ones_taken_back": len(taken_back), "rollbacks": len(times["rollback"]),
        "requests": len(asked), "rate_rps": round(len(asked) / seconds, 1),
        "lost_requests": sum(a.lost if not one else a.status == 0 for a, one in zip(asked, hurt, strict=True)),
        "wrong_version_answers": sum(a.status == 200 and a.release not in course.allowed(a) for a in asked),
        "p50_ms": round(float(np.percentile(ms, 50)), 1), "p99_ms": round(float(np.percentile(ms, 99)), 1),
        "promote_s": round(statistics.median(times["promote"]), 2), "rollback_s": round(statistics.median(times["rollback"]), 2),
        "canary_weight": WEIGHT, "bad_challengers": len(rows),
        "bad_challenger_rollback_s": round(float(np.percentile([r["rollback_s"] for r in rows], 95)), 2),
        "users_hit_share": max(r["users_hit_share"] for r in rows),
    }  # fmt: skip
    report("swap", figures, rows, told.json, "bentoml", "lightgbm", "numpy", "psutil")


if __name__ == "__main__":
    main()
