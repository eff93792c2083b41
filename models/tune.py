"""Hyper-parameter search by Optuna, in generations that do not depend on the number of workers.

A slot number is a trial's name. The parameters of all slots of a generation are drawn and stored before any is
evaluated, each by a sampler seeded by (seed, slot) over a study rebuilt from the complete generations in slot order;
pruning compares with complete generations only. So a killed search draws the same trials again and keeps those that
were finished. The files of a study are the truth; an Optuna journal is written from them for its dashboard.
"""

import hashlib
import shutil
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from features.trainset import TrainingSet, load_training_set
from models.arrays import write_arrays
from models.elastic import launch, start_zygote
from models.gbdt import default_threads, fit_gbdt
from models.job import Job, Progress
from pipelines.home import give_back_memory
from pipelines.manifest import Note, read_json, write_json, write_page
from pipelines.spec import Range, Spec, Train

Params = dict[str, float | int | str]


@dataclass(frozen=True)
class Trial:
    """One evaluated slot: its parameters, and log loss on valid_fit by epoch (or boosting round, thinned)."""

    slot: int
    generation: int
    params: Params
    curve: tuple[float, ...]
    log_loss: float | None
    pruned: bool


def tune_into(spec: Spec, data_folder: Path, study: Path, out: Path, *, progress: Progress | None = None) -> Note:
    """The stage: searches the network's space and LightGBM's; writes `best.json`, `trials.json` and a page."""
    if spec.tune.space:
        start_zygote()  # it imports while the rows are read
    found = {"network": tune_network(spec, data_folder, study / "network", progress)} if spec.tune.space else {}
    if spec.tune.gbdt_space:
        found["gbdt_tuned"] = tune_gbdt(spec, load_training_set(data_folder), study / "gbdt_tuned", progress)
    bests = {kind: best(trials) for kind, trials in found.items()}
    write_json(out / "best.json", {k: {"slot": b.slot, "params": b.params} for k, b in bests.items()})
    write_json(out / "trials.json", {"trials": [
        {"study": kind, "state": "pruned" if t.pruned else "complete" if t.log_loss is not None else "failed",
         "value": t.log_loss, **asdict(t)}
        for kind, trials in found.items() for t in trials
    ]})  # fmt: skip
    rows = [("model", "slot", "log loss", "parameters")]
    rows += [
        (k, str(t.slot), "pruned" if t.pruned else f"{t.log_loss:.5f}" if t.log_loss is not None else "failed",
         ", ".join(f"{n} {_short(v)}" for n, v in t.params.items()))
        for k, trials in found.items() for t in trials
    ]  # fmt: skip
    write_page(out / "page.md", f"{spec.pipeline}: trials", [("Trials", rows)])
    count = sum(len(trials) for trials in found.values())
    pruned = sum(t.pruned for trials in found.values() for t in trials)
    best_text = "; ".join(f"{k} {b.log_loss:.4f} (slot {b.slot})" for k, b in bests.items() if b.log_loss is not None)
    if not found:
        return Note("nothing to search: neither tune.space nor tune.gbdt_space names a parameter")
    return Note(f"{count} trials in {spec.tune.generations} generations, {pruned} pruned; best log loss {best_text}")


def best(trials: list[Trial]) -> Trial:
    """The trial of least log loss; of equal ones the lower slot. Pruned ones do not count while another is left."""
    usable = [t for t in trials if t.log_loss is not None and not t.pruned] or trials
    return min(usable, key=lambda t: (t.log_loss if t.log_loss is not None else float("inf"), t.slot))


def tune_network(spec: Spec, data_folder: Path, study: Path, progress: Progress | None = None) -> list[Trial]:
    """Trials of the network on the newest `tune.rows` training rows, `tune.workers` at a time."""
    arrays, zygote = write_arrays(load_training_set(data_folder), study / "arrays", spec.train, spec.tune.rows), start_zygote()
    give_back_memory()  # only the ranks need the rows from here on
    train = spec.training.model_copy(update={"profile": False, "power": spec.train.power.share(spec.tune.workers)})

    def evaluate(slot: int, generation: int, params: Params, before: list[Trial]) -> Trial:
        folder = study / f"slot-{slot:04d}"
        job = Job(str(arrays), apply(train, params), spec.seed + slot, spec.tune.max_epochs, spec.tune.rows,
                  _limits(spec, before), export=False)  # fmt: skip
        job.prepare(folder)
        result = launch(folder, ranks=1, max_restarts=spec.train.max_restarts, zygote=zygote,
                        hang_s=spec.train.hang_after / 1e6).result  # fmt: skip
        curve = tuple(e.log_loss for e in result.curve if e.log_loss is not None)
        return Trial(slot, generation, params, curve, result.log_loss, result.pruned)

    trials = search(spec, spec.tune.space, study, evaluate, progress)
    shutil.rmtree(arrays)  # made again in a second, and large
    return trials


def _limits(spec: Spec, before: list[Trial]) -> tuple[float | None, ...]:
    """Median log loss of the complete generations at each epoch, above which a trial is given up."""
    if spec.tune.pruner == "none" or not before:
        return ()
    reached = [[t.curve[e] for t in before if len(t.curve) > e] for e in range(spec.tune.max_epochs)]
    return tuple(statistics.median(losses) if losses else None for losses in reached)


