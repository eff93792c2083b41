"""Weights & Biases, offline: nothing leaves the home, `wandb sync` uploads by hand. The only importer of wandb."""

import os
import shutil
from collections.abc import Sequence

import wandb

from deploy.follower import Ended, Point, Subject
from pipelines.home import Home


class _Biases:
    def __init__(self, home: Home, subject: Subject) -> None:
        root = home.root / "wandb"
        for left in (root / "wandb").glob(f"offline-run-*-{subject.run_id}"):
            shutil.rmtree(left)  # of a try before: everything is written again
        for name in ("cache", "config", "data"):
            os.environ[f"WANDB_{name.upper()}_DIR"] = str(root / name)
            (root / name).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(mode="offline", console="off", save_code=False, disable_git=True, silent=True)
        self.run = wandb.init(
            dir=str(root), project=f"millrace_{subject.pipeline}", id=subject.run_id, name=subject.run_id, notes=subject.title,
            config={**subject.params, **subject.tags}, mode="offline", settings=settings,
        )  # fmt: skip
        self.known: set[str] = set()

    def points(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.curve not in self.known:
                self.run.define_metric(f"{point.curve}/*", step_metric=f"{point.curve}/step")
                self.known.add(point.curve)
            values = {f"{point.curve}/{name}": value for name, value in point.values.items()}
            self.run.log({**values, f"{point.curve}/step": point.step})

    def end(self, ended: Ended) -> None:
        self.run.config.update({**ended.params, **ended.tags}, allow_val_change=True)
        self.run.summary.update(dict(ended.metrics))
        self.run.finish(exit_code=0)

    def broken_off(self) -> None:
        self.run.finish(exit_code=1)


def open_tracker(home: Home, subject: Subject) -> _Biases:
    return _Biases(home, subject)
