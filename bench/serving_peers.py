"""The same answers by other frameworks, for `bench.serving`: `python -m bench.serving_peers fastapi|bentoml BUNDLE HOME PORT`.

Each loads the same bundle and reads the same served store by the same functions; what differs is what stands around them.
"""

import os
import sys
from pathlib import Path
from typing import Any

from deploy.loaded import Loaded
from features.online import OnlineStore, serve_features
from pipelines.clock import parse_time


class Answerer:
    """Features by row key, and a calibrated probability; nothing is checked or logged."""

    def __init__(self, bundle: Path, home: Path) -> None:
        self.loaded = Loaded.of(bundle)
        self.store = OnlineStore(self.loaded.spec, home / "online" / self.loaded.spec.pipeline / self.loaded.defs[:16])
        self.times = [n for n in self.loaded.spec.row_key if self.loaded.spec.row_source.columns[n].type == "timestamp"]

    def answer(self, rows: list[dict[str, Any]]) -> list[float]:
        asked = [{**row, **{name: parse_time(row[name]) for name in self.times}} for row in rows]
        served = serve_features(self.store, asked, lambda: self.store.anchor().data_us)
        found: list[float] = self.loaded.model.predict(self.loaded.preprocess.transform(served.frame)).tolist()
        return found


def by_fastapi(bundle: Path, home: Path, port: int) -> None:
    """As most people write it."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Asked(BaseModel):
        rows: list[dict[str, Any]]

    app, answerer = FastAPI(), Answerer(bundle, home)

    @app.post("/predict")
    async def predict(asked: Asked) -> dict[str, Any]:
        return {"rows": [{"probability": p} for p in answerer.answer(asked.rows)]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def by_bentoml(bundle: Path, home: Path, port: int) -> None:
    """With BentoML's own route and everything that it puts around it."""
    os.environ |= {"BENCH_BUNDLE": str(bundle), "BENCH_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", "bench.serving_bentoml:Plain", "--host", "127.0.0.1",
                              "--port", str(port)])  # fmt: skip


if __name__ == "__main__":
    kind, bundle, home, port = sys.argv[1:]
    {"fastapi": by_fastapi, "bentoml": by_bentoml}[kind](Path(bundle), Path(home), int(port))
