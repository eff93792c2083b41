"""Every test runs in UTC and in a home of its own; a released and served pipeline is made once for all."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyarrow import fs

from deploy.process import Service, free_port, start, stop
from pipelines.flights import write_sample
from pipelines.home import Home, process_env
from tests.command import QUICK, millrace
from tests.e2e.buses import Buses, make_buses
from tests.servers import NAMES, REMOTE, NotInstalled, Server, postgres_server, redis_server, s3_server

_made: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Nothing of the caller's: no home, no Prefect server, no flags of the `make` that it may be."""
    for name in [n for n in os.environ if n.startswith(("MILLRACE_", "PREFECT_", "MAKE", "MFLAGS"))]:
        del os.environ[name]
    _made.append(tempfile.mkdtemp(prefix="millrace-tests-"))
    os.environ |= {"TZ": "UTC", "MILLRACE_HOME": f"{_made[0]}/home", "PYTHONSAFEPATH": "1"}
    time.tzset()


def pytest_unconfigure(config: pytest.Config) -> None:
    for folder in _made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def flights_landing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample of real flights, landed once. Copy it into a home; leave it as it is."""
    landing = tmp_path_factory.mktemp("sample") / "flights"
    write_sample(landing)
    return landing


@pytest.fixture(scope="session")
def tumours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, dict[str, Any]]:
    """A home with one release of the tumours pipeline, and what the run answered. Read only: copy it to change it."""
    home = tmp_path_factory.mktemp("tumours")
    assert millrace(home, "sample", "tumours").code == 0
    done = millrace(home, "run", "tumours", "--json", sets=QUICK)
    assert done.code == 0, done.err
    return Home(home), done.answer


@pytest.fixture(scope="session")
def tumours_home(tumours: tuple[Home, dict[str, Any]]) -> Home:
    """The home of `tumours`."""
    return tumours[0]


@pytest.fixture(scope="session")
def prefect_tables(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Gives a new home a Prefect database whose tables are made, which takes seconds; returns the home."""
    made = Home(tmp_path_factory.mktemp("tables"))
    upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    subprocess.run(upgrade, env={**os.environ, **process_env(made)}, check=True, capture_output=True)

    def give(home: Path) -> Path:
        shutil.copytree(made.root / "prefect", home / "prefect")
        return home

    return give


@pytest.fixture(scope="session")
def buses(tmp_path_factory: pytest.TempPathFactory) -> Buses:
    """The buses up to a bento and a fed store, without a release. Copy its home to land more or to feed."""
    return make_buses(tmp_path_factory.mktemp("buses"))


@pytest.fixture(scope="session")
def buses_service(buses: Buses) -> Iterator[Service]:
    """An endpoint of the buses' bento, by the store of their home."""
    log = buses.home.root / "endpoint.log"
    found = start(buses.home, buses.folder, port=free_port(), release=buses.bento.tag, log=log, extra={})
    yield found
    stop(found)
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


@pytest.fixture
def copied_home(tumours_home: Home, tmp_path: Path) -> Home:
    """A copy of the released home, to be changed; what still runs there in the end is stopped."""
    home = tmp_path / "copied"
    shutil.copytree(tumours_home.root, home, ignore=shutil.ignore_patterns("services"))
    return Home(home)



@pytest.fixture(scope="session")
def tumours_url(tumours_home: Home) -> Iterator[str]:
    """The address of the tumours endpoint, served by the command line."""
    done = millrace(tumours_home.root, "serve", "tumours", "--background", "--port", "0", "--json")
    assert done.code == 0, done.err
    yield done.answer["url"]
    millrace(tumours_home.root, "down", "tumours")


@pytest.fixture(scope="session")
def redis() -> Iterator[Server]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3 and has the bucket `bucket`; the environment leads there, without an account."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        for name, value in {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        fs.S3FileSystem(endpoint_override=server.url, allow_bucket_creation=True).create_dir("bucket")
        yield server.url


@pytest.fixture(params=["sqlite", *REMOTE])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new served store lies."""
    if request.param == "sqlite":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue(request.param).url}#test/{next(NAMES)}"


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the wall clock of this process by so many seconds, and when the machine seems to have begun: the kernel counts that
    back from the wall clock."""
    set_by, now, seconds, begun = 0.0, time.time_ns, time.time, psutil._pslinux.boot_time  # type: ignore[attr-defined]
    monkeypatch.setattr(time, "time_ns", lambda: now() + int(set_by * 1e9))
    monkeypatch.setattr(time, "time", lambda: seconds() + set_by)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: begun() + set_by)  # type: ignore[attr-defined]

    def jumped(by: float) -> None:
        nonlocal set_by
        set_by += by

    return jumped


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Any:
    """A server that is not installed skips its tests; CI installs all of them."""
    return (yield from _unless_missing())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Any:
    return (yield from _unless_missing())


def _unless_missing() -> Any:
    try:
        return (yield)
    except NotInstalled as missing:
        pytest.skip(str(missing))
