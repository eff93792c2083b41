"""LitServe as its manual shows it, for `bench.serving`."""

import sys
from pathlib import Path
from typing import Any

import litserve as ls

from bench.serving_peers import Answerer


class Plain(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.answerer = Answerer(Path(sys.argv[2]), Path(sys.argv[3]))

    def decode_request(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        return list(request["rows"])

    def predict(self, x: list[dict[str, Any]]) -> list[float]:
        return self.answerer.answer(x)

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return {"rows": [{"probability": p} for p in output]}


def serve(port: int) -> None:
    """Serves until it is told to end."""
    server = ls.LitServer(Plain(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
