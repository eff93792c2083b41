"""An endpoint whose rows lie in Redis: it answers by them, without them while Redis is down, and by them again."""

import json

import pytest

from deploy.process import call
from features.cells import open_cells
from pipelines.home import Home
from tests.command import QUICK, millrace
from tests.servers import redis_server


@pytest.mark.slow
@pytest.mark.redis
def test_the_endpoint_answers_while_redis_is_down(copied_home: Home) -> None:
    with redis_server() as server:
        sets = (f"serve.store={server.url}",)
        served = millrace(copied_home.root, "serve", "tumours", "--background", "--port", "0", "--json", sets=sets)
        assert served.code == 0, served.err
        try:
            url = served.answer["url"]
            release = next((copied_home.root / "artifacts" / "preflight").glob("*/preflight.json"))
            body = {"rows": [json.loads(release.read_text())["example"]]}
            status, before = call(f"{url}/predict", body)
            assert status == 200 and "store_down" not in before and not before["rows"][0]["unknown_entity"]
            server.kill()
            status, down = call(f"{url}/predict", body)
            assert status == 200 and f"127.0.0.1:{server.port}" in down["store_down"]
            assert down["rows"][0]["unknown_entity"] and 0 < down["rows"][0]["probability"] < 1
            assert call(f"{url}/info")[0] == 200
            server.start()
            status, again = call(f"{url}/predict", body)
            assert status == 200 and again["rows"] == before["rows"] and "store_down" not in again
        finally:
            millrace(copied_home.root, "down", "tumours")


@pytest.mark.slow
@pytest.mark.redis
def test_a_run_feeds_the_server_that_the_spec_names(copied_home: Home) -> None:
    with redis_server() as server:
        sets = (*QUICK, f"serve.store={server.url}", "serve.threshold=0.3")
        done = millrace(copied_home.root, "run", "tumours", "--json", sets=sets)
        assert done.code == 0 and done.answer["outcome"] == "promoted", done.err
        name = next((copied_home.root / "online" / "tumours").iterdir()).name
        cells = open_cells(f"{server.url}#tumours/{name}")
        assert len(cells.keys("rows")) == 569 and cells.meta()["data_us"] == "0"
        scored = millrace(copied_home.root, "run", "tumours", "--json", sets=sets)
        assert scored.answer["outcome"] == "unchanged"
