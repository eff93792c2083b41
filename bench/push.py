"""`python -m bench.push`: events pushed to the admin port of a year of flights, 600 a second, until they are served.

Every tenth of a second sixty departures and arrivals are sent, whether or not those before were answered; halfway the admin
process is killed with -9, started again, and what was not answered is sent again. An answer means that the events are served.

Figures: `sent`, `events_per_s` (answered, without the time of the restart), `latency_p50_s`, `latency_p99_s`, `latency_max_s`
(from when a request was due until its answer, again without the restart), `restart_s`, and `counted_once`: the store holds
every event sent, once.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bench.record import options, report
from bench.skew import BEGIN, FULL, QUICK, World
from deploy.process import call, free_port
from features.cells import open_cells
from features.facts import int_times
from pipelines.clock import DAY_US, iso, wall_us
from pipelines.home import process_env

RATE, EVERY_S = 600, 0.1


def events_of(world: World, count: int) -> list[dict[str, Any]]:
    """Departures and arrivals of the day after; beyond what one day has, again, known a little later."""
    rows = []
    for name in ("departures", "arrivals"):
        table, columns = world.facts[name], world.spec.sources[name].columns
        known = int_times(table["known_at"])
        some = table.filter(pa.array((known > BEGIN) & (known <= BEGIN + DAY_US - 1_000))).select([*columns])
        rows += [(name, row) for row in some.to_pylist()]
    found = []
    for i in range(count):
        name, row = rows[i % len(rows)]
        told = {c: iso(int(v.timestamp() * 1e6)) if hasattr(v, "timestamp") else v for c, v in row.items()}
        told["known_at"] = iso(round(row["known_at"].timestamp() * 1e6) + i // len(rows))
        found.append({"id": str(i), "source": name, "row": told})
    return found


class Admin:
    """The admin process of a world's store, a day after its facts end."""

    def __init__(self, world: World, store: Path) -> None:
        self.world, self.store, self.port = world, store, free_port()

    def start(self) -> None:
        env = {**os.environ, **process_env(self.world.home), "MILLRACE_CLOCK_OFFSET_US": str(DAY_US)}
        command = [sys.executable, "-m", "deploy.admin", self.world.spec.pipeline, str(self.store), str(self.port)]
        self.process = subprocess.Popen(command, env=env)
        while True:
            try:
                call(f"http://127.0.0.1:{self.port}/readyz")
                return
            except OSError:
                time.sleep(0.05)

    def push(self, events: list[dict[str, Any]]) -> bool:
        try:
            status, answer = call(f"http://127.0.0.1:{self.port}/push", {"events": events}, timeout=60)
        except (OSError, ValueError):
            return False
        if status != 200:
            raise SystemExit(f"answered {status}: {json.dumps(answer)}")
        return True


def sent(admin: Admin, batches: list[list[dict[str, Any]]]) -> tuple[list[float], list[list[dict[str, Any]]]]:
    """Seconds until each batch was answered, and the batches that were not."""
    took: list[float] = []
    lost: list[list[dict[str, Any]]] = []
    began = time.monotonic()

    def send(batch: list[dict[str, Any]], due: float) -> None:
        (took.append(time.monotonic() - due) if admin.push(batch) else lost.append(batch))

    threads = []
    for i, batch in enumerate(batches):
        due = began + i * EVERY_S
        time.sleep(max(0.0, due - time.monotonic()))
        threads.append(threading.Thread(target=send, args=(batch, due)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return took, lost


def main() -> None:
    """Measures and reports."""
    told = options("push")
    size, seconds = (QUICK, 4) if told.quick else (replace(FULL, days=365), 40)
    root = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    try:
        world = World(root, size)
        world.move(BEGIN + 1, wall_us())
        store = world.home.online(world.spec.pipeline, world.release.defs_digest)
        events = events_of(world, seconds * RATE)
        batches = [events[i : i + int(RATE * EVERY_S)] for i in range(0, len(events), int(RATE * EVERY_S))]
        admin = Admin(world, store)
        admin.start()
        admin.push(events[:1])  # it reads the facts of the snapshot once
        half, tenth = len(batches) // 2, len(batches) // 10
        began = time.monotonic()
        took, lost = sent(admin, batches[:half])
        answered_s = time.monotonic() - began
        if lost:
            raise SystemExit(f"{len(lost)} requests were lost before anything was killed")
        threading.Timer(tenth * EVERY_S / 2, admin.process.kill).start()
        _, lost = sent(admin, batches[half : half + tenth])
        began = time.monotonic()
        admin.start()
        for batch in lost:
            admin.push(batch)
        restart_s = time.monotonic() - began
        began = time.monotonic()
        more, lost_again = sent(admin, batches[half + tenth :])
        answered_s += time.monotonic() - began
        if lost_again:
            raise SystemExit(f"{len(lost_again)} requests were lost though nothing was killed")
        took += more
        held = [event.id for event in open_cells(store).events()]
        admin.process.kill()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    figures = {
        "sent": len(events), "events_per_s": round(len(took) * RATE * EVERY_S / answered_s, 1),
        "latency_p50_s": round(float(np.median(took)), 3), "latency_p99_s": round(float(np.percentile(took, 99)), 3),
        "latency_max_s": round(max(took), 3), "restart_s": round(restart_s, 2), "unanswered_at_kill": len(lost),
        "counted_once": sorted(held, key=int) == [event["id"] for event in events],
    }  # fmt: skip
    report("push", figures, [], told.json)


if __name__ == "__main__":
    main()