def tune_gbdt(spec: Spec, data: TrainingSet, study: Path, progress: Progress | None = None) -> list[Trial]:
    """Trials of LightGBM on the newest `tune.rows` training rows."""
    train, valid = data.rows("train")[-spec.tune.rows :], data.rows("valid_fit")
    rows = np.concatenate([train, valid])
    batch, label, part = data.batch.take(rows), data.label[rows], data.part[rows]
    threads = max(1, default_threads() // spec.tune.workers)

    def evaluate(slot: int, generation: int, params: Params, before: list[Trial]) -> Trial:
        trees = fit_gbdt(spec.gbdt, batch, label, part, spec.seed, extra=params, threads=threads)
        thinned = trees.curve[:: max(1, len(trees.curve) // 50)]
        return Trial(slot, generation, params, thinned, trees.log_loss, pruned=False)

    return search(spec, spec.tune.gbdt_space, study, evaluate, progress)


Evaluate = Callable[[int, int, Params, list[Trial]], Trial]


def search(
    spec: Spec, space: Mapping[str, Range], study: Path, evaluate: Evaluate, progress: Progress | None = None
) -> list[Trial]:
    """All trials in slot order. What is stored in `study` from an earlier try is used as it is."""
    trials: list[Trial] = []
    size, total = spec.tune.size, spec.tune.size * spec.tune.generations
    for generation in range(spec.tune.generations):
        slots = range(generation * size, (generation + 1) * size)
        params = _drawn(spec, space, study, generation, slots, trials)
        found = {slot: trial for slot in slots if (trial := _stored(study, slot)) is not None}
        with ThreadPoolExecutor(spec.tune.workers, "trial") as pool:
            running = [pool.submit(evaluate, slot, generation, params[slot], trials) for slot in slots if slot not in found]
            try:
                for future in as_completed(running):
                    trial = future.result()
                    write_json(study / f"trial-{trial.slot:04d}.json", asdict(trial))
                    found[trial.slot] = trial
                    if progress is not None:
                        progress((len(trials) + len(found)) / total, f"{study.name}: {len(trials) + len(found)} trials")
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error the slots in line are not begun
        trials = trials + [found[slot] for slot in slots]
    _journal(spec, space, trials, study)
    return trials


def _drawn(
    spec: Spec, space: Mapping[str, Range], study: Path, generation: int, slots: range, before: list[Trial]
) -> dict[int, Params]:
    """The parameters of a generation, stored before any of its slots is evaluated."""
    path = study / f"generation-{generation:03d}.json"
    if not path.exists():
        write_json(path, {"params": {str(slot): draw(spec, space, before, slot) for slot in slots}})
    return {int(slot): params for slot, params in read_json(path)["params"].items()}


def _stored(study: Path, slot: int) -> Trial | None:
    path = study / f"trial-{slot:04d}.json"
    if not path.exists():
        return None
    body = read_json(path)
    del body["format_version"]
    return Trial(**{**body, "curve": tuple(body["curve"])})


def draw(spec: Spec, space: Mapping[str, Range], before: list[Trial], slot: int) -> Params:
    """The parameters of a slot: what a TPE seeded by (seed, slot) asks for, knowing the complete generations."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int.from_bytes(hashlib.sha256(f"{spec.seed}/{slot}".encode()).digest()[:4], "big")
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=False, n_startup_trials=spec.tune.size)
    study = optuna.create_study(sampler=sampler)
    distributions = {name: _distribution(r) for name, r in space.items()}
    study.add_trials([_frozen(t, distributions) for t in before])
    return dict(study.ask(distributions).params)


def _distribution(wanted: Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if wanted.choices is not None:
        return CategoricalDistribution(wanted.choices)
    assert wanted.low is not None and wanted.high is not None
    if wanted.integer:
        return IntDistribution(int(wanted.low), int(wanted.high), log=wanted.log)
    return FloatDistribution(wanted.low, wanted.high, log=wanted.log)


def _frozen(trial: Trial, distributions: Mapping[str, Any]) -> Any:
    import optuna

    failed = trial.log_loss is None
    state = optuna.trial.TrialState.PRUNED if trial.pruned or failed else optuna.trial.TrialState.COMPLETE
    return optuna.trial.create_trial(
        state=state, params=dict(trial.params), distributions=dict(distributions),
        value=None if failed else trial.log_loss, user_attrs={"slot": trial.slot, "generation": trial.generation},
        intermediate_values=dict(enumerate(trial.curve)),
    )  # fmt: skip


def _journal(spec: Spec, space: Mapping[str, Range], trials: list[Trial], study: Path) -> None:
    """Writes the study once more as an Optuna journal, for optuna-dashboard."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    scratch, path = study / ".optuna.journal", study / "optuna.journal"
    scratch.unlink(missing_ok=True)
    stored = optuna.create_study(study_name=spec.pipeline, storage=JournalStorage(JournalFileBackend(str(scratch))))
    distributions = {name: _distribution(r) for name, r in space.items()}
    for trial in trials:
        stored.add_trial(_frozen(trial, distributions))
    scratch.replace(path)


def apply(train: Train, params: Mapping[str, Any]) -> Train:
    """The training settings with parameters set: `name` or `network.name`."""
    body = train.model_dump(mode="json")
    for name, value in params.items():
        section, _, field = name.rpartition(".")
        (body[section] if section else body)[field] = value
    return Train.model_validate(body)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
