"""TensorBoard: event files in the home, `tensorboard/PIPELINE/RUN_ID`. The only importer of tensorboard; needs no TensorFlow."""

import shutil
from collections.abc import Mapping, Sequence

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from deploy.follower import Ended, Point, Subject
from pipelines.clock import wall_us
from pipelines.home import Home


class _Board:
    def __init__(self, home: Home, subject: Subject) -> None:
        folder = home.root / "tensorboard" / subject.pipeline / subject.run_id
        shutil.rmtree(folder, ignore_errors=True)  # of a try before: everything is written again
        folder.mkdir(parents=True)
        self.params = dict(subject.params)
        self.writer = EventFileWriter(str(folder))

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(summary, step)

    def _add(self, summary: Summary, step: int = 0) -> None:
        self.writer.add_event(Event(step=step, wall_time=wall_us() / 1e6, summary=summary))

    def points(self, points: Sequence[Point]) -> None:
        for point in points:
            self._scalars(point.step, {f"{point.curve}/{name}": value for name, value in point.values.items()})
        self.writer.flush()

    def end(self, ended: Ended) -> None:
        params = {**self.params, **ended.params}
        self._add(hparams_pb({k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in params.items()}))
        self._scalars(0, ended.metrics)
        self.writer.close()

    def broken_off(self) -> None:
        self.writer.close()


def open_tracker(home: Home, subject: Subject) -> _Board:
    return _Board(home, subject)
