"""The network as one ONNX file, checked against the original on real rows; and in the forms that other engines run."""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

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


class _Half(nn.Module):
    """A network in bfloat16 that is given float32 and answers in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).to(torch.bfloat16)

    def forward(self, *inputs: Tensor) -> Tensor:
        logit: Tensor = self.net(*(x.bfloat16() if x.is_floating_point() else x for x in inputs))
        return logit.float()


def _torchscript(net: nn.Module, inputs: tuple[Tensor, ...], onnx: Path, path: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.freeze(torch.jit.trace(net, inputs)), str(path))


def _bf16(net: nn.Module, inputs: tuple[Tensor, ...], onnx: Path, path: Path) -> None:
    _torchscript(_Half(net).eval(), inputs, onnx, path)


def _aotinductor(net: nn.Module, inputs: tuple[Tensor, ...], onnx: Path, path: Path) -> None:
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    axes = tuple({0: rows, **({1: torch.export.Dim("length", min=1, max=1 << 16)} if i == 2 else {})} for i in range(len(inputs)))
    with torch.no_grad():
        program = torch.export.export(net, inputs, dynamic_shapes=axes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _int8(net: nn.Module, inputs: tuple[Tensor, ...], onnx: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(onnx), str(path), weight_type=QuantType.QInt8)


def _iree(net: nn.Module, inputs: tuple[Tensor, ...], onnx: Path, path: Path) -> None:
    from iree import compiler

    mlir = path.with_suffix(".mlir")
    command = [sys.executable, "-m", "iree.compiler.tools.import_onnx", str(onnx), "-o", str(mlir), "--opset-version", "17"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MillraceError((done.stderr.strip().splitlines() or ["import_onnx failed"])[-1])
    options = ["--iree-llvmcpu-target-cpu=host"]
    path.write_bytes(compiler.compile_file(str(mlir), target_backends=["llvm-cpu"], extra_args=options))


def _tvm(net: nn.Module, inputs: tuple[Tensor, ...], onnx: Path, path: Path) -> None:
    import tvm
    from onnx import load
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = relax.get_pipeline("zero")(from_onnx(load(str(onnx)), keep_params_in_input=False))
    tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})).export_library(str(path))


# engine → what writes its file from the network, two rows, and its ONNX file
FORMS: dict[str, Callable[[nn.Module, tuple[Tensor, ...], Path, Path], None]] = {
    "torchscript": _torchscript, "bf16": _bf16, "aotinductor": _aotinductor, "int8": _int8, "iree": _iree, "tvm": _tvm,
}  # fmt: skip
