"""The serving process's import guard, and its proof: what a request may never wait for is not importable, and what
is ours comes from the bento or not at all.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

REFUSED = ("prefect", "optuna", "ray", "pytorch_lightning", "lightning", "great_expectations", "feast", "pandas", "sklearn")
OURS = ("pipelines", "features", "models", "deploy", "tasks", "flows")


class _Guard(MetaPathFinder):
    def __init__(self, inside: Path) -> None:
        self.inside = inside

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not available to a serving process", name=name)
        if name.partition(".")[0] not in OURS:
            return None
        # an editable install would give the checkout's module for one that the bento lacks
        spec = PathFinder.find_spec(name, path)
        where = [spec.origin] if spec and spec.origin else list((spec and spec.submodule_search_locations) or ())
        if spec is None or not all(Path(str(w)).resolve().is_relative_to(self.inside) for w in where):
            raise ModuleNotFoundError(f"{name} is not in {self.inside}: package the release again", name=name)
        return spec


def install(inside: Path) -> None:
    """From now on the refused packages raise ModuleNotFoundError, and so do modules of ours outside the folder.

    Optional imports of other libraries fall back.
    """
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard(inside))


def proof(inside: Path) -> dict[str, list[str]]:
    """Refused packages that are loaded all the same, and modules of ours that lie outside the folder."""
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(REFUSED))
    outside = [
        name
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in OURS
        and getattr(module, "__file__", None)
        and not Path(str(module.__file__)).resolve().is_relative_to(inside)
    ]
    return {"refused": loaded, "outside": sorted(outside)}
