"""What computes the answers: candidates from each member of a model, checked, measured, one chosen and served."""

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deploy.compiled import compile_into, network_of, table, tree_texts, wanted
from features.trainset import TrainingSet
from models import inference
from models.data import Resident
from models.engines import ENGINES, ZERO, OnnxTrees, engine_of, target
from models.export import export_onnx
from models.gbdt import fit_gbdt
from models.inference import Checked, Line, check_engines, checked_rows, compare, not_installed, pick, snapped
from models.net import build_net
from models.score import Model, TreeScorer
from models.served import SERVED, read_served, slack
from models.trees_onnx import thresholds, write_trees
from pipelines.errors import UsageError
from pipelines.manifest import read_json, write_json
from pipelines.run import result_spec
from pipelines.spec import load_spec
from tests.model.small import small_spec, write_small

HERE = {e.name for e in ENGINES if not not_installed(e)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def data(folder: Path) -> TrainingSet:
    return write_small(folder / "set", rows=3_000)


@pytest.fixture(scope="module")
def trained(folder: Path, data: TrainingSet) -> Path:
    """A blend of a network with drawn weights and a small LightGBM."""
    out, spec = folder / "model", small_spec()
    out.mkdir()
    write_json(folder / "study/best.json", {})
    net = build_net(data.preprocess, spec.train, spec.seed)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    save_file(net.state_dict(), out / "network.safetensors")
    batch = data.batch
    rows = Resident(torch.from_numpy(batch.scaled), torch.from_numpy(batch.codes), torch.from_numpy(data.label))
    export_onnx(net, data.preprocess, rows, out / "network.onnx")
    (out / "gbdt.txt").write_text(fit_gbdt(spec.gbdt, batch, data.label, data.part, spec.seed, threads=1).text)
    data.preprocess.save(out / "preprocess.json")
    files = {"gbdt": "gbdt.txt", "network": "network.onnx"}
    members = [{"name": n, "kind": n, "file": f, "a": 1.1, "b": -0.2} for n, f in files.items()]
    candidates = {"gbdt": {"gbdt": 1.0}, "network": {"network": 1.0}, "blend": {"network": 0.4, "gbdt": 0.6}}
    write_json(out / "model.json", {"chosen": "blend", "members": members, "prior": 0.3, "candidates": candidates})
    return out


@pytest.fixture(scope="module")
def rows(data: TrainingSet, trained: Path) -> Checked:
    return checked_rows(data.preprocess, data.batch.take(data.rows("valid_select")), tree_texts(Model.load(trained), "blend"))


@pytest.fixture
def packed(folder: Path, trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """What a bundle would hold of the model, by words of the spec."""

    def make(*words: str) -> Path:
        out = tmp_path / "-".join(words).replace("=", "")
        out.mkdir()
        spec = small_spec(*words)
        compile_into(spec, trained, folder / "set", folder / "study", out)
        for name in ("model.json", "gbdt.txt", "network.onnx"):
            (out / name).write_bytes((trained / name).read_bytes())
        return out

    return make


def booster(seed: int, *, missing: bool) -> tuple[str, np.ndarray]:
    """Trees over numbers near 0, with gaps and without, and a category; and their rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2_000, 5)) * [1, 1e-30, 1e-36, 1e6, 1]
    x[rng.random(2_000) < 0.3, 1] = 0.0
    x[:, 4] = rng.integers(0, 40, 2_000)
    if missing:
        x[rng.random(2_000) < 0.2, 0] = np.nan
        x[rng.random(2_000) < 0.2, 3] = np.nan
    y = (np.nan_to_num(x[:, 0]) + np.sin(x[:, 4]) + np.isnan(x[:, 3]) + rng.normal(size=2_000) * 0.3 > 0.3).astype(float)
    settings = {"objective": "binary", "num_leaves": 31, "min_data_in_leaf": 5, "verbosity": -1, "num_threads": 1, "seed": seed}
    made = lgb.train(settings, lgb.Dataset(x, y, categorical_feature=[4]), 25)  # type: ignore[arg-type]
    return made.model_to_string(), x


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_trees_as_onnx_are_the_same_bits_at_every_split(tmp_path: Path, seed: int, missing: bool) -> None:
    """At all splits and beside them, near 0, with what is missing, infinite and unseen; each row alone as among others."""
    text, x = booster(seed, missing=missing)
    write_trees(text, tmp_path / "x.onnx", np.float64)
    scorer, native = OnnxTrees(tmp_path / "x.onnx"), lgb.Booster(model_str=text)
    edges = [0.0, -0.0, ZERO, -ZERO, 2 * ZERO, ZERO / 2, -ZERO / 2, 5e-324, np.nan, np.inf, -np.inf, 1e300]
    some = [x, *snapped(x[:200], [text]), *(np.column_stack([np.full((40, 4), e), np.arange(40)]) for e in edges)]
    for column, splits in thresholds(text).items():
        at = np.repeat(x[:20], len(splits), axis=0)
        at[:, column] = np.tile(splits, 20)
        some += [at, np.nextafter(at, np.inf), np.nextafter(at, -np.inf)]
    tried = np.concatenate(some)
    tried[:, 4] = np.where(np.isfinite(tried[:, 4]), np.round(tried[:, 4]), 0)  # codes are whole numbers
    expected = native.predict(tried, raw_score=True, num_threads=1)
    assert np.array_equal(scorer._answer(tried), expected)
    few = range(0, len(tried), 97)
    assert all(scorer._answer(tried[i : i + 1])[0] == expected[i] for i in few)


def test_a_tree_that_is_one_leaf(tmp_path: Path) -> None:
    x = np.zeros((50, 2))
    made = lgb.train({"objective": "binary", "verbosity": -1, "num_threads": 1}, lgb.Dataset(x, np.arange(50) % 2), 2)
    write_trees(made.model_to_string(), tmp_path / "x.onnx", np.float64)
    assert np.array_equal(OnnxTrees(tmp_path / "x.onnx")._answer(x), made.predict(x, raw_score=True))


def test_float32_flips_splits_and_is_dropped_where_float64_stays(trained: Path, rows: Checked, tmp_path: Path) -> None:
    lines, chosen = compare(Model.load(trained), "blend", rows, {"onnxruntime", "onnxruntime32"}, 1e-6, tmp_path, lambda: None,
                            ("onnxruntime",))  # fmt: skip
    by = {(x.member, x.engine): x for x in lines}
    narrow, wide = by["gbdt", "onnxruntime32"], by["gbdt", "onnxruntime"]
    assert narrow.state == "dropped" and narrow.edge_gap is not None and narrow.edge_gap > 1e-3 and narrow.speed is not None
    assert "made ones differ by more than 1e-06" in narrow.why
    assert (wide.state, wide.gap, wide.edge_gap, wide.exact, wide.alone) == ("chosen", 0.0, 0.0, True, True)
    assert {m: f.engine.name for m, f in chosen.items()} == {"gbdt": "onnxruntime", "network": "onnxruntime"}
    for engine in ENGINES:  # every candidate has its line, whether it can be made here or not
        (line,) = [x for x in lines if (x.engine, x.precision) == (engine.name, engine.precision) and x.member == engine.kind]
        if engine.name not in HERE:
            assert line.state == "not installed" and line.why.startswith("pip install ")
        elif line.us is None:
            assert line.state == "not tried" and engine.name in line.why
    assert len(table(lines)) == len(lines) + 1


def test_a_candidate_that_answers_nan_or_cannot_be_made_is_dropped_with_its_reason(
    trained: Path, folder: Path, rows: Checked, data: TrainingSet, tmp_path: Path
) -> None:  # fmt: skip
    make = network_of(small_spec(), trained, folder / "study", data.batch)

    def broken() -> Any:
        net, inputs = make()
        net = copy.deepcopy(net)
        with torch.no_grad():
            net.mlp[0].weight[0, 0] = float("nan")
        return net, inputs

    def refuse() -> Any:
        raise RuntimeError("no compiler here\nand more")

    for network, state, why in ((broken, "dropped", "are no numbers"), (refuse, "failed", "RuntimeError: no compiler here")):
        work = tmp_path / state
        work.mkdir()
        lines, chosen = compare(Model.load(trained), "network", rows, {"torchscript"}, 1e-6, work, network, ("torchscript",))
        line = next(x for x in lines if x.engine == "torchscript")
        assert line.state == state and why in line.why and "\n" not in line.why
        assert chosen["network"].engine.name == "onnxruntime"


def test_a_lossy_candidate_is_one_only_where_the_spec_allows_the_difference() -> None:
    assert not wanted(("auto",), 1e-6) & {"int8", "bf16"} and "int8" in wanted(("auto",), 0.01)
    assert wanted(("auto", "lleaves"), 1e-6) == wanted(("auto",), 1e-6) | {"lleaves"}
    assert wanted(("native",), 1e-6) == set() and wanted(("openvino", "lleaves"), 1e-6) == {"openvino", "lleaves"}


def line(engine: str, one: float, many: float) -> Line:
    return Line("gbdt", engine, "float64", "passed", us=(1.0, 1.0), speed=(one, many))


@pytest.mark.parametrize(("lines", "named", "expected"), [
    ([("b", 1.29, 2.0)], "auto", "a"), ([("b", 1.3, 0.95)], "auto", "b"), ([("b", 9.0, 0.94)], "auto", "a"),
    ([("b", 2.0, 1.0), ("c", 2.5, 1.0)], "auto", "b"), ([("b", 2.0, 1.0), ("c", 2.7, 1.0)], "auto", "c"),
    ([("b", 0.1, 0.1), ("c", 9.0, 9.0)], "b", "b"), ([("b", 9.0, 9.0)], "native", "a"), ([], "auto", "a"),
])  # fmt: skip
def test_another_answers_only_where_it_is_clearly_faster(lines: list[Any], named: str, expected: str) -> None:
    assert pick([line("a", 1.0, 1.0), *(line(*x) for x in lines)], (named,)) == expected


def test_what_is_served_answers_as_the_chosen_candidate(packed: Callable[..., Path], trained: Path, rows: Checked) -> None:
    native, out = Model.load(trained), packed("serve.inference=onnxruntime")
    model = Model.load(out)
    assert model.served == {"gbdt": "onnxruntime"} and sorted(read_served(out)) == ["gbdt"] and slack(out) == 0.0
    assert np.array_equal(model.predict(rows.batch), native.predict(rows.batch))
    assert read_json(out / SERVED)["packages"] == [] and (out / "gbdt.onnx").is_file()
    measured = read_json(out / "volatile/measured.json")
    assert measured["hardware"]["cores"] and {x["state"] for x in measured["table"]} >= {"chosen", "not tried"}
    plain = packed("serve.inference=native")
    assert read_json(plain / SERVED)["members"] == {} and Model.load(plain).served == {}


def test_a_named_engine_brings_its_packages_and_a_bound(packed: Callable[..., Path], trained: Path, rows: Checked) -> None:
    out = packed("serve.inference=[torchscript, onnxruntime]")
    model, native = Model.load(out), Model.load(trained)
    assert model.served == {"network": "torchscript", "gbdt": "onnxruntime"}
    body = read_json(out / SERVED)
    assert body["packages"] == ["torch"] and not body["members"]["network"]["exact"] and slack(out) == body["bound"] == 1e-6
    off = np.abs(model.predict(rows.batch) - native.predict(rows.batch))
    assert 0 < off.max() <= 1e-6
    (out / "network.onnx").write_bytes(b"")  # what answers is the engine's own file
    assert np.array_equal(Model.load(out).predict(rows.batch), model.predict(rows.batch))


def test_a_lossy_engine_by_name_within_a_wider_bound(packed: Callable[..., Path], trained: Path, rows: Checked) -> None:
    out = packed("serve.inference=int8", "serve.max_gap=0.1")
    model = Model.load(out)
    off = np.abs(model.predict(rows.batch) - Model.load(trained).predict(rows.batch)).max()
    assert model.served == {"network": "int8"} and 1e-6 < off <= slack(out) == 0.1
    assert Model.load(packed("serve.inference=int8")).served == {}  # not within a millionth


def set_served(out: Path, **changes: Any) -> None:
    body = {k: v for k, v in read_json(out / SERVED).items() if k != "format_version"}
    body["members"]["gbdt"] |= changes
    write_json(out / SERVED, body)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda out: set_served(out, target=[*target(), "avx9000"]), "it is machine code for a CPU with avx9000"),
    (lambda out: set_served(out, target=["pdp11"]), "it is machine code for a CPU with pdp11"),
    (lambda out: set_served(out, engine="abacus"), "no engine 'abacus' for a gbdt"),
    (lambda out: (out / "gbdt.onnx").write_bytes(b"\x00" * 100), "onnxruntime cannot answer for gbdt here"),
    (lambda out: (out / "gbdt.onnx").unlink(), "No such file"),
], ids=["another CPU", "another architecture", "an unknown engine", "a damaged file", "no file"])  # fmt: skip
def test_what_cannot_answer_here_leaves_it_to_the_default_with_one_line(
    packed: Callable[..., Path], trained: Path, rows: Checked, caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], object], said: str,
) -> None:  # fmt: skip
    out = packed("serve.inference=onnxruntime")
    spoil(out)
    with caplog.at_level(logging.WARNING, "millrace.service"):
        model = Model.load(out)
    (record,) = caplog.records
    assert said in record.getMessage() and record.getMessage().endswith(": lightgbm does") and model.served == {}
    assert np.array_equal(model.predict(rows.batch), Model.load(trained).predict(rows.batch))


def test_the_choice_lies_outside_of_the_result() -> None:
    fast = small_spec("serve.inference=[openvino, lleaves]", "serve.max_gap=0.01")
    assert result_spec(fast) == result_spec(small_spec())
    assert fast.serve.inference == ("openvino", "lleaves")


@pytest.mark.parametrize(("word", "said"), [
    ("serve.inference=tensorrt", "serve.inference"), ("serve.inference=[]", "serve.inference"),
    ("serve.max_gap=0", "serve.max_gap"),
])  # fmt: skip
def test_a_wrong_word_is_one_clear_error(word: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_spec("tumours", [word])


def test_a_named_engine_that_is_not_installed_is_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engines(("auto",))
    check_engines(("onnxruntime", "torchscript"))
    absent = replace(engine_of("network", "tvm"), packages=("no-such-package",))
    monkeypatch.setattr(inference, "ENGINES", (absent,))
    with pytest.raises(UsageError, match=r"serve\.inference tvm: not installed: pip install no-such-package"):
        check_engines(("tvm",))


def test_hardware_is_told_with_what_is_installed() -> None:
    found = inference.hardware()
    assert json.dumps(found) and found["cpu"] and found["versions"]["lightgbm"] == lgb.__version__
    assert target()[0] and len(found["target"]) == 16 and "no-such-package" not in found["versions"]


def test_rows_at_splits_reach_the_splits(trained: Path, data: TrainingSet, rows: Checked) -> None:
    """Of the made rows many have a number exactly at a split, and native trees answer those below and above otherwise."""
    text = (trained / "gbdt.txt").read_text()
    at, below, above, *_ = snapped(data.batch.numbers[:300], [text])
    known = np.isfinite(at)
    on = np.column_stack([np.isin(at[:, c], s) for c, s in sorted(thresholds(text).items()) if c < at.shape[1]])
    assert on.sum() > 0.8 * known.sum() and (below[known] < at[known]).all() and (above[known] > at[known]).all()
    made = [data.preprocess.inputs(x, data.batch.codes[:300], None) for x in (at, below, above)]
    scores = [TreeScorer(trained / "gbdt.txt").logit(batch) for batch in made]
    assert np.array_equal(scores[0], scores[1]) and (scores[0] != scores[2]).mean() > 0.5
    assert rows.real == min(2_000, len(data.rows("valid_select"))) and len(rows.batch) > 3 * rows.real
