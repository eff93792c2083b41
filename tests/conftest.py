"""What several test files share."""

from pathlib import Path

import pytest

from pipelines.flights import write_sample


@pytest.fixture(scope="session")
def flights_landing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample of real flights, landed once. Copy it into a home; leave it as it is."""
    landing = tmp_path_factory.mktemp("sample") / "flights"
    write_sample(landing)
    return landing
