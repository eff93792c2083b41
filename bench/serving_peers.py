"""The same answers by other frameworks, for `bench.serving`: `python -m bench.serving_peers KIND BUNDLE HOME PORT`.

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
        spec = self.loaded.spec
        stamps = {name for name, column in spec.row_source.columns.items() if column.type == "timestamp"}
        self.times = [name for name in spec.row_key if name in stamps]

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


def by_litserve(bundle: Path, home: Path, port: int) -> None:
    """A process that answers, and one that speaks HTTP."""
    from bench.serving_litserve import serve

    serve(port)


def by_mlflow(bundle: Path, home: Path, port: int) -> None:
    """The scoring server behind `mlflow models serve`, one worker."""
    import mlflow.pyfunc
    from mlflow.pyfunc import scoring_server

    os.environ |= {"BENCH_BUNDLE": str(bundle), "BENCH_HOME": str(home), "MLFLOW_ALLOW_FILE_STORE": "true"}
    folder = home / "mlflow-peer"
    if not folder.exists():
        code = str(Path(__file__).with_name("serving_mlflow.py"))
        mlflow.pyfunc.save_model(folder, python_model=code, pip_requirements=[])
    os.environ[scoring_server._SERVER_MODEL_PATH] = str(folder)
    os.execv(sys.executable, [sys.executable, "-m", "uvicorn", "mlflow.pyfunc.scoring_server.app:app", "--host", "127.0.0.1",
                              "--port", str(port), "--log-level", "warning", "--no-access-log"])  # fmt: skip


PEERS = {"fastapi": by_fastapi, "bentoml": by_bentoml, "litserve": by_litserve, "mlflow": by_mlflow}

if __name__ == "__main__":
    kind, bundle, home, port = sys.argv[1:]
    PEERS[kind](Path(bundle), Path(home), int(port))
