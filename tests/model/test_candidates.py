"""What training leaves: LightGBM, the exported network, the choice; scoring gives what training computed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from features.trainset import TrainingSet, load_training_set
from models import candidate
from models.calibrate import sigmoid
from models.candidate import train_candidates, world
from models.data import Resident
from models.evaluate import auc
from models.export import export_onnx
from models.gbdt import fit_gbdt, importance
from models.net import build_net
from models.score import Model, NetworkScorer
from models.tune import apply
from pipelines.errors import MillraceError, UsageError
from pipelines.manifest import file_digest, read_json, write_json
from pipelines.spec import Network, Train
from tests.model.small import small_spec, write_small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    write_small(made)
    return made


@pytest.fixture(scope="module")
def data(folder: Path) -> TrainingSet:
    return load_training_set(folder)


Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trains into a folder of the given name, once."""
    root = tmp_path_factory.mktemp("trained")

    def make(name: str) -> Path:
        out = root / name
        if not out.exists():
            study = root / f"{name}-study"
            best = {"network": {"slot": 1, "params": {"network.width": 24}}}
            best["gbdt_tuned"] = {"slot": 0, "params": {"num_leaves": 5, "lambda_l2": 1.0}}
            write_json(study / "best.json", best)
            out.mkdir()
            note = train_candidates(small_spec(), folder, study, root / f"{name}-work", out)
            assert "chosen: " in note.line
        return out

    return make


def test_what_training_used_is_told_beside_what_is_digested(trained: Trained) -> None:
    stats = read_json(trained("one") / "volatile" / "stats.json")
    assert stats["ranks"] == 1 and stats["restarts"] == [] and stats["usage"]["joules"] > 0
    assert {"split", "rows_per_s", "mfu", "busy_share", "grams", "estimated", "joules_per_loss"} < set(stats["usage"])


def test_lightgbm_is_the_same_for_any_threads_and_differs_by_seed(data: TrainingSet) -> None:
    spec = small_spec().gbdt.model_copy(update={"feature_fraction": 0.5})

    def fit(seed: int, threads: int) -> tuple[str, tuple[float, ...]]:
        found = fit_gbdt(spec, data.batch, data.label, data.part, seed, threads=threads)
        return found.text, found.curve

    assert fit(7, 1) == fit(7, 1) == fit(7, 2)
    assert fit(7, 1)[0] != fit(8, 1)[0]


def test_lightgbm_stops_early_and_reads_categories(data: TrainingSet) -> None:
    heard: list[tuple[int, float]] = []
    params = small_spec().gbdt.model_copy(update={"max_rounds": 400, "learning_rate": 0.4})
    found = fit_gbdt(params, data.batch, data.label, data.part, 7, progress=lambda r, v: heard.append((r, v)))
    assert found.rounds < len(found.curve) <= found.rounds + params.patience < 400
    assert found.log_loss == min(found.curve)
    assert len(heard) == len(found.curve)
    booster = lgb.Booster(model_str=found.text)
    assert booster.num_trees() == found.rounds
    assert "num_cat=0" not in found.text.replace("num_cat=0\n", "", 1) or "cat_threshold" in found.text
    weight = importance(found.text)
    assert len(weight) == 6 and weight.sum() == pytest.approx(1) and weight.argmax() == 0


