"""A LightGBM booster as one ONNX operator: `TreeEnsemble` of ai.onnx.ml 5, whose thresholds may be as wide as LightGBM's own.

(What onnxmltools writes has thresholds of float32, and rows beside a split fall to its other side.)
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np

from models.engines import ZERO
from pipelines.errors import MillraceError

LEQ, MEMBER = 0, 6  # modes of a node: value <= split; value among the node's members
HUGE = 1e300
SUM, NONE = 1, 0  # how trees are added up, what is done with the sum


class _Nodes:
    """All trees as the columns of the operator, nodes in the order of a walk."""

    def __init__(self) -> None:
        self.feature: list[int] = []
        self.split: list[float] = []
        self.mode: list[int] = []
        self.missing: list[int] = []  # 1: a missing value counts as below
        self.below: list[tuple[int, int]] = []  # (node or leaf, 1 for a leaf)
        self.above: list[tuple[int, int]] = []
        self.members: list[float] = []
        self.leaves: list[float] = []
        self.roots: list[int] = []

    def add_tree(self, root: Mapping[str, Any]) -> None:
        """A tree that is one leaf becomes a node with that leaf on both sides."""
        place, leaf = self._add(root)
        if leaf:
            self._node(0, 0.0, LEQ, 1)
            self.below[-1] = self.above[-1] = (place, 1)
            place = len(self.feature) - 1
        self.roots.append(place)

    def _node(self, feature: int, split: float, mode: int, missing: int) -> int:
        for column, value in ((self.feature, feature), (self.split, split), (self.mode, mode), (self.missing, missing)):
            column.append(value)  # type: ignore[arg-type]
        self.below.append((0, 0))
        self.above.append((0, 0))
        return len(self.feature) - 1

    def _add(self, tree: Mapping[str, Any]) -> tuple[int, int]:
        if "split_feature" not in tree:
            self.leaves.append(float(tree["leaf_value"]))
            return len(self.leaves) - 1, 1
        if tree["decision_type"] == "==":
            place = self._node(tree["split_feature"], 0.0, MEMBER, 0)
            self.members += [*map(float, tree["threshold"].split("||")), np.nan]
        else:
            split, missing = _split(tree), tree["missing_type"]
            if missing == "Zero":
                raise MillraceError("zeros count as missing, which ONNX does not know")
            place = self._node(tree["split_feature"], split, LEQ, int(split >= 0 if missing == "None" else tree["default_left"]))
        self.below[place] = self._add(tree["left_child"])
        self.above[place] = self._add(tree["right_child"])
        return place, 0


def _split(tree: Mapping[str, Any]) -> float:
    """A node's split by number, as it works. LightGBM dumps an infinite one, which parts what is missing from all else, as 1e300;
    and it reads what is as near to 0 as ZERO as 0, so that a split there lies at the edge.
    """
    split = float(tree["threshold"])
    if abs(split) >= HUGE:
        return math.copysign(math.inf, split)
    if -ZERO <= split < 0:
        return math.nextafter(-ZERO, -math.inf)
    return ZERO if 0 <= split < ZERO else split


def write_trees(text: str, path: Path, dtype: type[np.floating]) -> None:
    """Writes the booster of a model text; `dtype` of thresholds, leaves and inputs: float64 is exact, float32 moves splits.

    Raises MillraceError for trees that ONNX cannot hold.
    """
    import onnx  # half a second, which a command that finds nothing new does not need
    from onnx import helper, numpy_helper

    dumped = lgb.Booster(model_str=text).dump_model()
    nodes = _Nodes()
    for tree in dumped["tree_info"]:
        nodes.add_tree(tree["tree_structure"])
    with np.errstate(over="ignore"):  # a split above all numbers is infinite in float32
        wide = {name: np.array(values, np.float64).astype(dtype)
                for name, values in (("nodes_splits", nodes.split), ("leaf_weights", nodes.leaves),
                                     ("membership_values", nodes.members)) if values}  # fmt: skip
    node = helper.make_node(
        "TreeEnsemble", ["x"], ["logit"], domain="ai.onnx.ml", n_targets=1, aggregate_function=SUM, post_transform=NONE,
        tree_roots=nodes.roots, nodes_featureids=nodes.feature, nodes_missing_value_tracks_true=nodes.missing,
        nodes_modes=numpy_helper.from_array(np.array(nodes.mode, np.uint8), "nodes_modes"),
        nodes_truenodeids=[i for i, _ in nodes.below], nodes_trueleafs=[leaf for _, leaf in nodes.below],
        nodes_falsenodeids=[i for i, _ in nodes.above], nodes_falseleafs=[leaf for _, leaf in nodes.above],
        leaf_targetids=[0] * len(nodes.leaves), **{name: numpy_helper.from_array(v, name) for name, v in wide.items()},
    )  # fmt: skip
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    columns = dumped["max_feature_idx"] + 1
    graph = helper.make_graph([node], "trees", [helper.make_tensor_value_info("x", kind, ["rows", columns])],
                              [helper.make_tensor_value_info("logit", kind, ["rows", 1])])  # fmt: skip
    opsets = [helper.make_opsetid("ai.onnx.ml", 5), helper.make_opsetid("", 21)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def thresholds(text: str) -> dict[int, np.ndarray]:
    """Column → its distinct splits by number, ascending."""
    found: dict[int, set[float]] = {}
    waiting = [tree["tree_structure"] for tree in lgb.Booster(model_str=text).dump_model()["tree_info"]]
    while waiting:
        tree = waiting.pop()
        if "split_feature" in tree:
            if tree["decision_type"] == "<=":
                found.setdefault(tree["split_feature"], set()).add(_split(tree))
            waiting += [tree["left_child"], tree["right_child"]]
    return {column: np.sort(list(values)) for column, values in found.items()}
