"""A Python model of MLflow's, as code, for `bench.serving`: its scoring server turns a request into a data frame."""

import os
import threading
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from bench.serving_peers import Answerer


class Plain(PythonModel):
    def load_context(self, context: Any) -> None:
        self.one = threading.Lock()
        self.answerer = Answerer(Path(os.environ["BENCH_BUNDLE"]), Path(os.environ["BENCH_HOME"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> list[float]:
        with self.one:  # MLflow answers in threads, and the store is read in one at a time
            return self.answerer.answer(model_input.to_dict("records"))


set_model(Plain())
