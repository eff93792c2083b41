"""BentoML as its manual shows it, for `bench.serving`."""

import os
from pathlib import Path
from typing import Any

import bentoml

from bench.serving_peers import Answerer


@bentoml.service(name="plain", workers=1)
class Plain:
    def __init__(self) -> None:
        self.answerer = Answerer(Path(os.environ["BENCH_BUNDLE"]), Path(os.environ["BENCH_HOME"]))

    @bentoml.api
    async def predict(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"rows": [{"probability": p} for p in self.answerer.answer(rows)]}
