"""Feast, imported in a third of the time: 2 s instead of 6.

Half of `import feast` is typeguard, which re-parses every function of Feast to check the types of its arguments at run
time; a quarter is torch, which Feast takes along where it finds it. Neither is needed here.
"""

import sys
from typing import Any
from unittest import mock

import typeguard


def _unchecked(target: Any = None, **_: Any) -> Any:
    return (lambda found: found) if target is None else target


if "feast" not in sys.modules:
    _without_torch = "torch" not in sys.modules
    if _without_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, as if it were not installed
    try:
        with mock.patch.object(typeguard, "typechecked", _unchecked):
            import feast  # noqa: F401
    finally:
        if _without_torch:
            del sys.modules["torch"]

from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType, types  # noqa: E402

__all__ = ["Entity", "FeatureService", "FeatureStore", "FeatureView", "Field", "FileSource", "ValueType", "types"]
