"""What `features: auto` proposes: a valid spec for any pipeline, none of the row's own outcome, and features like others."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from features.frame import feature_list
from features.ingest import ingest, read_table
from features.propose import chosen, propose, thin, with_features
from features.views import stored_views
from pipelines.errors import UsageError
from pipelines.home import open_home
from pipelines.spec import Spec, load_spec
from tests.agreement import World, features_at, frame_differences, make_world, same_frames, serve_world
from tests.oracle import Oracle
from tests.random_tables import random_case

SEEDS = range(2000, 2006)


def auto(settings: dict[str, object]) -> Spec:
    return Spec.model_validate({**settings, "features": {"auto": {"last": ["1h", "1d"]}}})


def with_spec(world: World, spec: Spec) -> World:
    """The same world asked for other features, and the oracle too."""
    settings = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    known = {name: [dict(row) for row in rows] for name, rows in world.case.tables.items()}
    return replace(world, spec=spec, then=Oracle(settings, known))


@pytest.mark.parametrize("block", range(2))
def test_a_valid_spec_is_proposed_for_any_pipeline(block: int) -> None:
    """And the outcome of the row itself is in none: no look at its label's source or a closing one by its key."""
    for seed in range(block * 50, block * 50 + 50):
        spec = auto(random_case(seed).spec)
        found = propose(spec).spec
        assert len({f.name for f in feature_list(found)}) == len(feature_list(found)) > 10
        for view in found.features.views.values():
            assert view.latest is None or view.latest.source not in (spec.label.source, *spec.closed_by)
        assert propose(spec).spec == found
        assert found.features.auto is None and Spec.model_validate(found.model_dump(mode="json", by_alias=True)) == found


@pytest.mark.parametrize("seed", SEEDS)
def test_proposed_features_are_those_of_the_oracle(seed: int, tmp_path: Path) -> None:
    """And the spec of a few of them gives these, the same bits, and stores no more than they need."""
    world = make_world(seed, tmp_path)
    proposal = thin(propose(auto(world.case.spec)), world.tables)
    world = with_spec(world, proposal.spec)
    asked = world.asked()[:12]
    every = features_at(serve_world(world, tmp_path / "every"), asked)
    assert frame_differences(world.spec, every, world.expected(asked), f"seed {seed}") == []
    kept = [feature.name for feature in feature_list(proposal.spec)][seed % 3 :: 3]
    spec = chosen(proposal.spec, kept)
    some = features_at(serve_world(with_spec(world, spec), tmp_path / "some"), asked)
    assert [f.name for f in feature_list(spec)] == kept
    assert same_frames(some, {name: every[name] for name in kept}) == []
    needed = {f.group for f in feature_list(proposal.spec) if f.name in kept}
    assert {stored.view for stored in stored_views(spec)} == needed & set(proposal.spec.features.views)


def test_what_is_written_stays_and_is_not_proposed_again() -> None:
    weather = {"latest": {"from": "weather", "key": ["origin"], "columns": ["temp"]}}
    features = {"auto": {}, "row": ["origin"], "views": {"weather": weather}}
    spec = with_features(load_spec("flights"), features)
    proposal = propose(spec)
    assert proposal.written == ("origin", "weather__temp")
    assert proposal.spec.features.views["weather"] == spec.features.views["weather"]
    names = [feature.name for feature in feature_list(proposal.spec)]
    assert names.count("origin") == 1 and "carrier" in names and "arrivals_by_dest_1h__positive_share" in names


def test_windows_without_facts_and_groups_that_name_what_a_smaller_one_names_go(flights_landing: Path, tmp_path: Path) -> None:
    home, spec = open_home(tmp_path), load_spec("flights", ["features=auto"])
    shutil.copytree(flights_landing, home.landing("flights"))
    snapshot = ingest(spec, home)
    proposal = thin(propose(spec), {name: read_table(spec, home, snapshot, name) for name in spec.sources})
    gone = {feature: drop for drop in proposal.dropped for feature in drop.features}
    assert gone["arrivals.arr_delay"].reason == gone["departures.dep_delay"].reason == "known only after"
    assert gone["arrivals_by_flight_1h__count"].reason == "too sparse"
    assert gone["arrivals_by_carrier_tailnum_7d__count"].why == "carrier, tailnum names the same groups as tailnum"
    assert gone["schedule_by_origin_before__gap_min"].reason == "too dense"
    stays = {feature.name for feature in feature_list(proposal.spec)}
    assert stays.isdisjoint(gone) and {"arrivals_by_flight_30d__count", "schedule_by_tailnum_before__gap_min"} <= stays


def test_auto_and_only_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="give either auto or only"):
        load_spec("tumours", ["features={auto: {}, only: [mean_radius]}"])


def test_an_unknown_name_in_only_is_told() -> None:
    spec = load_spec("tumours", ["features.only=[mean_radiu]"])
    with pytest.raises(UsageError, match="'mean_radiu' is not a feature; nearest: 'mean_radius'"):
        feature_list(spec)


def test_windows_that_do_not_rise_are_refused() -> None:
    with pytest.raises(UsageError, match="positive and rise"):
        load_spec("flights", ["features={auto: {last: [3h, 1h]}}"])
