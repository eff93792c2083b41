"""The network as one ONNX file, checked against the original on real rows."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from features.preprocess import Preprocess
from models.data import INPUTS, Resident
from pipelines.errors import MillraceError

PARITY = 1e-4  # largest difference of a logit; float32 sums are ordered differently


def export_onnx(net: nn.Module, preprocess: Preprocess, rows: Resident, path: Path) -> float:
    """Writes the network with a free batch dimension; the largest difference of a logit on `rows`.

    Raises MillraceError when it is above PARITY.
    """
    net.eval()
    inputs = rows.inputs()
    names = INPUTS[: len(inputs)]
    axes = {name: {0: "rows", **({1: "length"} if name == "tokens" else {})} for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, tuple(value[:2] for value in inputs), str(path), dynamo=False, input_names=[*names], output_names=["logit"],
            dynamic_axes={**axes, "logit": {0: "rows"}}, opset_version=17,
        )  # fmt: skip
    with torch.no_grad():
        expected = net(*inputs).numpy()
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    used = {node.name for node in session.get_inputs()}
    found = session.run(["logit"], {n: v.numpy() for n, v in zip(names, inputs, strict=True) if n in used})[0]
    gap = float(np.abs(found - expected).max(initial=0.0))
    if not gap <= PARITY:
        raise MillraceError(f"{path}: the exported network differs by {gap:g} from the trained one")
    return gap
