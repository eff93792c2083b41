"""The network as one ONNX file, checked against the original on real rows."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from features.preprocess import Preprocess
from models.data import Resident
from pipelines.errors import MillraceError

PARITY = 1e-4  # largest difference of a logit; float32 sums are ordered differently


def export_onnx(net: nn.Module, preprocess: Preprocess, rows: Resident, path: Path) -> float:
    """Writes the network with a free batch dimension; the largest difference of a logit on `rows`.

    Raises MillraceError when it is above PARITY.
    """
    net.eval()
    example = (rows.scaled[:2], rows.codes[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, example, str(path), dynamo=False, input_names=["scaled", "codes"], output_names=["logit"],
            dynamic_axes={"scaled": {0: "rows"}, "codes": {0: "rows"}, "logit": {0: "rows"}}, opset_version=17,
        )  # fmt: skip
    with torch.no_grad():
        expected = net(rows.scaled, rows.codes).numpy()
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    inputs = {"scaled": rows.scaled.numpy(), "codes": rows.codes.numpy()}
    found = session.run(["logit"], {n: v for n, v in inputs.items() if n in names})[0]
    gap = float(np.abs(found - expected).max(initial=0.0))
    if not gap <= PARITY:
        raise MillraceError(f"{path}: the exported network differs by {gap:g} from the trained one")
    return gap
