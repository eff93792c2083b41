"""From what landed to what serves: the whole story of a run."""

from prefect import flow

from deploy.record import Outcome
from tasks.autofe import autofe
from tasks.contract import contract
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.features import features
from tasks.ingest import ingest
from tasks.package import package
from tasks.policy import refusals
from tasks.preflight import preflight
from tasks.record import record
from tasks.release import release
from tasks.train import train
from tasks.training_set import training_set
from tasks.tune import tune
from tasks.unchanged import unchanged


@flow(name="retrain", flow_run_name="retrain {pipeline}", persist_result=False)
@refusals
def retrain(pipeline: str, as_of: str | None = None, overrides: list[str] | None = None) -> Outcome:
    """Takes in what landed, trains a challenger, and releases it if it is better and serves what it was trained on."""
    run = ingest(pipeline, as_of, overrides)
    if run.unchanged:
        return unchanged(run)
    checked = contract(run)
    if run.auto:
        run = autofe(run, checked)
    store = features(run, checked)
    data = training_set(run, store)
    study = tune(run, data)
    model = train(run, data, study)
    verdict = evaluate(run, data, model)
    form = export(run, data, study, model) if verdict.ok else None
    bento = package(run, model, form, verdict, store) if form else None
    flight = preflight(run, bento, data, store) if bento else None
    released = release(run, store, verdict, bento, flight)
    return record(run, checked, store, data, study, model, verdict, form, bento, flight, released)