def test_export_has_one_file_a_free_batch_and_the_same_answers(data: TrainingSet, tmp_path: Path) -> None:
    net = build_net(data.preprocess, Train(network=Network(width=32, frequencies=4)), 3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    batch = data.batch
    rows = Resident(torch.from_numpy(batch.scaled), torch.from_numpy(batch.codes), torch.from_numpy(data.label))
    assert export_onnx(net, data.preprocess, rows, tmp_path / "a.onnx") <= 1e-5
    export_onnx(net, data.preprocess, rows, tmp_path / "b.onnx")
    assert file_digest(tmp_path / "a.onnx") == file_digest(tmp_path / "b.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    scorer = NetworkScorer(tmp_path / "a.onnx")
    whole = scorer.logit(batch)
    with torch.no_grad():
        np.testing.assert_allclose(whole, net(rows.scaled, rows.codes).numpy(), atol=1e-5)
    for count in (0, 1, 7):
        np.testing.assert_allclose(scorer.logit(batch.take(np.arange(count))), whole[:count], atol=1e-6)


@pytest.mark.parametrize("network", [Network(width=8, frequencies=0), Network(width=8, depth=1, frequencies=1)])
def test_export_without_categories_or_frequencies(network: Network, tmp_path: Path) -> None:
    data = write_small(tmp_path / "set", rows=300, categories=False)
    rows = Resident(torch.from_numpy(data.batch.scaled), torch.from_numpy(data.batch.codes), torch.from_numpy(data.label))
    export_onnx(build_net(data.preprocess, Train(network=network), 3), data.preprocess, rows, tmp_path / "a.onnx")
    assert NetworkScorer(tmp_path / "a.onnx").logit(data.batch).shape == (300,)


def test_a_network_is_a_function_of_its_seed(data: TrainingSet) -> None:
    one, same, other = (build_net(data.preprocess, Train(), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_training_twice_leaves_the_same_bytes(trained: Trained) -> None:
    one, two = trained("one"), trained("two")
    files = sorted(p.name for p in one.iterdir() if p.is_file())
    assert files == [
        "choice.json", "curves.json", "gbdt.txt", "gbdt_tuned.txt", "model.json", "network.onnx",
        "network.safetensors", "page.md", "preprocess.json",
    ]  # fmt: skip
    assert {f: file_digest(one / f) for f in files} == {f: file_digest(two / f) for f in files}


def test_scores_are_what_training_computed(trained: Trained, data: TrainingSet) -> None:
    out = trained("one")
    model = Model.load(out)
    test = data.batch.take(data.rows("test"))
    answers = model.members_predict(test)
    assert set(answers) == {"gbdt", "gbdt_tuned", "network", "blend", "blend_tuned"}
    assert (answers[model.chosen] == model.predict(test)).all()
    body = json.loads((out / "model.json").read_text())
    lines = {m["name"]: m for m in body["members"]}
    trees = lgb.Booster(model_file=str(out / "gbdt.txt")).predict(test.trees, raw_score=True)
    assert (answers["gbdt"] == sigmoid(lines["gbdt"]["a"] * trees + lines["gbdt"]["b"])).all()
    train = apply(small_spec().train, {"network.width": 24})
    net = build_net(data.preprocess, train, 0)
    net.load_state_dict(load_file(out / "network.safetensors"))
    net.eval()
    with torch.no_grad():
        eager = net(torch.from_numpy(test.scaled), torch.from_numpy(test.codes)).numpy()
    network = sigmoid(lines["network"]["a"] * eager + lines["network"]["b"])
    np.testing.assert_allclose(answers["network"], network, atol=1e-5)
    weights = body["candidates"]["blend"]
    mean = sum(w * (lines[n]["a"] * {"gbdt": trees, "network": eager}[n] + lines[n]["b"]) for n, w in weights.items())
    np.testing.assert_allclose(answers["blend"], sigmoid(mean), atol=1e-5)
    assert body["prior"] == data.label[data.rows("train")].mean()


def test_the_models_learn(trained: Trained, data: TrainingSet) -> None:
    rows = data.rows("test")
    answers = Model.load(trained("one")).members_predict(data.batch.take(rows))
    assert auc(data.label[rows], answers["gbdt"]) > 0.83 and auc(data.label[rows], answers["network"]) > 0.83


def test_rows_are_scored_one_by_one_as_together(trained: Trained, data: TrainingSet) -> None:
    model, batch = Model.load(trained("one")), data.batch.take(data.rows("test")[:20])
    one_by_one = [model.predict(batch.take(np.array([i])))[0] for i in range(20)]
    np.testing.assert_allclose(one_by_one, model.predict(batch), atol=1e-7)
    assert model.predict(batch.take(np.arange(0))).shape == (0,)


def test_only_what_is_chosen_must_ship(trained: Trained, data: TrainingSet, tmp_path: Path) -> None:
    model = Model.load(trained("one"))
    for name in model.files:
        (tmp_path / name).write_bytes((model.folder / name).read_bytes())
    shipped = Model.load(tmp_path)
    batch = data.batch.take(data.rows("test"))
    assert (shipped.predict(batch) == model.predict(batch)).all()
    assert model.chosen in shipped.members_predict(batch)
    (tmp_path / model.files[1]).unlink()
    with pytest.raises(MillraceError, match=f"{model.files[1]}: not found, but model.json needs it"):
        Model.load(tmp_path)
    (tmp_path / model.files[1]).write_text("not a model")
    with pytest.raises(MillraceError, match=f"{model.files[1]}: not readable as"):
        Model.load(tmp_path)


def test_scoring_needs_neither_torch_nor_pandas(trained: Trained) -> None:
    code = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "pandas", "optuna", "pytorch_lightning", "feast", "prefect"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Guard())
from pathlib import Path
from models.score import Model
print(Model.load(Path(sys.argv[1])).chosen)
"""
    done = subprocess.run([sys.executable, "-c", code, str(trained("one"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ranks_follow_the_gpus_that_the_driver_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[list[int]] = []

    class Parent:
        def resize(self, folder: Path, slots: list[int]) -> None:
            assert folder == tmp_path
            told.append(slots)

    listed = [4]
    monkeypatch.setattr(candidate, "devices", lambda: listed[0])
    monkeypatch.setattr(candidate, "start_zygote", Parent)
    look = candidate._follow_devices(tmp_path, 4)
    for listed[0] in (4, 3, 3, 1, 0, 4, 4):
        look()
    assert told == [[0, 1], [0], [0, 1, 2, 3]]


def test_a_network_that_diverges_is_an_error(folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "study" / "best.json", {"network": {"slot": 0, "params": {"learning_rate": 1e30}}})
    (tmp_path / "out").mkdir()
    with pytest.raises(MillraceError, match=r"diverged: .*; lower train\.learning_rate"):
        train_candidates(small_spec(), folder, tmp_path / "study", tmp_path / "work", tmp_path / "out")


def test_ranks_that_do_not_divide_the_batch_are_a_usage_error(folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "study" / "best.json", {})
    with pytest.raises(UsageError, match=r"train\.ranks 3"):
        train_candidates(small_spec("train.ranks=3"), folder, tmp_path / "study", tmp_path / "work", tmp_path / "out")


def test_auto_is_one_rank_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert world(small_spec()) == (1, "cpu")
    assert world(small_spec("train.ranks=4")) == (4, "cpu")


def test_parameters_are_set_where_they_belong() -> None:
    train = apply(Train(), {"learning_rate": 0.5, "network.width": 7})
    assert train.learning_rate == 0.5 and train.network.width == 7
    assert replace_fields(train) == Train()


def replace_fields(train: Train) -> Train:
    return apply(train, {"learning_rate": Train().learning_rate, "network.width": Network().width})
