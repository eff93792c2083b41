"""Which proposed features stay: chosen on the training part alone, and each with the reason why.

In order: what tells nothing, what tells too much, what another one tells already, what a model gains no more from than from
noise, and whole views that are looked up for nothing that can be measured. N rows, F features.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features import preprocess
from features.facts import Columns
from features.frame import Feature, feature_list, is_missing
from features.ingest import Snapshot, read_table
from features.keys import KNOWN
from features.propose import Proposal, chosen, propose, thin
from features.rows import PARTS, Rows, prediction_rows
from features.store import FeatureSet, apply_feast, historical_features, write_views
from features.views import stored_for, stored_views
from models.evaluate import auc
from models.gbdt import fit_gbdt, importance
from pipelines.clock import MISSING
from pipelines.errors import Refused
from pipelines.home import Home
from pipelines.manifest import Note, write_json, write_page
from pipelines.spec import Latest, Spec
from pipelines.spec import Sequence as Chain

STRETCHES = 8  # of time; from every other one trees learn, the rows of the others judge them
LEARNING = {"learning_rate": 0.1, "max_rounds": 100}  # a ranking needs fewer trees than a model, of fewer leaves and edges
LEAVES, EDGES = 31, {"max_bin": 63}
FEWER = 0.8  # of the views stay from one step to the next
PROBES = 20  # columns of noise; a feature has to beat the best of them
SAMPLED = 20_000  # rows, at most, by which features are compared with one another
TREND = 0.9  # rank correlation with time from which a feature tells when a row is, and nothing about later rows
KEPT = "kept"


@dataclass(frozen=True)
class Verdict:
    """One feature: kept or why not, in a word and a sentence; its AUC alone, and its share of the trees' gain."""

    feature: str
    group: str
    reason: str
    why: str
    auc: float | None = None
    gain: float | None = None

    @property
    def kept(self) -> bool:
        return self.reason == KEPT


def choose_into(spec: Spec, home: Home, snapshot: Snapshot, as_of: int, out: Path) -> Note:
    """The stage: proposes, computes on the newest training rows, chooses. Writes `spec.json` and `chosen.json`."""
    auto = spec.features.auto
    assert auto is not None
    tables = {name: read_table(spec, home, snapshot, name) for name in spec.sources}
    rows = prediction_rows(spec, tables, as_of)
    at = np.flatnonzero(rows.part == PARTS.index("train"))[-auto.rows :]
    if spec.timed:
        end = int(rows.t[at].max())
        tables = {n: t.filter(pc.less_equal(t[KNOWN].cast(pa.int64()), end)) for n, t in tables.items()}
    proposal = thin(propose(spec), tables)
    frame = _frame(proposal.spec, home, tables, rows, at, out)
    label = rows.label[at].astype(np.float64)
    verdicts = [Verdict(f, d.group, d.reason, d.why) for d in proposal.dropped for f in d.features]
    verdicts += choose(spec, proposal, frame, label, rows.t[at])
    kept = [v.feature for v in verdicts if v.kept]
    if not kept:
        raise Refused(
            f"features: auto: none of {len(verdicts)} proposed features tells the label better than noise does "
            f"({len(at):,} training rows); declare more columns, or write features by hand"
        )
    resolved = chosen(proposal.spec, kept)
    counted = Counter(v.reason for v in verdicts)
    write_json(out / "spec.json", resolved.model_dump(mode="json", by_alias=True))
    write_json(out / "chosen.json", {"rows": len(at), "counts": counted, "verdicts": [asdict(v) for v in verdicts]})
    write_page(out / "page.md", f"{spec.pipeline}: features that were proposed", [
        ("Counts", [(reason, f"{count:,}") for reason, count in counted.most_common()]),
        ("Verdicts", [("feature", "verdict", "why"), *((v.feature, v.reason, v.why) for v in verdicts)]),
    ])  # fmt: skip
    kept_of, views = f"{counted[KEPT]} of {len(verdicts)} proposed features kept", len(stored_views(resolved))
    return Note(f"{kept_of}, in {views} stored views, by {len(at):,} training rows")


def _frame(spec: Spec, home: Home, tables: Mapping[str, pa.Table], rows: Rows, at: np.ndarray, out: Path) -> Columns:
    """The features of the rows at these positions, by a feature folder that is gone afterwards."""
    table, t = rows.table.take(pa.array(at)).combine_chunks(), rows.t[at]
    folder = Path(tempfile.mkdtemp(prefix=".autofe-", dir=out))
    try:
        write_views(spec, tables, folder, int(t.min()) if spec.timed else MISSING)
        apply_feast(spec, folder, "nowhere")
        return historical_features(spec, home, FeatureSet(home.relative(folder), "", "", "", MISSING, 0), table, t)
    finally:
        shutil.rmtree(folder)


