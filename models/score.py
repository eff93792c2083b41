"""The model that ships: reads what training left and answers calibrated probabilities. B rows.

Runs inside the serving process and in evaluation alike; imports numpy, onnxruntime and lightgbm, not torch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from models.calibrate import Calibration, sigmoid
from models.served import read_served
from models.words import Words
from pipelines.errors import MillraceError
from pipelines.manifest import read_json

if TYPE_CHECKING:
    import onnxruntime as ort
    from scipy.sparse import csr_array

    from features.preprocess import Batch

CHUNK, CHUNK_TEXTS = 256, 64  # rows at a time: what a network makes of them stays in the cache


class Scorer(Protocol):
    """One member: raw logits of a batch, float64 (B)."""

    def logit(self, batch: "Batch") -> np.ndarray: ...


def one_thread(path: Path) -> "ort.InferenceSession":
    """A session of ONNX Runtime on the CPU."""
    import onnxruntime as ort  # as LightGBM below only where a model needs it: BentoML's parent process imports this module too

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


class NetworkScorer:
    """The exported network under ONNX Runtime, one thread."""

    _inputs: set[str] | None  # those that the network reads; None: all

    def __init__(self, path: Path) -> None:
        self._session = one_thread(path)
        self._inputs = {node.name for node in self._session.get_inputs()}

    def logit(self, batch: "Batch") -> np.ndarray:
        found: np.ndarray = np.empty(len(batch))
        for rows in _alike(batch):
            inputs = {name: getattr(batch, name)[rows] for name in ("scaled", "codes") if self._reads(name)}
            if batch.tokens is not None and self._reads("tokens"):
                inputs["tokens"] = batch.tokens.take(rows).padded()
            found[rows] = self._answer(inputs)
        return found

    def _reads(self, name: str) -> bool:
        return self._inputs is None or name in self._inputs

    def _answer(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        found: np.ndarray = self._session.run(["logit"], inputs)[0]
        return found


def _alike(batch: "Batch") -> Iterator[slice | np.ndarray]:
    """Rows that are answered together. Texts only with those of the same length, so that no row depends on its neighbours."""
    if batch.tokens is None:
        yield from (slice(i, i + CHUNK) for i in range(0, len(batch), CHUNK))
        return
    lengths = batch.tokens.lengths
    order = np.argsort(lengths, kind="stable")
    for same in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        yield from (same[i : i + CHUNK_TEXTS] for i in range(0, len(same), CHUNK_TEXTS))


class TreeScorer:
    """A LightGBM booster, one thread."""

    def __init__(self, path: Path) -> None:
        import lightgbm as lgb

        self._booster = lgb.Booster(model_str=path.read_text(encoding="utf-8"))

    def logit(self, batch: "Batch") -> np.ndarray:
        if not len(batch):
            return np.empty(0)
        return np.asarray(self._answer(batch.trees), np.float64)

    def _answer(self, rows: "np.ndarray | csr_array") -> np.ndarray:
        found: np.ndarray = self._booster.predict(rows, raw_score=True, num_threads=1)  # type: ignore[assignment]
        return found

    def contributions(self, batch: "Batch") -> np.ndarray:
        """What each column of `Batch.trees` adds to the logit, then what is there without any: float64 (B, columns + 1)."""
        found = self._booster.predict(batch.trees, pred_contrib=True, num_threads=1)
        dense: np.ndarray = np.asarray(found.toarray() if hasattr(found, "toarray") else found, np.float64)
        return dense


KINDS: dict[str, Callable[[Path], Scorer]] = {"network": NetworkScorer, "gbdt": TreeScorer, "words": Words.load}


@dataclass(frozen=True)
class Member:
    """One trained model: its kind, the file that holds it, and its calibration."""

    name: str
    kind: str
    file: str
    calibration: Calibration


class Model:
    """What `model.json` describes: members, and the candidates made of them, one of which is chosen."""

    def __init__(
        self,
        folder: Path,
        chosen: str,
        candidates: Mapping[str, Mapping[str, float]],
        members: Mapping[str, Member],
        prior: float,
    ) -> None:
        self.folder, self.chosen, self.candidates, self.members = folder, chosen, candidates, members
        self.prior = prior  # share of positive labels in the training part
        self.served: dict[str, str] = {}  # member → the engine that answers for it in place of the default
        self._scorers: dict[str, Scorer] = {}
        self._trees: dict[str, TreeScorer] = {}  # as they were trained, where an engine answers for them
        for name in candidates[chosen]:
            self._scorer(name)

    @classmethod
    def load(cls, folder: Path) -> "Model":
        """The model of a folder, its chosen members loaded. Raises MillraceError naming what is missing."""
        body = read_json(folder / "model.json")
        members = {m["name"]: Member(m["name"], m["kind"], m["file"], Calibration(m["a"], m["b"])) for m in body["members"]}
        return cls(folder, body["chosen"], body["candidates"], members, body["prior"])

    @property
    def files(self) -> tuple[str, ...]:
        """What must ship for `predict`: file names inside the folder."""
        return ("model.json", *(self.members[name].file for name in self.candidates[self.chosen]))

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each member of the chosen candidate."""
        return {name: self.members[name].kind for name in self.candidates[self.chosen]}

    def parts(self) -> Iterator[tuple[float, float, Scorer]]:
        """The chosen candidate: its log-odds are the sum over these of slope · logit + offset. Trees are as they were trained:
        what compiled ones answer is not explained by themselves."""
        for name, weight in self.candidates[self.chosen].items():
            line = self.members[name].calibration
            yield weight * line.a, weight * line.b, self._trained(name)

    def predict(self, batch: "Batch") -> np.ndarray:
        """Calibrated probability of the chosen candidate, float64 (B)."""
        return self._candidate(self.chosen, {}, batch)

    def members_predict(self, batch: "Batch") -> dict[str, np.ndarray]:
        """Calibrated probability of every candidate whose files are here, chosen or not, by name."""
        logits: dict[str, np.ndarray] = {}
        return {
            name: self._candidate(name, logits, batch)
            for name, weights in self.candidates.items()
            if all((self.folder / self.members[m].file).is_file() for m in weights)
        }

    def answer(self, name: str, logits: Mapping[str, np.ndarray]) -> np.ndarray:
        """Calibrated probability of a candidate (B) by the raw logits of its members."""
        total = np.zeros(len(next(iter(logits.values()))))
        for member, weight in self.candidates[name].items():
            total += weight * self.members[member].calibration.logit(logits[member])
        return sigmoid(total)

    def raw(self, name: str, batch: "Batch") -> np.ndarray:
        """Raw logits of a member, float64 (B)."""
        return self._scorer(name).logit(batch)

    def _candidate(self, name: str, logits: dict[str, np.ndarray], batch: "Batch") -> np.ndarray:
        for member in self.candidates[name]:
            if member not in logits:
                logits[member] = self.raw(member, batch)
        return self.answer(name, logits)

    def _scorer(self, name: str) -> Scorer:
        if name not in self._scorers:
            member = self.members[name]
            path = self.folder / member.file
            if not path.is_file():
                raise MillraceError(f"{path}: not found, but model.json needs it; package the release again")
            try:
                self._scorers[name] = self._compiled(member) or KINDS[member.kind](path)
            except Exception as error:
                raise MillraceError(f"{path}: not readable as {member.kind} ({error}); train again") from error
        return self._scorers[name]

    def _trained(self, name: str) -> Scorer:
        member = self.members[name]
        if member.kind != "gbdt" or name not in self.served:
            return self._scorer(name)
        if name not in self._trees:
            self._trees[name] = TreeScorer(self.folder / member.file)
        return self._trees[name]

    def _compiled(self, member: Member) -> Scorer | None:
        """What was packaged to answer for a member in place of the default, if it can here."""
        served = read_served(self.folder).get(member.name)
        if served is None:
            return None
        from models.engines import compiled  # it is made of the scorers of this module

        found = compiled(self.folder, member.name, member.kind, served)
        if found:
            self.served[member.name] = served.engine
        return found
