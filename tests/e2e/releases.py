"""Releases of the buses, good and bad, made by the real builder; and an open-loop load that notes who answered what."""

import asyncio
import json
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.bundle import build_bento
from deploy.rollout import Release, challenge, champion
from features.feed import feed
from features.store import build_features, defs_digest
from pipelines.clock import MISSING, Anchor
from pipelines.home import Home
from pipelines.manifest import read_json, write_json
from pipelines.spec import Rollout, Spec
from tests.e2e.buses import EVERY, NOW, Buses, trip_at
from tests.e2e.raw_http import received, request

MODEL = ("model.json", "gbdt.txt", "preprocess.json")


def make_release(
    buses: Buses, *, shift: float = 0.0, function: str = "", without: str = "", spec: Spec | None = None
) -> Release:  # fmt: skip
    """A release of the buses: another calibration, another function, a file that is missing, or other features."""
    model, defs, made = buses.home.root.parent / "model", buses.features.defs_digest, spec or buses.spec
    if spec is not None:
        features = build_features(spec, buses.home, buses.snapshot)
        defs, store = features.defs_digest, buses.home.online("buses", defs_digest(spec))
        anchor = Anchor(buses.snapshot.watermark_us, 0)
        feed(spec, buses.home.root / features.path, store, anchor, buses.snapshot.digest)
    if function:
        (call,) = made.features.functions
        changed = call.model_copy(update={"call": f"tests.e2e.challengers:{function}"})
        made = made.model_copy(update={"features": made.features.model_copy(update={"functions": (changed,)})})
    with tempfile.TemporaryDirectory(dir=buses.home.root) as scratch:
        given, out = Path(scratch) / "model", Path(scratch) / "bento"
        given.mkdir()
        out.mkdir()
        body = read_json(model / "model.json")
        body["members"][0]["b"] = shift
        for name in MODEL[1:]:
            (given / name).write_bytes((model / name).read_bytes())
        write_json(given / "model.json", {k: v for k, v in body.items() if k != "format_version"})
        bento = build_bento(made, buses.home, [given / name for name in MODEL if name != without], defs, out)
    at = buses.snapshot.watermark_us
    return Release(bento.tag, bento.path, "made", buses.snapshot.digest, at, defs, "", ("better",), MISSING)


def challenged_by(home: Home, release: Release) -> Release:
    """The release, which is to replace the champion by steps."""
    now = champion(home, "buses")
    challenge(home, "buses", release, expected=now.release if now else "", why="test")
    return release


def by_steps(spec: Spec, **rules: Any) -> Spec:
    """The spec with a rollout."""
    return spec.model_copy(update={"serve": spec.serve.model_copy(update={"rollout": Rollout(**rules)})})


@dataclass(frozen=True)
class Asked:
    """A request: when it was sent and answered (monotonic seconds), by which release, for which user. Status 0: no answer."""

    sent: float
    done: float
    status: int
    release: str
    user: int

    @property
    def lost(self) -> bool:
        return self.status == 0 or self.status >= 500


@dataclass
class Load:
    """Asks at a fixed rate, whether answers come or not, over connections that are kept open; one row a user."""

    port: int
    rate: float
    users: int = 200
    asked: list[Asked] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._over, self._idle = threading.Event(), []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    async def _run(self) -> None:
        draw, began, count, waiting = random.Random(7), time.monotonic(), 0, set()
        while not self._over.is_set():
            count += 1
            task = asyncio.create_task(self._ask(draw.randrange(self.users)))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
            await asyncio.sleep(max(0.0, began + count / self.rate - time.monotonic()))
        await asyncio.gather(*waiting)
        for _, writer, _ in self._idle:
            writer.close()

    async def _ask(self, user: int) -> None:
        body = {"rows": [trip_at(NOW + (1 + user % 200) * EVERY)]}
        sent, status, release = time.monotonic(), 0, ""
        try:
            while self._idle and self._idle[0][2] < sent - 60:  # as clients do, before the other side closes it
                self._idle.pop(0)[1].close()
            reader, writer = self._idle.pop()[:2] if self._idle else await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(request(body))
            status, answer, told = await asyncio.wait_for(received(reader), 40)
            release = json.loads(told)["release"] if status == 200 else ""
            if "connection: close" in answer:
                writer.close()
            else:
                self._idle.append((reader, writer, time.monotonic()))
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            self.errors.append(repr(error))
        self.asked.append(Asked(sent, time.monotonic(), status, release, user))
