"""What a flow returned reaches the command line also where its server has lost it."""

from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import MissingResult
from prefect.states import Completed

from flows.inprocess import result_of
from pipelines.errors import Refused
from tasks.policy import alone


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path))


@pytest.mark.parametrize("returned", ["an outcome", Completed(name="Refused", data="an outcome")])
def test_a_state_that_came_back_without_its_data(returned: Any) -> None:
    bare: Any = Completed()
    with pytest.raises(MissingResult):
        bare.result()
    alone(lambda pipeline: returned)("tumours")
    assert result_of(bare) == "an outcome"
    assert result_of(Completed(data="its own")) == "its own"


def test_a_refusal_that_came_back_without_its_data() -> None:
    def story(pipeline: str) -> None:
        raise Refused("no")

    alone(story)("tumours")
    found = result_of(Completed())
    assert isinstance(found, Refused) and str(found) == "no"
