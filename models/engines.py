"""Compiled forms of a trained member, each one file, and what loads it. B rows.

Runs inside the serving process: what an engine needs beyond numpy, ONNX Runtime and LightGBM is imported where it is used.
"""

import logging
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from models.score import NetworkScorer, Scorer, TreeScorer, one_thread
from models.served import Served
from pipelines.errors import MillraceError

ZERO = float(np.float32(1e-35))  # LightGBM takes what is as near to 0 for 0, before it looks at a split
log = logging.getLogger("millrace.service")


class TorchScript(NetworkScorer):
    """A traced network, run by PyTorch's own interpreter."""

    def __init__(self, path: Path) -> None:
        self._torch = import_module("torch")
        self._torch.set_num_threads(1)
        self._run, self._inputs = self._load(path), None

    def _load(self, path: Path) -> Any:
        return self._torch.jit.load(str(path)).eval()

    def _answer(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with self._torch.inference_mode():
            found: np.ndarray = self._run(*(self._torch.from_numpy(np.ascontiguousarray(v)) for v in inputs.values())).numpy()
        return found


class Inductor(TorchScript):
    """A network that AOTInductor compiled to machine code."""

    def _load(self, path: Path) -> Any:
        run = self._torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run  # without the compiler's modules
        return lambda *inputs: run(list(inputs))[0]


class OpenVino(NetworkScorer):
    """The exported network under OpenVINO, one thread; it is compiled as it is loaded."""

    def __init__(self, path: Path) -> None:
        options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = import_module("openvino").Core().compile_model(path, "CPU", options)
        self._inputs = {name for node in compiled.inputs for name in node.get_names()}
        self._request, self._output = compiled.create_infer_request(), compiled.output(0)

    def _answer(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        found: np.ndarray = self._request.infer(dict(inputs), share_inputs=True)[self._output]
        return found


class Iree(NetworkScorer):
    """A network that IREE compiled through MLIR to machine code."""

    def __init__(self, path: Path) -> None:
        runtime = import_module("iree.runtime")
        context = runtime.SystemContext(config=runtime.Config("local-sync"))
        context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, path.read_bytes()))
        self._run, self._inputs = context.modules.module.main_graph, None

    def _answer(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        found: np.ndarray = self._run(*(np.ascontiguousarray(v) for v in inputs.values())).to_host()
        return found


class Tvm(NetworkScorer):
    """A network that TVM compiled to machine code."""

    def __init__(self, path: Path) -> None:
        os.environ.setdefault("TVM_NUM_THREADS", "1")
        tvm = import_module("tvm")
        machine = import_module("tvm.relax").VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
        self._run, self._tensor, self._inputs = machine["main"], tvm.runtime.tensor, None

    def _answer(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        found = self._run(*(self._tensor(np.ascontiguousarray(v)) for v in inputs.values()))
        answer: np.ndarray = (found if hasattr(found, "numpy") else found[0]).numpy()
        return answer


class OnnxTrees(TreeScorer):
    """Trees as one ONNX operator, one thread; thresholds are as wide as the file says."""

    def __init__(self, path: Path) -> None:
        self._session = one_thread(path)
        self._type = np.float64 if "double" in self._session.get_inputs()[0].type else np.float32

    def _answer(self, rows: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            inputs = {"x": rows.astype(self._type, copy=False)}
        found: np.ndarray = self._session.run(None, inputs)[0][:, 0]
        return found


class Lleaves(TreeScorer):
    """Trees that lleaves compiled through LLVM to machine code; their text lies beside."""

    def __init__(self, path: Path) -> None:
        self._model = import_module("lleaves").Model(model_file=str(path.with_suffix(".txt")))
        self._model.compile(cache=str(path), raw_score=True)

    def _answer(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._model.predict(_as_read(rows), n_jobs=1)
        return found


class Treelite(TreeScorer):
    """Trees that Treelite wrote in C, and a C compiler compiled."""

    def __init__(self, path: Path) -> None:
        self._module = import_module("tl2cgen")
        self._model = self._module.Predictor(str(path), nthread=1)

    def _answer(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._model.predict(self._module.DMatrix(_as_read(rows), dtype="float64"), pred_margin=True)
        return found.reshape(len(rows), -1)[:, 0]


def _as_read(rows: np.ndarray) -> np.ndarray:
    """Rows as LightGBM reads them."""
    return np.where(np.abs(rows) <= ZERO, 0.0, rows)


@dataclass(frozen=True)
class Engine:
    """One way to answer for a kind of member: the file's name after the member's, what loads it, and what that needs.

    `precision`: of what it computes in. `machine`: the file holds code for one kind of CPU.
    """

    name: str
    kind: str
    precision: str
    suffix: str
    load: Callable[[Path], Scorer]
    packages: tuple[str, ...] = ()
    machine: bool = False


# by kind in the order of preference: the default first, then what runs anywhere, then what is made for one kind of CPU
ENGINES = (
    Engine("onnxruntime", "network", "float32", ".onnx", NetworkScorer),
    Engine("openvino", "network", "float32", ".onnx", OpenVino, ("openvino",)),
    Engine("torchscript", "network", "float32", ".ts", TorchScript, ("torch",)),
    Engine("aotinductor", "network", "float32", ".pt2", Inductor, ("torch",), machine=True),
    Engine("iree", "network", "float32", ".vmfb", Iree, ("iree-base-runtime",), machine=True),
    Engine("tvm", "network", "float32", ".tvm.so", Tvm, ("apache-tvm",), machine=True),
    Engine("int8", "network", "int8", ".int8.onnx", NetworkScorer),
    Engine("bf16", "network", "bfloat16", ".bf16.ts", TorchScript, ("torch",)),
    Engine("lightgbm", "gbdt", "float64", ".txt", TreeScorer),
    Engine("onnxruntime", "gbdt", "float64", ".onnx", OnnxTrees),
    Engine("onnxruntime32", "gbdt", "float32", ".f32.onnx", OnnxTrees),
    Engine("treelite", "gbdt", "float64", ".so", Treelite, ("tl2cgen",), machine=True),
    Engine("lleaves", "gbdt", "float64", ".o", Lleaves, ("lleaves", "llvmlite"), machine=True),
)
DEFAULT = {"network": "onnxruntime", "gbdt": "lightgbm"}


def engine_of(kind: str, name: str) -> Engine:
    """Raises MillraceError where this version has none of that name."""
    for engine in ENGINES:
        if (engine.kind, engine.name) == (kind, name):
            return engine
    raise MillraceError(f"this Millrace has no engine {name!r} for a {kind}")


def target() -> list[str]:
    """What machine code may use here: the architecture, and what the CPU says that it can do."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"(?m)^(?:flags|Features)\s*:(.*)$", path.read_text() if path.is_file() else "")
    return [platform.machine(), *sorted(found[1].split() if found else ())]


def compiled(folder: Path, name: str, kind: str, served: Served) -> Scorer | None:
    """What answers for a member; None, and a line in the log, where it cannot here: the default answers instead."""
    try:
        lacks = sorted(set(served.target) - set(target()))
        if lacks:
            raise MillraceError(f"it is machine code for a CPU with {', '.join(lacks[:5])}")
        return engine_of(kind, served.engine).load(folder / served.file)
    except Exception as error:  # whatever a foreign library says of its file
        said = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning("%s: %s cannot answer for %s here (%s): %s does", folder, served.engine, name, said, DEFAULT[kind])
        return None
