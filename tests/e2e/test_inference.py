"""What computes the answers, in a run and a release: packaged, served, recorded beside the result and not in it."""

from pathlib import Path

import pytest

from deploy.bundle import build_bento
from deploy.compiled import compile_into
from deploy.contents import read_lock, tree_digest
from deploy.process import call, free_port, start, stop
from deploy.rollout import bento_folder, champion
from models.score import Model
from models.served import SERVED, read_served
from pipelines.home import Home, open_home
from pipelines.manifest import read_json, write_json
from tests.command import QUICK, millrace
from tests.e2e.buses import Buses
from tests.e2e.test_endpoint import SOON

NAMED = "serve.inference=[torchscript, onnxruntime]"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_word_of_the_spec_packages_the_champion_anew_with_the_same_result(copied_home: Home) -> None:
    """In a home of one release: an engine by name, the same again, as it was trained; and one that is not installed."""
    first = champion(copied_home, "tumours")
    assert first is not None
    done = millrace(copied_home.root, "run", "tumours", "--json", sets=(*QUICK, NAMED))
    assert done.code == 0 and done.answer["outcome"] == "promoted", done.err
    manifest = read_json(copied_home.runs("tumours") / done.answer["run_id"] / "manifest.json")
    table = {(x["member"], x["engine"]): x for x in manifest["inference"]["table"]}
    assert manifest["inference"]["hardware"]["cores"] > 0 and "inference" not in manifest["result"]["spec"]["serve"]
    release = champion(copied_home, "tumours")
    assert release is not None and release.release != first.release and manifest["preflight"]["passed"]
    folder = bento_folder(copied_home, release)
    served = read_served(folder / "src/bundle")
    expected = {"network": "torchscript", "gbdt": "onnxruntime"}
    assert served and {m: s.engine for m, s in served.items()}.items() <= expected.items()
    assert all(table[member, s.engine]["state"] == "chosen" for member, s in served.items())
    assert ("torch" in read_lock(folder / "src")) == ("network" in served)
    assert "What computes the answers" in (copied_home.root / done.answer["report"]).read_text()
    again = millrace(copied_home.root, "run", "tumours", "--json", sets=(*QUICK, NAMED))
    assert again.answer["outcome"] == "unchanged" and again.answer["run_id"] == done.answer["run_id"]
    absent = millrace(copied_home.root, "check", "tumours", sets=("serve.inference=tvm",))
    if "apache-tvm" not in manifest["inference"]["hardware"]["versions"]:
        assert absent.code == 2 and "serve.inference tvm: not installed: pip install apache-tvm" in absent.out + absent.err


@pytest.mark.slow
def test_a_bento_with_a_compiled_model_is_the_same_bytes_and_answers_as_the_model(buses: Buses, tmp_path: Path) -> None:
    bundle, form = buses.folder / "src/bundle", tmp_path / "form"
    write_json(tmp_path / "study/best.json", {})
    form.mkdir()
    spec = buses.spec.model_copy(update={"serve": buses.spec.serve.model_copy(update={"inference": ("onnxruntime",)})})
    compile_into(spec, bundle, buses.home.root.parent / "model", tmp_path / "study", form)
    files = [*(bundle / n for n in ("model.json", "gbdt.txt", "preprocess.json")), form / SERVED, form / "gbdt.onnx"]
    built = []
    for name in ("here", "elsewhere"):
        home, scratch = open_home(tmp_path / name), tmp_path / name / "scratch"
        scratch.mkdir()
        built.append((home.root, build_bento(buses.spec, home, files, buses.features.defs_digest, scratch)))
    folders = [root / bento.path for root, bento in built]
    assert tree_digest(folders[0]) == tree_digest(folders[1]) and built[0][1].tag != buses.bento.tag
    assert read_lock(folders[0] / "src") == read_lock(buses.folder / "src")  # it needs no package more
    rows = buses.data.batch.take(buses.data.rows("test"))
    assert (Model.load(folders[0] / "src/bundle").predict(rows) == Model.load(bundle).predict(rows)).all()
    service = start(buses.home, folders[0], port=free_port(), release=built[0][1].tag, log=tmp_path / "log", extra={})
    try:
        status, told = call(f"{service.url}/info")
        assert status == 200 and told["engines"] == {"gbdt": "onnxruntime"}
        status, answer = call(f"{service.url}/predict", {"rows": [SOON], "explain": 3})
        assert status == 200 and answer["rows"][0]["explanation"]["exact"]
    finally:
        stop(service)
