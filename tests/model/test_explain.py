"""Why an answer is as it is: what the features add is the whole of it, and what is sampled is near to what is not."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from features.preprocess import Batch
from features.trainset import TrainingSet
from models.calibrate import Calibration, sigmoid
from models.custom import build
from models.data import Resident
from models.explain import Explainer
from models.export import export_onnx
from models.gbdt import fit_gbdt
from models.net import build_net
from models.score import Member, Model
from models.served import SERVED
from models.trees_onnx import write_trees
from models.words import fit_words
from pipelines.manifest import write_json
from pipelines.spec import Train
from tests.model.small import small_spec, write_small
from tests.model.test_text import TINY

NETWORK = {"width": 16, "depth": 1, "frequencies": 2}


def blended(folder: Path, data: TrainingSet, kinds: dict[str, str]) -> Model:
    """A model of these members, name → file, each with a calibration of its own."""
    members = {n: Member(n, n, file, Calibration(1.2 - 0.1 * i, 0.05 * i)) for i, (n, file) in enumerate(kinds.items())}
    return Model(folder, "blend", {"blend": {n: 1 / len(kinds) for n in kinds}}, members, 0.5)


def exported(net: torch.nn.Module, data: TrainingSet, folder: Path) -> None:
    """A network as it ships, with weights at random: what it has learned plays no part here."""
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    batch = data.batch.take(np.arange(50))
    scaled, codes, label = (torch.from_numpy(x) for x in (batch.scaled, batch.codes, data.label[:50]))
    rows = Resident(scaled, codes, label, batch.tokens)
    export_onnx(net, data.preprocess, rows, folder / "net.onnx")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingSet]:
    folder = tmp_path_factory.mktemp("tables")
    data = write_small(folder, rows=1_500)
    (folder / "gbdt.txt").write_text(fit_gbdt(small_spec().gbdt, data.batch, data.label, data.part, 7, threads=1).text)
    exported(build_net(data.preprocess, Train.model_validate({"network": NETWORK}), 3), data, folder)
    return folder, data


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingSet]:
    folder = tmp_path_factory.mktemp("texts")
    data = write_small(folder, rows=1_500, text=True)
    (folder / "gbdt.txt").write_text(fit_gbdt(small_spec().gbdt, data.batch, data.label, data.part, 7, threads=1).text)
    fit_words(data.batch, data.label, data.part).save(folder / "words.json")
    train = Train.model_validate({"encoder": TINY, "network": {"width": 16, "depth": 1}})
    exported(build(train, data.preprocess, 3, 10), data, folder)
    return folder, data


@pytest.mark.parametrize(
    ("which", "kinds"),
    [("tables", {"gbdt": "gbdt.txt"}), ("tables", {"network": "net.onnx"}),
     ("tables", {"gbdt": "gbdt.txt", "network": "net.onnx"}), ("texts", {"gbdt": "gbdt.txt", "words": "words.json"}),
     ("texts", {"words": "words.json", "network": "net.onnx"})],
)  # fmt: skip
def test_what_the_features_add_is_the_answer(which: str, kinds: dict[str, str], request: pytest.FixtureRequest) -> None:
    folder, data = request.getfixturevalue(which)
    model = blended(folder, data, kinds)
    batch = data.batch.take(np.arange(12))
    explainer = Explainer(model, data.preprocess)
    found = explainer.explain(batch)
    assert found.exact == ("network" not in kinds)
    assert set(found.names) == {*data.preprocess.numbers, *data.preprocess.categories, *data.preprocess.texts}
    assert np.abs(sigmoid(found.base + found.shares.sum(1)) - model.predict(batch)).max() < 1e-6
    assert np.abs(found.shares).max() > 0.01
    alone = explainer.explain(batch.take(np.array([5])))
    assert np.array_equal(alone.shares[0], found.shares[5]) or "words" in kinds
    named, others = found.top(3, 2)
    assert len(named) == 2 and abs(named[0][1]) >= abs(named[1][1])
    assert sum(share for _, share in named) + others == pytest.approx(found.shares[3].sum())


def test_compiled_trees_are_explained_by_those_that_were_trained(tables: tuple[Path, TrainingSet], tmp_path: Path) -> None:
    folder, data = tables
    text = (folder / "gbdt.txt").read_text()
    (tmp_path / "gbdt.txt").write_text(text)
    write_trees(text, tmp_path / "gbdt.onnx", np.float64)
    members = {"gbdt": {"engine": "onnxruntime", "file": "gbdt.onnx", "exact": True, "target": []}}
    write_json(tmp_path / SERVED, {"members": members, "bound": 1e-6})
    model, plain = (blended(f, data, {"gbdt": "gbdt.txt"}) for f in (tmp_path, folder))
    assert model.served == {"gbdt": "onnxruntime"} and not plain.served
    batch = data.batch.take(np.arange(12))
    found, expected = (Explainer(m, data.preprocess).explain(batch) for m in (model, plain))
    assert found.exact and np.array_equal(found.shares, expected.shares)
    assert np.abs(sigmoid(found.base + found.shares.sum(1)) - model.predict(batch)).max() < 1e-6


def test_the_shares_of_a_network_are_near_those_of_all_its_orders(tables: tuple[Path, TrainingSet]) -> None:
    """Shapley values by their definition, over every order of the features, against the few that are walked."""
    folder, data = tables
    model = blended(folder, data, {"network": "net.onnx"})
    explainer = Explainer(model, data.preprocess)
    ((slope, _, scorer),) = model.parts()
    for i in range(3):
        row = data.batch.take(np.array([i]))
        groups = [g for g in range(len(explainer.names)) if explainer._differs(row, g)]
        said: dict[frozenset[int], float] = {}

        def value(inside: frozenset[int], row: Batch = row, said: dict[frozenset[int], float] = said) -> float:
            if inside not in said:
                mask = np.zeros((1, len(explainer.names)), bool)
                mask[0, list(inside)] = True
                said[inside] = float(scorer.logit(explainer._mixed(row, mask))[0])
            return said[inside]

        expected, orders = np.zeros(len(explainer.names)), list(permutations(groups))
        for order in orders:
            for step, group in enumerate(order):
                expected[group] += value(frozenset(order[: step + 1])) - value(frozenset(order[:step]))
        gap = np.abs(explainer.explain(row).shares[0] / slope - expected / len(orders)).max()
        assert gap < 0.1 * np.abs(expected / len(orders)).max()


def test_a_feature_that_no_member_looks_at_adds_nothing(tables: tuple[Path, TrainingSet]) -> None:
    """A row that is the mean row: nothing has been added to what the network says of it."""
    folder, data = tables
    model = blended(folder, data, {"network": "net.onnx"})
    row = data.batch.take(np.array([0]))
    mean = Batch(row.numbers, np.zeros_like(row.codes), np.zeros_like(row.scaled))
    found = Explainer(model, data.preprocess).explain(mean)
    assert not found.shares.any() and sigmoid(found.base) == pytest.approx(model.predict(mean), abs=1e-12)
