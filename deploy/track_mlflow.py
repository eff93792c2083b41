"""MLflow: runs, artefacts, system metrics, and releases as versions of a model. The only importer of mlflow.

The truth about releases is the home's log; the alias `champion` of the registered model `millrace_PIPELINE` mirrors it.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from deploy.follower import Ended, Point, Subject
from deploy.tracking import ANSWER_S, tracking_uri
from pipelines.clock import wall_us
from pipelines.home import Home
from pipelines.manifest import read_json

CHAMPION = "champion"
SAMPLE_S = 5.0  # between two looks at CPU, memory, disk, network and GPU of the machine
BATCH, LONGEST = 100, 5_000  # params in a request, characters in a value


def open_tracker(home: Home, subject: Subject) -> "_Flow":
    return _Flow(home, subject)


class _Flow:
    def __init__(self, home: Home, subject: Subject) -> None:
        self.home, self.pipeline, self.uri = home, subject.pipeline, tracking_uri(home)
        self.client = _client(home)
        experiment = self._experiment()
        tags = {**subject.tags, "millrace.run_id": subject.run_id, "mlflow.note.content": subject.title,
                "mlflow.source.name": f"millrace run {subject.pipeline}"}  # fmt: skip
        found = self.client.search_runs([experiment], f"tags.`millrace.run_id` = '{subject.run_id}'", max_results=1)
        run = found[0] if found else self.client.create_run(experiment, run_name=subject.run_id, tags=tags)
        self.id, self.artifacts = run.info.run_id, run.info.artifact_uri
        self.client.update_run(self.id, status="RUNNING")
        self.params = set(run.data.params)
        self.steps = {name: self.client.get_metric_history(self.id, name)[-1].step
                      for name in run.data.metrics if not name.startswith("system/")}  # fmt: skip
        self._tell_params(subject.params)
        self.monitor = SystemMetricsMonitor(self.id, sampling_interval=SAMPLE_S, resume_logging=True, tracking_uri=self.uri)
        self.monitor.start()

    def _experiment(self) -> str:
        """The experiment of the pipeline. In the home its artefacts lie beside the database."""
        folder = self.home.root / "mlflow" / "artifacts" / self.pipeline
        where = folder.as_uri() if self.uri.startswith("sqlite") else None
        known = self.client.get_experiment_by_name(self.pipeline)
        if known is not None and where and known.artifact_location != where:
            self._home_was_moved(known.artifact_location, where)
        if known is None:
            try:
                return str(self.client.create_experiment(self.pipeline, artifact_location=where))
            except MlflowException:  # another run was quicker
                known = self.client.get_experiment_by_name(self.pipeline)
                if known is None:
                    raise
        return str(known.experiment_id)

    def _home_was_moved(self, old: str, new: str) -> None:
        """MLflow keeps absolute paths: those below `old` are below `new` from now on."""
        with closing(sqlite3.connect(self.uri.removeprefix("sqlite:///"), timeout=ANSWER_S)) as db, db:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source"),
                                  ("model_versions", "storage_location")):  # fmt: skip
                db.execute(f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} LIKE ? || '%'",
                           (new, len(old) + 1, old))  # fmt: skip

    def _tell_params(self, params: Mapping[str, Any]) -> None:
        new = [Param(name, str(value)[:LONGEST]) for name, value in params.items() if name not in self.params]
        for i in range(0, len(new), BATCH):
            self.client.log_batch(self.id, params=new[i : i + BATCH])
        self.params |= {param.key for param in new}

    def _tell_metrics(self, values: Iterator[tuple[str, int, float]]) -> None:
        now = wall_us() // 1_000
        new = [Metric(name, value, now, step) for name, step, value in values if step > self.steps.get(name, -1)]
        for i in range(0, len(new), 10 * BATCH):
            self.client.log_batch(self.id, metrics=new[i : i + 10 * BATCH])
        for metric in new:
            self.steps[metric.key] = metric.step

    def points(self, points: Sequence[Point]) -> None:
        self._tell_metrics((f"{p.curve}/{name}", p.step, value) for p in points for name, value in p.values.items())

    def end(self, ended: Ended) -> None:
        self.monitor.finish()
        self.monitor.collect_metrics()  # so that a short run has a figure too
        self.monitor.publish_metrics(self.monitor.aggregate_metrics())
        self.monitor.mlflow_logger.flush()
        self._tell_params(ended.params)
        self._tell_metrics((name, 0, value) for name, value in ended.metrics.items())
        self.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in ended.tags.items()])
        for folder, files in (("", ended.files), ("model", ended.model)):
            for path in files:
                self.client.log_artifact(self.id, str(path), folder or None)
        if ended.released:
            self._release(ended)
        self.client.set_terminated(self.id, "FINISHED")
        _move_alias(self.client, self.home, self.pipeline)

    def _release(self, ended: Ended) -> None:
        name = _model(self.pipeline)
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if ended.released not in _versions(self.client, name):
            tags = {"release": ended.released, **ended.tags}
            self.client.create_model_version(name, f"{self.artifacts}/model", self.id, tags=tags, description=ended.released)

    def broken_off(self) -> None:
        self.monitor.finish()
        self.client.set_terminated(self.id, "KILLED")


def mirror(home: Home, pipeline: str) -> None:
    """The alias follows the champion, where MLflow knows the model."""
    _move_alias(_client(home), home, pipeline)


def _client(home: Home) -> MlflowClient:
    (home.root / "mlflow").mkdir(exist_ok=True)
    return MlflowClient(tracking_uri(home))


def _model(pipeline: str) -> str:
    return f"millrace_{pipeline}"


def _versions(client: MlflowClient, name: str) -> dict[str, ModelVersion]:
    """Release → version."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return {v.tags["release"]: v for v in found if "release" in v.tags}


def _move_alias(client: MlflowClient, home: Home, pipeline: str) -> None:
    """No version is called champion while the champion is a release that MLflow was not told of."""
    name, pointer = _model(pipeline), home.releases(pipeline) / "champion.json"
    versions = _versions(client, name)
    if not versions or not pointer.is_file():
        return
    release = read_json(pointer)["release"]
    if release in versions:
        client.set_registered_model_alias(name, CHAMPION, versions[release].version)
    else:
        client.delete_registered_model_alias(name, CHAMPION)
