"""What a bento's bundle holds, loaded: the endpoint and batch scoring answer by the same. B rows."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from features.facts import Columns
from features.frame import Feature, feature_list, resolve
from features.preprocess import Preprocess
from models.score import Model
from pipelines.clock import MISSING
from pipelines.manifest import read_json
from pipelines.spec import Spec


@dataclass(frozen=True)
class Loaded:
    """Spec, preprocessing and model of a release, and the digest of its features' definitions."""

    release: str
    defs: str
    spec: Spec
    preprocess: Preprocess
    model: Model
    features: tuple[Feature, ...]

    @classmethod
    def of(cls, bundle: Path) -> "Loaded":
        """Raises MillraceError for what the bundle lacks."""
        about = read_json(bundle / "bundle.json")
        spec = Spec.model_validate(json.loads((bundle / "spec.json").read_text()))
        for function in spec.features.functions:
            resolve(function.call)  # now, not at the first request: a bento that lacks it is refused
        body = yaml.safe_load((bundle.parents[1] / "bento.yaml").read_text())
        return cls(f"{body['name']}:{body['version']}", about["defs_digest"], spec, Preprocess.load(bundle / "preprocess.json"),
                   Model.load(bundle), feature_list(spec))  # fmt: skip


def outside_horizon(spec: Spec, own: Columns, now: int) -> list[bool]:
    """Which of B rows are not asked about at `now`: their time is unknown or farther from it than the tolerance."""
    at = spec.predict_at
    if at is None:
        return [False] * len(next(iter(own.values())))
    return [due == MISSING or abs(due - at.lead - now) > at.tolerance for due in own[at.column].tolist()]
