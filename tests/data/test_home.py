"""The home: read-only, full, of another format, moved, in use. What is refused is said, and nothing is half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.process import Service, call, free_port
from features.ingest import ingest
from flows import inprocess
from flows.serving import wait_for_server
from pipelines.clock import begin_s
from pipelines.errors import MillraceError
from pipelines.home import Home, open_home
from pipelines.manifest import ROOT, Note, find_artifact, lock, make_artifact, read_json, write_atomic, write_json
from pipelines.spec import load_spec
from tests.command import QUICK, command, environment, millrace

IN_NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]


def in_namespace(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script with mounts of its own, which nobody else sees; skips where that is not allowed."""
    if subprocess.run([*IN_NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespaces")
    command = [*IN_NAMESPACE, "bash", "-euc", script]
    return subprocess.run(
        command, env={**os.environ, **variables, "PYTHON": sys.executable}, cwd=ROOT, capture_output=True, text=True
    )


def there(root: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def disk_full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- read-only ---


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/millrace"])
def test_a_home_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    done = millrace(tmp_path / place, "status")
    assert done.code == 1 and not done.out
    assert done.error.startswith(f"error: home {tmp_path / place}: cannot be written (")
    assert done.error.endswith("free space or rights there, or point MILLRACE_HOME at another folder")
    assert there(tmp_path) == {"file": b"mine"}


def test_a_home_on_a_disk_that_is_mounted_read_only(tmp_path: Path) -> None:
    open_home(tmp_path / "home")
    before = there(tmp_path)
    done = in_namespace(
        'mount --bind "$HOME_HERE" "$HOME_HERE"; mount -o remount,bind,ro "$HOME_HERE"; '
        '$PYTHON -m flows.cli run tumours',
        HOME_HERE=str(tmp_path / "home"), MILLRACE_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"home {tmp_path / 'home'}: cannot be written (Read-only file system); free space or rights" in done.stderr
    assert there(tmp_path) == before


# --- full ---


def test_a_home_on_a_full_disk(tmp_path: Path) -> None:
    done = in_namespace(
        'mount -t tmpfs -o size=256k none "$MILLRACE_HOME"; $PYTHON -m flows.cli sample tumours >&2; '
        'dd if=/dev/zero of="$MILLRACE_HOME/filler" bs=4k 2>/dev/null || true; find "$MILLRACE_HOME" -type f | sort; '
        'code=0; $PYTHON -m flows.cli run tumours || code=$?; find "$MILLRACE_HOME" -type f | sort; exit $code',
        MILLRACE_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"home {tmp_path}: cannot be written (No space left on device); free space or rights there" in done.stderr
    files = done.stdout.splitlines()
    assert f"{tmp_path}/filler" in files and files[: len(files) // 2] == files[len(files) // 2 :]


def test_a_disk_with_too_little_room_for_a_run(tmp_path: Path) -> None:
    done = in_namespace(
        'mount -t tmpfs -o size=20m none "$MILLRACE_HOME"; $PYTHON -m flows.cli sample tumours >&2; '
        'code=0; $PYTHON -m flows.cli check tumours >&2 || true; $PYTHON -m flows.cli run tumours || code=$?; '
        'ls "$MILLRACE_HOME"; exit $code',
        MILLRACE_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "MB free, a run needs at least 100 MB; free space there" in done.stderr
    assert f"MB free at {tmp_path}, a run wants 2000" in done.stderr  # what check said
    assert done.stdout.split() == ["home.json", "landing", "locks"]


@pytest.mark.parametrize("step", ["fsync", "write"])
def test_a_file_is_whole_or_as_it_was(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pointer.json"
    write_json(path, {"release": "a"})
    before = there(tmp_path)
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space left on device"):
            write_json(path, {"release": "b"})
    else:
        with open("/dev/full", "wb", buffering=0) as full:
            monkeypatch.setattr(os, "fdopen", lambda fd, mode: open(os.dup2(full.fileno(), fd), mode))  # noqa: SIM115
            with pytest.raises(OSError, match="No space left on device"):
                write_atomic(path, b"x" * 100_000)
    assert there(tmp_path) == before


def test_a_stage_that_runs_out_of_space_leaves_no_output(tmp_path: Path) -> None:
    def build(out: Path) -> Note:
        (out / "half.parquet").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    home = open_home(tmp_path / "home")
    before = there(home.root)
    with pytest.raises(OSError, match="No space left on device"):
        make_artifact(home.root, "train", "abc", build)
    assert there(home.root) == before and find_artifact(home.root, "train", "abc") is None
    assert make_artifact(home.root, "train", "abc", lambda out: Note("done")).line == "done"


@pytest.mark.parametrize("module", ["pyarrow.parquet.write_table", "os.fsync"])
def test_an_ingest_that_runs_out_of_space_publishes_nothing(
    tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, spec = open_home(tmp_path / "home"), load_spec("tumours")
    assert millrace(home.root, "sample", "tumours").code == 0
    before = there(home.root)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left on device"):
        patched.setattr(module, disk_full)
        ingest(spec, home)
    assert {n: d for n, d in there(home.root).items() if not n.startswith("objects/")} == before
    assert ingest(spec, home).rows == {"tumours": 569}


@contextmanager
def told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Iterator[None]:
    """The flow ends in this error."""

    class State:
        name, message = "Failed", "it failed"

        class state_details:  # noqa: N801 — Prefect's name
            flow_run_id = None

        def result(self, *, raise_on_failure: bool) -> Exception:
            return error

    import flows.retrain

    monkeypatch.setattr(flows.retrain, "retrain", lambda *args, **kwargs: State())
    monkeypatch.setattr(inprocess, "_settle", lambda *args: None)
    monkeypatch.setattr(inprocess, "spawn_server", lambda *args, **kwargs: alive())
    monkeypatch.setattr(inprocess, "wait_for_server", lambda server: None)
    monkeypatch.setattr(inprocess, "stop", lambda server: None)
    monkeypatch.setattr(inprocess, "quiet", lambda: None)
    monkeypatch.setattr(inprocess, "HEAVY", ())
    yield


def alive(port: int = 1) -> Service:
    return Service(os.getpid(), begin_s(os.getpid()), port, "prefect-server", "/nowhere/log.txt")


@pytest.mark.parametrize("full", [False, True])
def test_an_error_that_nobody_foresaw_is_one_sentence(
    tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback goes to a file, where there is room for one."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")  # restored afterwards
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "3")
    home = open_home(tmp_path / "home")
    with told(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), pytest.raises(MillraceError) as caught:
        if full:
            monkeypatch.setattr(os, "fsync", disk_full)
        inprocess.run_flow(home, "tumours", None, [])
    said, path = str(caught.value), home.root / "errors" / "tumours.txt"
    assert said.startswith("OSError: [Errno 28] No space left on device (")
    assert said.endswith("nothing is half-published, and `millrace run tumours` goes on where this run stopped")
    assert ("could not be written: No space left on device" in said) == full
    assert path.exists() == (not full) and not [p for p in home.root.rglob(".*") if p.is_file()]


# --- of another format, broken, moved ---


@pytest.mark.parametrize("verb", ["status", "run"])
def test_a_home_of_a_newer_format(tmp_path: Path, verb: str) -> None:
    (tmp_path / "home.json").write_text(json.dumps({"format_version": 2, "what": "Millrace home"}))
    before = there(tmp_path)
    done = millrace(tmp_path, verb, *(["tumours"] if verb != "status" else []))
    assert done.code == 1 and there(tmp_path) == before
    assert done.error == (
        f"error: {tmp_path}/home.json: format_version 2, this Millrace writes and reads 1; run `pip install -U millrace` "
        "if the home is newer, or point MILLRACE_HOME at another folder"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "not JSON (Expecting property name"), ("", "not JSON (Expecting value"), ("[]", "expected a JSON object, found list"),
     ("{}", "format_version None, this Millrace writes and reads 1"), ("\ufffe", "not JSON")],
)  # fmt: skip
def test_a_file_of_the_home_that_is_broken(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "home.json").write_text(text)
    with pytest.raises(MillraceError) as caught:
        open_home(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/home.json: ") and expected in str(caught.value)


@pytest.mark.slow
def test_a_home_that_was_moved(copied_home: Home, tumours: tuple[Home, dict[str, Any]]) -> None:
    """`copied_home` lies elsewhere than the run that made it."""
    _, first = tumours
    moved = copied_home.root.with_name("moved")
    copied_home.root.rename(moved)
    again = millrace(moved, "run", "tumours", "--json", sets=QUICK)
    assert again.code == 0, again.err
    same = ("run_id", "release", "result_digest", "pipeline")
    assert again.answer["outcome"] == "unchanged" and {n: again.answer[n] for n in same} == {n: first[n] for n in same}
    assert Path(again.answer["report"]).is_relative_to(moved) and Path(again.answer["report"]).exists()
    try:
        served = millrace(moved, "serve", "tumours", "--background", "--port", "0", "--json")
        assert served.code == 0, served.err
        status, info = call(f"{served.answer['url']}/info")
        assert status == 200 and info["release"] == first["release"]
        status, answer = call(f"{served.answer['url']}/predict_features", {"rows": [{"mean_radius": 20}]})
        assert status == 200 and 0 < answer["rows"][0]["probability"] < 1
    finally:
        assert millrace(moved, "down").code == 0
    assert not copied_home.root.exists()


# --- two at a time ---


def test_a_second_run_while_one_is_running(tmp_path: Path) -> None:
    home = open_home(tmp_path / "home")
    with lock(home.lock("run-tumours"), what="a run of tumours"):
        done = millrace(home.root, "run", "tumours")
    assert done.code == 1 and not done.out
    assert done.error == (
        f"error: a run of tumours is already running (process {os.getpid()}); wait until it ends, or stop it, and type "
        "the command again"
    )
    assert sorted(there(home.root)) == ["home.json", "locks/run-tumours"]


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Killed with -9 it leaves the file, which holds nobody up."""
    home = open_home(tmp_path / "home")
    code = "import sys, time; from pathlib import Path; from pipelines.manifest import lock\n"
    code += "with lock(Path(sys.argv[1]), what='it'): print('held', flush=True); time.sleep(60)"
    path = home.lock("run-tumours")
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(MillraceError, match=rf"already running \(process {process.pid}\)"), lock(path, what="it"):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with lock(path, what="it"):
        assert path.read_text() == str(os.getpid())


# --- the Prefect server ---


@pytest.mark.slow
def test_a_prefect_server_that_does_not_start(tmp_path: Path) -> None:
    home = open_home(tmp_path / "home")
    assert millrace(home.root, "sample", "tumours").code == 0
    nowhere = "sqlite+aiosqlite:////proc/no/such.db"
    done = millrace(home.root, "run", "tumours", sets=QUICK, PREFECT_API_DATABASE_CONNECTION_URL=nowhere)
    assert done.code == 1 and not done.out
    assert "error: the Prefect server on port " in done.error and "does not answer: " in done.error
    assert f"(log: {home.root}/services/prefect-server/log.txt)" in done.error
    assert not home.runs("tumours").exists() and not home.releases("tumours").exists()


def test_a_prefect_server_that_does_not_answer(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("starting\nsqlalchemy.exc.OperationalError: unable to open database file\nbye\n")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    server = Service(sleeper.pid, begin_s(sleeper.pid), free_port(), "prefect-server", str(log))
    began = time.monotonic()
    with pytest.raises(MillraceError) as caught:
        wait_for_server(server, wait_s=0.5)
    sleeper.wait(10)
    assert time.monotonic() - began < 10
    expected = "does not answer: OperationalError: unable to open database file (log: "
    assert f"the Prefect server on port {server.port} " in str(caught.value) and expected in str(caught.value)


def test_a_port_of_the_prefect_ui_that_is_taken(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = millrace(tmp_path, "up", "--port", str(port), "--no-worker")
    assert done.code == 1
    assert done.error == f"error: port {port} is taken; stop what listens there, or type `millrace up --port PORT`"


@pytest.mark.slow
def test_a_prefect_server_that_dies_during_a_run(copied_home: Home) -> None:
    """It is said within two minutes, and the next run takes up the same run and ends it."""
    sets = (*QUICK, "seed=8", "gate.min_rows=20")  # another seed splits otherwise: few test rows are new to both
    words = command("run", "tumours", "--json", sets=sets)
    process = subprocess.Popen(words, env=environment(copied_home.root), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    before = {p.name for p in copied_home.runs("tumours").iterdir()}
    deadline = time.monotonic() + 200
    while not (lines := [p for p in copied_home.runs("tumours").glob("*/stages.jsonl") if p.parent.name not in before
                         and "training_set" in p.read_text()]) and time.monotonic() < deadline:  # fmt: skip
        time.sleep(0.1)
    assert lines and process.poll() is None
    psutil.Process(read_json(copied_home.services("prefect-server") / "endpoint.json")["pid"]).kill()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1 and "Traceback" not in err and len(err.splitlines()) < 12, err
    assert json.loads(out)["outcome"] == "error" and "error: the Prefect server on port " in err
    assert " ended while the run was going on (log: " in err
    assert "`millrace run tumours` starts it anew and goes on where this run stopped" in err
    again = millrace(copied_home.root, "run", "tumours", "--json", sets=sets)
    assert again.code in (0, 3), again.err
    assert again.answer["run_id"] == lines[0].parent.name and "takes up run" in again.err


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_run(tmp_path: Path) -> None:
    """The run says so; with room again it goes on and is released."""
    done = in_namespace(
        """
        mount -t tmpfs -o size=160m none "$MILLRACE_HOME"; cd "$ROOT"
        run="$PYTHON -m flows.cli run tumours $SETS"
        $PYTHON -m flows.cli sample tumours >&2
        code=0; $run & pid=$!
        until grep -qs training_set "$MILLRACE_HOME"/runs/tumours/*/stages.jsonl; do sleep 0.1; done
        dd if=/dev/zero of="$MILLRACE_HOME/filler" bs=4k 2>/dev/null || true
        wait $pid || code=$?
        test $code = 1; test ! -e "$MILLRACE_HOME/releases/tumours/champion.json"
        test -z "$(ls "$MILLRACE_HOME"/runs/tumours/*/manifest.json 2>/dev/null)"; echo "--- again" >&2
        rm "$MILLRACE_HOME/filler"; $run; ls "$MILLRACE_HOME/runs/tumours"
        """,
        MILLRACE_HOME=str(tmp_path), ROOT=str(ROOT), SETS=" ".join(f"--set {item}" for item in QUICK),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    said, _, again = done.stderr.partition("--- again")
    assert "Traceback" not in said and [line for line in said.splitlines() if line.startswith("error: ")]
    assert "takes up run" in again and done.stdout.startswith("promoted: ")


def test_a_table_landed_by_hand_is_read_where_the_home_is(tmp_path: Path) -> None:
    """A relative MILLRACE_HOME is the same folder for every process."""
    folder = tmp_path / "home" / "landing" / "tumours" / "tumours"
    folder.mkdir(parents=True)
    spec = load_spec("tumours")
    columns = {n: pa.array([1.0] * 3) if c.type == "float64" else pa.array([1] * 3)
               for n, c in spec.sources["tumours"].columns.items()}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "a.parquet")
    relative = Path(os.path.relpath(tmp_path / "home", ROOT))
    done = millrace(relative, "check", "tumours", "--json")
    assert done.code == 0 and not done.answer["problems"], done
    shutil.rmtree(tmp_path / "home")
