"""Tuning by generations: the same trials after a kill, for any number of workers, and pruning by complete ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from features.trainset import TrainingSet
from models import tune
from models.tune import Params, Trial, best, draw, search, tune_into
from pipelines.manifest import read_json
from pipelines.spec import Range, Spec
from tests.model.small import small_spec, write_small

SPACE = {
    "learning_rate": Range(low=0.0005, high=0.01, log=True),
    "network.width": Range(choices=(16, 32)),
    "network.depth": Range(low=1, high=3, integer=True),
}


def made_up(slot: int, generation: int, params: Params, before: list[Trial]) -> Trial:
    loss = abs(float(params["learning_rate"]) - 0.003) + int(params["network.depth"]) / 10
    return Trial(slot, generation, params, (loss + 0.1, loss), loss, pruned=False)


class Killed(BaseException):
    """As sudden as kill -9: nothing after it is written."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_small(folder, rows=2_000)
    return folder


def test_a_search_killed_anywhere_ends_in_the_same_trials(tmp_path: Path) -> None:
    spec = small_spec("tune.workers=1", "tune.generations=3")
    calm = search(spec, SPACE, tmp_path / "calm", made_up)
    assert [t.slot for t in calm] == list(range(9))
    for count in range(9):
        done = 0

        def evaluate(slot: int, generation: int, params: Params, before: list[Trial], last: int = count) -> Trial:
            nonlocal done
            if done == last:
                raise Killed
            done += 1
            return made_up(slot, generation, params, before)

        with pytest.raises(Killed):
            search(spec, SPACE, tmp_path / f"hit{count}", evaluate)
        assert search(spec, SPACE, tmp_path / f"hit{count}", made_up) == calm


def test_parameters_are_stored_before_a_trial_is_evaluated(tmp_path: Path) -> None:
    def evaluate(slot: int, generation: int, params: Params, before: list[Trial]) -> Trial:
        stored = read_json(tmp_path / f"generation-{generation:03d}.json")["params"]
        assert stored[str(slot)] == params and len(stored) == 3
        assert [t.slot for t in before] == list(range(3 * generation))
        return made_up(slot, generation, params, before)

    search(small_spec(), SPACE, tmp_path, evaluate)


def test_a_trial_is_a_function_of_seed_slot_and_complete_generations() -> None:
    spec = small_spec()
    before = [made_up(s, 0, draw(spec, SPACE, [], s), []) for s in range(3)]
    assert draw(spec, SPACE, before, 4) == draw(spec, SPACE, before, 4)
    assert draw(spec, SPACE, before, 4) != draw(spec, SPACE, before, 5)
    assert draw(spec, SPACE, before, 4) != draw(small_spec("seed=8"), SPACE, before, 4)
    drawn = [draw(spec, SPACE, before, s) for s in range(3, 30)]
    assert {p["network.width"] for p in drawn} <= {16, 32} and {p["network.depth"] for p in drawn} <= {1, 2, 3}


def test_ties_go_to_the_lower_slot_and_pruned_trials_do_not_win() -> None:
    trials = [
        Trial(0, 0, {}, (0.1,), 0.1, pruned=True),
        Trial(1, 0, {}, (0.3,), 0.3, pruned=False),
        Trial(2, 0, {}, (0.3,), 0.3, pruned=False),
        Trial(3, 0, {}, (), None, pruned=False),
    ]
    assert best(trials).slot == 1


def test_limits_are_medians_of_complete_generations() -> None:
    before = [Trial(i, 0, {}, (0.5 + i / 10, 0.4 + i / 10), 0.4, pruned=False) for i in range(3)]
    assert tune._limits(small_spec(), before) == pytest.approx((0.6, 0.5))
    assert tune._limits(small_spec(), []) == ()
    assert tune._limits(small_spec("tune.pruner=none"), before) == ()


def outputs(spec: Spec, data: Path, study: Path, out: Path) -> dict[str, Any]:
    tune_into(spec, data, study, out)
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


NETWORK = (
    "tune.space={learning_rate: {low: 0.0005, high: 0.05, log: true}, network.width: {choices: [8, 16]}}",
    "tune.gbdt_space={num_leaves: {low: 3, high: 15, integer: true}, lambda_l2: {low: 0.001, high: 10, log: true}}",
)


def test_real_trials_do_not_depend_on_workers_or_on_a_kill(data: Path, tmp_path: Path) -> None:
    calm = outputs(small_spec(*NETWORK, "tune.workers=1"), data, tmp_path / "s1", tmp_path / "o1")
    assert set(calm) == {"best.json", "trials.json", "page.md"}
    assert outputs(small_spec(*NETWORK, "tune.workers=3"), data, tmp_path / "s3", tmp_path / "o3") == calm
    # as if killed in the second generation: one trial finished, one only begun, the third not
    study = tmp_path / "s1" / "network"
    for slot in (4, 5):
        (study / f"trial-{slot:04d}.json").unlink()
    (study / "slot-0004" / "result.json").unlink()
    shutil.rmtree(study / "slot-0005")
    assert outputs(small_spec(*NETWORK), data, tmp_path / "s1", tmp_path / "o2") == calm
    trials = json.loads(calm["trials.json"])["trials"]
    assert {t["study"] for t in trials} == {"network", "gbdt_tuned"} and len(trials) == 12
    networks = [t for t in trials if t["study"] == "network"]
    limit = sorted(t["curve"][0] for t in networks[:3])[1]
    assert [t["pruned"] for t in networks[3:]] == [t["curve"][0] > limit for t in networks[3:]]


def test_the_study_opens_in_optuna(data: Path, tmp_path: Path) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    trials = search(small_spec(), SPACE, tmp_path, made_up)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "optuna.journal")))
    study = optuna.load_study(study_name="tumours", storage=storage)
    assert [t.user_attrs["slot"] for t in study.trials] == [t.slot for t in trials]
    assert study.best_trial.params == best(trials).params


def test_trials_see_the_newest_rows(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def count(params: object, batch: Any, label: Any, part: Any, seed: int, **more: object) -> Any:
        seen.append(int((part == 0).sum()))
        raise Killed

    monkeypatch.setattr(tune, "fit_gbdt", count)
    loaded: TrainingSet = tune.load_training_set(data)
    with pytest.raises(Killed):
        tune.tune_gbdt(small_spec(*NETWORK, "tune.rows=100", "tune.workers=1"), loaded, tmp_path)
    assert seen == [100]
