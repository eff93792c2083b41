"""What is in a bento: the same bytes from the same inputs, nothing that training needs, a bill that others read."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft7Validator
from referencing import Registry, Resource

from deploy.bundle import build_bento
from deploy.contents import ERASED, LOCK, SBOM, SUMS, read_lock, read_sums, sign_again, tree_digest, unlike, write_sums
from deploy.imports import REFUSED
from deploy.process import free_port, start
from pipelines.errors import MillraceError
from pipelines.home import Home, open_home, process_env
from tests.command import millrace
from tests.e2e.buses import Buses


@pytest.fixture
def bento(buses: Buses, tmp_path: Path) -> Path:
    """A copy of the buses' bento, to be spoiled."""
    return Path(shutil.copytree(buses.folder, tmp_path / buses.folder.name))


def put(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda src: (src / name).write_text(change((src / name).read_text(encoding="utf-8")), encoding="utf-8") and None


POISONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a model that was changed": (put("bundle/gbdt.txt", lambda text: text.replace("leaf_value=", "leaf_value=9", 1)),
                                 "bundle/gbdt.txt was changed"),
    "code that was changed": (put("deploy/service.py", lambda text: text + "\n"), "deploy/service.py was changed"),
    "no model": (lambda src: (src / "bundle/gbdt.txt").unlink(), "bundle/gbdt.txt is missing"),
    "a module more": (lambda src: (src / "deploy/extra.py").write_text("import os"), "deploy/extra.py was added"),
    "another library": (put(LOCK, lambda text: text.replace("numpy==", "numpy==0.")), "numpy is .*, it was packaged with 0"),
    "a list that fits the change": (lambda src: (put("bundle/gbdt.txt", lambda text: text + "\n")(src), resign(src)),
                                    f"{SUMS} or {LOCK} is not that of [0-9a-f]{{12}}"),
    "no list": (lambda src: (src / SUMS).unlink(), f"{SUMS} cannot be read"),
    "a list that is none": (lambda src: (src / SUMS).write_bytes(b"\xff\xfe"), f"{SUMS} cannot be read"),
    "no lock": (lambda src: (src / LOCK).unlink(), "requirements.txt cannot be read"),
}  # fmt: skip


def resign(src: Path) -> None:
    """As somebody does who changes a file and the list, too."""
    (src / "bentofile.yaml").unlink(missing_ok=True)
    write_sums(src)


@pytest.mark.parametrize("kind", POISONS)
def test_a_bento_that_was_changed_is_refused(bento: Path, kind: str) -> None:
    spoil, said = POISONS[kind]
    assert unlike(bento / "src") == ""
    spoil(bento / "src")
    with pytest.raises(AssertionError, match=said):
        assert unlike(bento / "src") == ""
    assert unlike(bento / "src").endswith("; package the release again")


def test_a_bento_out_of_which_somebody_was_erased_is_still_itself(bento: Path) -> None:
    path = bento / "src/bundle/gbdt.txt"
    first = read_sums(bento / "src")["bundle/gbdt.txt"]
    for _ in range(2):
        path.write_text(path.read_text() + "\n")
        sign_again(path)
    assert unlike(bento / "src") == ""
    assert json.loads((bento / "src" / ERASED).read_text()) == {"bundle/gbdt.txt": first}
    path.write_text("")
    assert "bundle/gbdt.txt was changed" in unlike(bento / "src")