def choose(spec: Spec, proposal: Proposal, frame: Columns, label: np.ndarray, t: np.ndarray) -> list[Verdict]:
    """A verdict for each feature of the proposal, by N training rows in the order of t. What was written stays."""
    auto, written = spec.features.auto, set(proposal.written)
    assert auto is not None
    features = feature_list(proposal.spec)
    own = [f for f in features if f.name in written]
    found: dict[str, Verdict] = {f.name: Verdict(f.name, f.group, KEPT, "written in the spec") for f in own}
    coded = {f.name: _coded(frame[f.name]) for f in features}
    step = -(-len(t) // SAMPLED)
    alone = {name: alone_auc(values[::step], label[::step]) for name, values in coded.items()}

    def drop(feature: Feature, reason: str, why: str) -> None:
        found[feature.name] = Verdict(feature.name, feature.group, reason, why, round(alone[feature.name], 4))

    values_of = {name: len(np.unique(values[::step])) for name, values in coded.items()}
    moment, left = _ranks(t[::step]), []
    for feature in sorted(features, key=lambda f: (f.name not in written, _cost(proposal.spec, f), -values_of[f.name], f.name)):
        name, values = feature.name, coded[feature.name]
        trend = abs(float(_ranks(values[::step]) @ moment))
        if name in written:
            left.append(feature)
        elif is_missing(frame[name]).all():
            drop(feature, "known only after", "no row has a value at its prediction time")
        elif (values == values[0]).all():
            drop(feature, "constant", "every row has the same value")
        elif alone[name] >= auto.too_good:
            drop(feature, "too good", f"alone it has an AUC of {alone[name]:.3f}: a leak is likelier than luck")
        elif feature.kind == "category" and values_of[name] ** 2 > len(t):
            drop(feature, "too many values", f"{values_of[name]:,} values in {len(t):,} rows; windows by it tell more")
        elif feature.kind == "number" and trend >= TREND:
            drop(feature, "follows time", f"rank correlation {trend:.3f} with time: it tells the date of a row")
        else:
            left.append(feature)
    for feature, other, likeness in duplicates(left, coded, auto.alike):
        if feature.name not in written:
            drop(feature, "duplicate", f"rank correlation {likeness:.3f} with {other.name}, which stays")
    left = [f for f in left if f.name not in found or f.name in written]
    gain, noise = gains(spec, left, frame, label)
    ranked = sorted((f for f in left if f.name not in written), key=lambda f: (-gain[f.name], f.name))
    room = max(auto.keep - len(written), 0)
    strong = [f for f in ranked if gain[f.name] > noise][:room]
    served = fewest_views(spec, proposal, [*own, *strong], gain, frame, label)
    for feature in ranked:
        share = gain[feature.name]
        reason, why = KEPT, f"{share:.2%} of the gain of all splits, noise has {noise:.2%}"
        if feature not in strong:
            reason = "weak" if share <= noise else "over the limit"
        elif not served.holds(feature):
            reason, why = "not worth a view", f"{why}; {served.why}"
        found[feature.name] = Verdict(feature.name, feature.group, reason, why, round(alone[feature.name], 4), round(share, 6))
    return sorted(found.values(), key=lambda v: (not v.kept, -(v.gain or 0.0), v.feature))


@dataclass(frozen=True)
class Served:
    """The stored views that are worth to be looked up at every request, and by what figures."""

    views: set[str]
    needed: Mapping[str, set[str]]  # by feature; those of no view are not in it
    why: str = ""

    def holds(self, feature: Feature) -> bool:
        return self.views >= self.needed.get(feature.name, set())


def fewest_views(
    spec: Spec, proposal: Proposal, features: Sequence[Feature], gain: Mapping[str, float], frame: Columns, label: np.ndarray
) -> Served:  # fmt: skip
    """As few stored views as answer no worse than more of them, by one standard error of the difference in log loss.

    The views that the trees gain least from go first; those that were written features need stay.
    """
    weight, free, needed = Counter[str](), set[str](), stored_for(proposal.spec)
    for feature in features:
        views = needed.get(feature.name, set())
        free.update(views if feature.name in proposal.written else ())
        weight.update(dict.fromkeys(views, gain[feature.name]))
    order = sorted(weight.keys() - free, key=lambda view: (-weight[view], view))

    def losses(size: int) -> np.ndarray | None:
        held = Served(free.union(order[:size]), needed)
        some = [f for f in features if held.holds(f)]
        return _learned(spec, some, frame, label).losses if some else None

    size = len(order)
    best = losses(size)
    while size and best is not None:
        fewer = losses(int(FEWER * size))
        if fewer is None or (fewer - best).mean() > (fewer - best).std() / np.sqrt(len(best)):
            break
        size, best = int(FEWER * size), min(best, fewer, key=np.mean)
    told = f"{size + len(free)} of {len(order) + len(free)} stored views answer no worse than more of them"
    return Served(free.union(order[:size]), needed, told)


def _cost(spec: Spec, feature: Feature) -> tuple[int, int]:
    """What a feature takes to serve, least first: the row alone, a newest fact, a window by a longer and longer key."""
    view = spec.features.views.get(feature.group)
    if view is None:
        return (0 if feature.group == "row" else 1, 0)
    kind = 2 if isinstance(view.shape, Latest) else 4 if isinstance(view.shape, Chain) else 3
    return (kind, len(view.shape.key))


def _coded(values: np.ndarray) -> np.ndarray:
    """Numbers as they are, categories as codes by how often they occur; missing is below all (float64, N)."""
    if values.dtype == object:
        texts = np.array([f"={value}" if value is not None else "" for value in values])
        words, inverse, counts = np.unique(texts, return_inverse=True, return_counts=True)
        place = np.empty(len(words))
        place[np.lexsort((words, -counts))] = np.arange(len(words))
        place[words == ""] = -1
        return place[inverse]
    return np.where(np.isnan(values), -np.inf, values)


def alone_auc(values: np.ndarray, label: np.ndarray) -> float:
    """AUC of one feature alone, whatever its shape: the mean label of its bins on every other row, judged on the rest."""
    bins = min(max(len(label) // 50, 4), 64)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], method="nearest"))
    place = np.searchsorted(edges, values, side="left") * 2 + np.isin(values, edges)  # an edge is a bin of its own
    learned, judged = slice(0, None, 2), slice(1, None, 2)
    size = int(place.max()) + 1
    seen, hits = np.bincount(place[learned], minlength=size), np.bincount(place[learned], label[learned], minlength=size)
    prior = label[learned].mean()
    told = label[judged]
    if not 0 < told.mean() < 1:
        return 0.5
    return auc(told, ((hits + prior) / (seen + 1))[place[judged]])


def duplicates(
    features: Sequence[Feature], coded: Mapping[str, np.ndarray], alike: float
) -> list[tuple[Feature, Feature, float]]:  # fmt: skip
    """(feature, an earlier one that stays, their rank correlation) of each that goes; the features are in order of cost.

    Categories are alike where they part the rows alike.
    """
    found: list[tuple[Feature, Feature, float]] = []
    for kind in ("number", "category"):
        some = [f for f in features if f.kind == kind]
        if len(some) < 2:
            continue
        step = -(-len(coded[some[0].name]) // SAMPLED)
        ranks = np.stack([_ranks(coded[f.name][::step]) for f in some]).astype(np.float32)
        likeness = np.abs(ranks @ ranks.T).astype(np.float64)
        stays: list[int] = []
        for i, feature in enumerate(some):
            twin = next((j for j in stays if likeness[i, j] >= alike), None)
            if twin is None:
                stays.append(i)
            else:
                found.append((feature, some[twin], min(float(likeness[i, twin]), 1.0)))
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties shared, of mean 0 and length 1 (N); zeros where all values are one."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    ranks = middle[inverse] - len(values) / 2
    length = float(np.sqrt((ranks**2).sum()))
    return ranks / length if length else ranks


@dataclass(frozen=True)
class _Learned:
    """Trees of some rows: each feature's share of the gain of all splits, and the log loss of each row that judges them."""

    share: dict[str, float]
    losses: np.ndarray


def _learned(spec: Spec, features: Sequence[Feature], frame: Columns, label: np.ndarray) -> _Learned:
    """The trees learn from every other stretch of time, and stop where the rows of the others no longer gain."""
    judged = np.arange(len(label)) * STRETCHES // len(label) % 2 == 1
    part = np.where(judged, PARTS.index("valid_fit"), PARTS.index("train"))
    fitted = preprocess.fit(frame, ~judged, features)
    batch = fitted.transform(frame)
    params = spec.gbdt.model_copy(update={**LEARNING, "num_leaves": min(spec.gbdt.num_leaves, LEAVES)})
    trees = fit_gbdt(params, batch, label, part, spec.seed, extra=EDGES, threads=1)  # a second one gains little, others lose it
    share = dict(zip((*fitted.numbers, *fitted.categories), importance(trees.text).tolist(), strict=True))
    told = np.asarray(lgb.Booster(model_str=trees.text).predict(batch.take(np.flatnonzero(judged)).trees), np.float64)
    return _Learned(share, -np.log(np.maximum(np.where(label[judged] == 1, told, 1 - told), 1e-15)))


def gains(spec: Spec, features: Sequence[Feature], frame: Columns, label: np.ndarray) -> tuple[dict[str, float], float]:
    """Share of the gain of all splits by feature, and the share that the best of PROBES columns of noise gets."""
    rng = np.random.default_rng(spec.seed)
    probes = [Feature(f"_noise_{i}", "number", "") for i in range(PROBES)]
    both = {f.name: frame[f.name] for f in features} | {p.name: rng.normal(size=len(label)) for p in probes}
    share = _learned(spec, [*features, *probes], both, label).share
    return share, max(share[p.name] for p in probes)