def test_a_bento_holds_only_what_serving_needs(buses: Buses) -> None:
    src = buses.folder / "src"
    pins = read_lock(src)
    heavy = {*REFUSED, "great-expectations", "pytorch-lightning", "torch", "transformers", "scikit-learn", "ray", "mlflow"}
    assert not heavy & {name.replace("-", "_") for name in pins} and not heavy & pins.keys()
    assert {"numpy", "lightgbm", "onnxruntime", "bentoml", "starlette", "scipy"} <= pins.keys()  # what they need, too
    requirements = (buses.folder / "env/python/requirements.txt").read_text()
    assert all(f"{name}=={version}" in requirements for name, version in pins.items())
    assert "python" in (buses.folder / "env/docker/Dockerfile").read_text()
    done = subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=src, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_bill_of_materials_fits_the_schema_of_cyclonedx(buses: Buses) -> None:
    body = json.loads((buses.folder / "src" / SBOM).read_text())
    schemas = files("cyclonedx") / "schema" / "_res"
    found = [json.loads((schemas / f"{name}.SNAPSHOT.schema.json").read_text()) for name in ("bom-1.6", "spdx", "jsf-0.82")]
    registry = Registry().with_resources((schema["$id"], Resource.from_contents(schema)) for schema in found)
    assert not list(Draft7Validator(found[0], registry=registry).iter_errors(body))
    pins = read_lock(buses.folder / "src")
    libraries = {c["name"]: c for c in body["components"] if c["type"] == "library"}
    assert {name: c["version"] for name, c in libraries.items()} == pins
    assert all(c.get("licenses") for c in libraries.values())
    whole = body["metadata"]["component"]["bom-ref"]
    assert {d["ref"] for d in body["dependencies"]} == {whole, *(c["purl"] for c in libraries.values())}


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(buses: Buses, tmp_path: Path) -> None:
    digests = []
    for name in ("here", "elsewhere/and/deeper"):
        home, scratch = open_home(tmp_path / name), tmp_path / name / "scratch"
        scratch.mkdir()
        inputs = [buses.folder / "src/bundle" / n for n in ("model.json", "gbdt.txt", "preprocess.json")]
        built = build_bento(buses.spec, home, inputs, buses.features.defs_digest, scratch)
        assert built.tag == buses.bento.tag
        digests.append(tree_digest(home.root / built.path))
        time.sleep(1.1)
    assert digests[0] == digests[1] == tree_digest(buses.folder)


@pytest.mark.slow
def test_a_changed_bento_does_not_start(buses: Buses, bento: Path, tmp_path: Path) -> None:
    (bento / "src/bundle/gbdt.txt").write_text((bento / "src/bundle/gbdt.txt").read_text() + "\n")
    with pytest.raises(MillraceError, match=r"is not as it was packaged: bundle/gbdt.txt was changed"):
        start(buses.home, bento, port=free_port(), release=buses.bento.tag, log=tmp_path / "log", extra={})


def test_verify_and_rollback_look_first(copied_home: Home) -> None:
    fine = millrace(copied_home.root, "verify", "tumours", "--json")
    assert fine.code == 0 and fine.answer["files"] > 30 < fine.answer["packages"]
    card = next(copied_home.root.glob("bentoml/bentos/millrace_tumours/*/src/bundle/model_card.md"))
    assert "Is this tumour malignant?" in card.read_text() and card.with_name("manifest.json").is_file()
    card.write_text("trust me")
    done = millrace(copied_home.root, "verify", "tumours", "--json")
    assert done.code == 3 and "bundle/model_card.md was changed" in done.answer["wrong"]
    back = millrace(copied_home.root, "rollback", "tumours", "--to", done.answer["release"])
    assert back.code == 3 and "is not as it was packaged" in back.error


@pytest.mark.slow
def test_a_bento_runs_where_there_is_no_source_tree(buses: Buses, bento: Path, tmp_path: Path) -> None:
    """With the packages of its lock alone, and nothing of the checkout on the path."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in read_lock(bento / "src"):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            (packages / top).exists() or (packages / top).symlink_to(Path(str(found.locate_file(top))))
    port = free_port()
    code = f"import sys; sys.path[:0] = [{str(packages)!r}]; from bentoml_cli.cli import cli; cli()"
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}, **process_env(buses.home),
           "PYTHONPATH": f"{bento / 'src'}:{packages}", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}  # fmt: skip
    command = [sys.executable, "-S", "-c", code, "serve", str(bento), "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/info", timeout=2) as answer:
                    assert json.load(answer)["release"] == buses.bento.tag
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError((tmp_path / "log").read_text()[-3_000:])
    finally:
        process.terminate()
        process.wait(20)
