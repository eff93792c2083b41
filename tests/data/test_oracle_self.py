"""The oracle against examples worked by hand from the text, so that it can judge the code.

Times are µs and tiny: `10us` back from 100 is 90.
"""

from collections import Counter
from itertools import combinations
from typing import Any

import pytest

from tests.oracle import Oracle, duration
from tests.random_tables import Case, random_case

M = 60_000_000  # a minute

PLAN = {
    "kind": "plan",
    "key": ["id"],
    "event_time": "due",
    "known_at": {"column": "known"},
    "columns": {"id": "string", "g": "string", "h": "int64", "chain": "string", "due": "timestamp",
                "until": "timestamp", "x": {"type": "float64", "resolution": 0.5}, "known": "timestamp"},
}
SEEN = {
    "key": ["id"],
    "event_time": "at",
    "known_at": {"column": "known"},
    "columns": {"id": "string", "g": "string", "h": "int64", "at": "timestamp", "x": {"type": "float64",
                "resolution": 0.5}, "n": "int64", "b": "bool", "known": "timestamp"},
}


def plan(id: str, due: int, known: int, **more: Any) -> dict[str, Any]:
    row = {"id": id, "g": "a", "h": 1, "chain": "c", "due": due, "until": None, "x": 1.0, "known": known}
    return {**row, **more}


def seen(id: str, at: int, known: int, **more: Any) -> dict[str, Any]:
    return {"id": id, "g": "a", "h": 1, "at": at, "x": 1.0, "n": 1, "b": True, "known": known, **more}


def oracle(
    plans: list[dict[str, Any]] | None = None, facts: list[dict[str, Any]] | None = None, **changes: Any
) -> Oracle:
    """Plans that are rows 10 µs before they are due; facts of source `seen` close and label them."""
    spec: dict[str, Any] = {
        "sources": {"plans": PLAN, "seen": SEEN, **changes.pop("sources", {})},
        "rows": {"from": "plans", "key": ["id"]},
        "predict_at": {"column": "due", "lead": "10us", "tolerance": "1us"},
        "closed_by": ["seen"],
        "label": {"from": "seen", "column": "x", "gt": 1},
        "label_delay": "5us",
        "split": {"train": "20us", "valid_fit": "10us", "valid_select": "10us", "test": "15us",
                  "purge": "5us"},
        "features": {"views": changes.pop("views", {})},
    }
    return Oracle({**spec, **changes}, {"plans": plans or [], "seen": facts or []})


def view(t: int, shape: str, settings: dict[str, Any], plans: list[Any], seen: list[Any], **row: Any) -> Any:
    """The features of one view named v."""
    asked = oracle(plans, seen, views={"v": {shape: settings}})
    return asked.features({"g": "a", "h": 1, "chain": "c", **row}, t)


def window(t: int, facts: list[Any], row: dict[str, Any] | None = None, **settings: Any) -> Any:
    shape = {"from": "seen", "key": ["g"], "last": ["10us"], **settings}
    return view(t, "window", shape, [], facts, **(row or {}))


def opened(t: int, plans: list[Any], facts: list[Any], **settings: Any) -> Any:
    shape = {"from": "plans", "key": ["g"], "over": "due", "last": ["10us"], "closed_by": ["seen"]}
    return view(t, "open", {**shape, **settings}, plans, facts)


def latest(t: int, facts: list[Any], row: dict[str, Any] | None = None, **settings: Any) -> Any:
    shape = {"from": "seen", "key": ["g"], "columns": ["x"], **settings}
    return view(t, "latest", shape, [], facts, **(row or {}))


def sequence(t: int, row: dict[str, Any], plans: list[Any], seen: list[Any], **settings: Any) -> Any:
    shape = {"from": "plans", "key": ["chain"], "order": "due", "within": "50us", **settings}
    return view(t, "sequence", shape, plans, seen, **row)


@pytest.mark.parametrize(
    ("text", "us"),
    [("7us", 7), ("2ms", 2_000), ("90s", 90 * 10**6), ("60m", 3_600_000_000), ("-1h", -3_600_000_000),
     ("30d", 2_592_000_000_000), ("0s", 0), (5, 5)],
)
def test_durations(text: str | int, us: int) -> None:
    assert duration(text) == us


# Windows


@pytest.mark.parametrize(("at", "count"), [(89, 0), (90, 0), (91, 1), (99, 1), (100, 1)])
def test_past_window_leaves_out_its_begin_and_has_its_end(at: int, count: int) -> None:
    assert window(100, [seen("k", at, at)]) == {"v_10us__count": count}


@pytest.mark.parametrize(("due", "count"), [(100, 0), (101, 1), (110, 1), (111, 0)])
def test_future_window_leaves_out_t_and_has_its_end(due: int, count: int) -> None:
    shape = {"from": "plans", "next": ["10us"]}
    assert view(100, "window", shape, [plan("k", due, 5)], []) == {"v_next_10us__count": count}


@pytest.mark.parametrize(("known", "count"), [(99, 1), (100, 1), (101, 0)])
def test_only_what_is_known_at_t_counts(known: int, count: int) -> None:
    assert window(100, [seen("k", 95, known)]) == {"v_10us__count": count}


def test_known_at_by_lag_and_by_arrival() -> None:
    shape = {"window": {"from": "s", "last": ["10us"]}}
    lagged = oracle(sources={"s": {**SEEN, "known_at": {"lag": "3us"}}}, views={"v": shape})
    rows = [seen("k", 95, 0), seen("l", 97, 0), seen("m", 98, 0)]
    assert Oracle(lagged.spec, {"s": rows}).features({}, 100) == {"v_10us__count": 2}
    arrived = oracle(sources={"s": {**SEEN, "known_at": {"arrival": True}}}, views={"v": shape})
    rows = [{**seen("k", 95, 0), "_arrival": 100}, {**seen("l", 95, 0), "_arrival": 101}]
    assert Oracle(arrived.spec, {"s": rows}).features({}, 100) == {"v_10us__count": 1}


def test_a_correction_counts_from_its_known_at_on() -> None:
    facts = [seen("k", 95, 96, x=1.0), seen("k", 95, 99, x=4.0)]
    assert window(98, facts, mean=["x"]) == {"v_10us__count": 1, "v_10us__x_mean": 1.0}
    assert window(99, facts, mean=["x"]) == {"v_10us__count": 1, "v_10us__x_mean": 4.0}


def test_a_correction_moves_a_fact_out_of_the_window_and_out_of_the_group() -> None:
    moved = [seen("k", 95, 96), seen("k", 80, 99)]
    assert [window(t, moved)["v_10us__count"] for t in (98, 99)] == [1, 0]
    regrouped = [seen("k", 95, 96, g="a"), seen("k", 95, 99, g="b")]
    assert [window(t, regrouped)["v_10us__count"] for t in (98, 99)] == [1, 0]
    assert [window(t, regrouped, {"g": "b"})["v_10us__count"] for t in (98, 99)] == [0, 1]


def test_null_in_the_key_is_unknown_and_matches_nothing() -> None:
    facts = [seen("k", 95, 95, g=None), seen("l", 95, 95)]
    assert window(100, facts, {"g": None}, mean=["x"]) == {"v_10us__count": None, "v_10us__x_mean": None}
    assert window(100, facts, {"h": None}, key=["g", "h"]) == {"v_10us__count": None}
    assert window(100, facts)["v_10us__count"] == 1


def test_a_key_that_was_never_seen_has_counts_of_nought() -> None:
    share = {"big": {"column": "x", "gt": 1}}
    assert window(100, [seen("k", 95, 95)], {"g": "z"}, mean=["x"], std=["x"], share=share) == {
        "v_10us__count": 0, "v_10us__x_mean": None, "v_10us__x_std": None, "v_10us__big_share": None
    }


def test_no_key_means_all_facts() -> None:
    facts = [seen("k", 95, 95, g=None), seen("l", 95, 95, g="b"), seen("m", 95, 95)]
    assert window(100, facts, {"g": None}, key=[]) == {"v_10us__count": 3}


def test_a_sum_is_over_steps_and_0_of_nothing() -> None:
    facts = [seen(k, 95, 95, x=x) for k, x in (("k", 1.0), ("l", 4.25), ("m", None))]
    assert window(100, facts, sum=["x"], count=False) == {"v_10us__x_sum": 5.0}
    assert window(100, facts[2:], sum=["x"], count=False) == {"v_10us__x_sum": 0.0}


def test_mean_and_std_are_over_steps_and_leave_nulls_out() -> None:
    facts = [seen(k, 95, 95, x=x) for k, x in (("k", 1.0), ("l", 4.0), ("m", None))]
    found = window(100, facts, mean=["x"], std=["x"])
    assert found == {"v_10us__count": 3, "v_10us__x_mean": 2.5, "v_10us__x_std": 1.5}
    assert window(100, facts[2:], mean=["x"], std=["x"]) == {
        "v_10us__count": 1, "v_10us__x_mean": None, "v_10us__x_std": None
    }


@pytest.mark.parametrize(("x", "kept"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (-0.75, -1.0), (0.3, 0.5)])
def test_sums_keep_steps_of_the_resolution_halves_to_even(x: float, kept: float) -> None:
    assert window(100, [seen("k", 95, 95, x=x)], mean=["x"])["v_10us__x_mean"] == kept


def test_mean_of_whole_numbers_and_of_truths() -> None:
    facts = [seen("k", 95, 95, n=1, b=True), seen("l", 95, 95, n=4, b=False)]
    found = window(100, facts, mean=["n", "b"], count=False)
    assert found == {"v_10us__n_mean": 2.5, "v_10us__b_mean": 0.5}


@pytest.mark.parametrize(
    ("condition", "share"),
    [({"gt": 2}, 1 / 3), ({"ge": 2}, 2 / 3), ({"lt": 2}, 1 / 3), ({"le": 2}, 2 / 3), ({"eq": 2}, 1 / 3)],
)
def test_share_is_of_the_facts_that_have_a_value(condition: dict[str, float], share: float) -> None:
    facts = [seen(k, 95, 95, n=n) for k, n in (("k", 1), ("l", 2), ("m", 3), ("o", None))]
    assert window(100, facts, share={"s": {"column": "n", **condition}})["v_10us__s_share"] == share


def test_a_window_over_another_column_and_in_two_lengths() -> None:
    plans = [plan("k", 200, 5, until=93), plan("l", 99, 5, until=None), plan("m", 200, 5, until=100)]
    shape = {"from": "plans", "over": "until", "last": ["5us", "10us"], "next": ["1us"]}
    assert view(100, "window", shape, plans, []) == {
        "v_5us__count": 1, "v_10us__count": 2, "v_next_1us__count": 0
    }


def test_identical_rows_count_once_and_other_values_are_refused() -> None:
    assert window(100, [seen("k", 95, 95), seen("k", 95, 95)]) == {"v_10us__count": 1}
    with pytest.raises(ValueError, match="other values"):
        oracle([], [seen("k", 95, 95), seen("k", 95, 95, x=2.0)])
    with pytest.raises(ValueError, match="before its event"):
        oracle([], [seen("k", 95, 94)])


# Open


def test_the_backlog_is_what_is_due_and_not_closed() -> None:
    plans = [plan("k", 4 * M, 0), plan("l", 7 * M, 0), plan("m", 8 * M, 0), plan("n", 10 * M, 0)]
    facts = [seen("m", 8 * M, 9 * M)]
    # (4, 10] minutes: l, m, n are due; m is closed; l is 3 minutes late and n is not late yet
    assert opened(10 * M, plans, facts, last=["6m"]) == {
        "v_6m__due": 3, "v_6m__open": 2, "v_6m__open_share": 2 / 3, "v_6m__late_mean": 1.5
    }


@pytest.mark.parametrize(("known", "still_open"), [(99, 0), (100, 0), (101, 1)])
def test_a_plan_is_open_until_its_closing_fact_is_known(known: int, still_open: int) -> None:
    assert opened(100, [plan("k", 95, 5)], [seen("k", 95, known)])["v_10us__open"] == still_open


def test_a_closing_fact_counts_whatever_its_own_columns_say() -> None:
    facts = [seen("k", 20, 30, g="b", x=None), seen("z", 95, 95)]
    assert opened(100, [plan("k", 95, 5)], facts) == {
        "v_10us__due": 1, "v_10us__open": 0, "v_10us__open_share": 0.0, "v_10us__late_mean": None
    }


def test_a_plan_that_was_moved_is_due_at_its_newest_time() -> None:
    plans = [plan("k", 95, 5), plan("k", 120, 98)]
    assert [opened(t, plans, [])["v_10us__due"] for t in (97, 98, 120, 129, 130)] == [1, 0, 1, 1, 0]


def test_nothing_due() -> None:
    assert opened(100, [plan("k", 95, 5, g="b")], []) == {
        "v_10us__due": 0, "v_10us__open": 0, "v_10us__open_share": None, "v_10us__late_mean": None
    }


# Latest


@pytest.mark.parametrize(("at", "x"), [(89, None), (90, 1.0), (91, 1.0)])
def test_ttl_has_its_edge(at: int, x: float | None) -> None:
    assert latest(100, [seen("k", at, 95)], ttl="10us") == {"v__x": x}


def test_the_newest_event_counts_not_the_newest_known() -> None:
    facts = [seen("k", 90, 91, x=1.0), seen("l", 80, 99, x=2.0), seen("m", 95, 101, x=3.0)]
    assert [latest(t, facts)["v__x"] for t in (85, 91, 99, 101)] == [None, 1.0, 1.0, 3.0]


def test_ties_of_latest_go_to_the_later_known_then_to_the_greater_key() -> None:
    assert latest(100, [seen("z", 90, 91, x=1.0), seen("a", 90, 92, x=2.0)]) == {"v__x": 2.0}
    assert latest(100, [seen("z", 90, 91, x=1.0), seen("a", 90, 91, x=2.0)]) == {"v__x": 1.0}


def test_a_null_in_the_newest_fact_is_not_filled_from_an_older_one() -> None:
    assert latest(100, [seen("k", 90, 91), seen("l", 95, 95, x=None)]) == {"v__x": None}


def test_a_correction_to_an_earlier_event_gives_way_to_another_fact() -> None:
    facts = [seen("k", 90, 90, x=1.0), seen("l", 95, 95, x=2.0), seen("l", 85, 98, x=3.0)]
    assert [latest(t, facts)["v__x"] for t in (97, 98)] == [2.0, 1.0]


def test_change_is_against_what_was_known_then_by_the_rule_of_then() -> None:
    facts = [seen("k", 80, 81, x=1.0), seen("l", 90, 97, x=5.0), seen("m", 96, 96, x=7.0)]
    change = {"columns": ["x"], "over": ["5us", "10us", "20us"]}
    # at 95 and 90 only k was known, at 80 nothing was; l came late
    assert latest(100, facts, change=change) == {
        "v__x": 7.0, "v__x_change_5us": 6.0, "v__x_change_10us": 6.0, "v__x_change_20us": None
    }
    # at 91 k is just too old, at 90 just not
    change = {"columns": ["x"], "over": ["10us"]}
    assert latest(101, facts, ttl="10us", change=change) == {"v__x": 7.0, "v__x_change_10us": None}
    assert latest(100, facts, ttl="10us", change=change) == {"v__x": 7.0, "v__x_change_10us": 6.0}


def test_latest_of_an_unknown_group_and_of_a_null_group() -> None:
    facts = [seen("k", 90, 91, g=None), seen("l", 90, 91)]
    assert latest(100, facts, {"g": "z"}) == {"v__x": None}
    assert latest(100, facts, {"g": None}) == {"v__x": None}


# Sequence


@pytest.mark.parametrize(("due", "gap"), [(49, None), (50, 50 / M), (99, 1 / M), (100, None)])
def test_the_previous_plan_lies_within_and_before(due: int, gap: float | None) -> None:
    assert sequence(60, {"due": 100}, [plan("k", due, 5)], []) == {"v__gap_min": gap}


def test_the_previous_plan_and_what_is_known_of_it() -> None:
    plans = [plan("k", 10 * M, 0, x=1.0), plan("l", 20 * M, 0, x=2.0, until=32 * M),
             plan("m", 25 * M, 0, chain="d"), plan("n", 28 * M, 41 * M)]
    facts = [seen("l", 20 * M, 21 * M, n=7), seen("l", 20 * M, 41 * M, n=9), seen("k", 39 * M, 40 * M, n=5)]
    shape = {"within": "1h", "columns": ["x", "until"], "facts": {"seen": ["n"]}}
    assert sequence(40 * M, {"due": 50 * M}, plans, facts, **shape) == {
        "v__gap_min": 30.0, "v__x": 2.0, "v__until_min": 8.0, "v__seen_n": 7
    }
    # n, announced since, takes the place of l; nothing is known of n
    assert sequence(41 * M, {"due": 50 * M}, plans, facts, **shape) == {
        "v__gap_min": 22.0, "v__x": 1.0, "v__until_min": None, "v__seen_n": None
    }


def test_ties_of_a_sequence_go_to_the_later_known_then_to_the_greater_key() -> None:
    plans = [plan("z", 90, 5, x=1.0), plan("a", 90, 6, x=2.0)]
    assert sequence(95, {"due": 100}, plans, [], columns=["x"])["v__x"] == 2.0
    plans = [plan("z", 90, 5, x=1.0), plan("a", 90, 5, x=2.0)]
    assert sequence(95, {"due": 100}, plans, [], columns=["x"])["v__x"] == 1.0


def test_a_sequence_without_chain_or_without_own_place_is_missing() -> None:
    plans = [plan("k", 90, 5), plan("l", 90, 5, chain=None)]
    nothing = {"v__gap_min": None, "v__x": None, "v__seen_n": None}
    for row in ({"due": 100, "chain": None}, {"due": None, "chain": "c"}, {"due": 100, "chain": "z"}):
        found = sequence(95, row, plans, [seen("k", 90, 90)], columns=["x"], facts={"seen": ["n"]})
        assert found == nothing


# Row columns and calendar


def test_row_columns_and_missing_request_fields() -> None:
    asked = oracle(features={"row": ["g", "h"], "views": {"v": {"window": {"from": "seen", "key": ["h"],
                                                                           "last": ["10us"]}}}})
    assert asked.features({"g": "a"}, 100) == {"g": "a", "h": None, "v_10us__count": None}


def test_calendar_is_local_and_monday_is_nought() -> None:
    parts = ["minute_of_day", "hour", "weekday", "day", "month", "day_of_year"]
    asked = oracle(features={"calendar": {"column": "due", "timezone": "America/New_York", "parts": parts}})
    names = [f"local_{part}" for part in parts]
    # 2013-01-01 04:59 UTC: Monday, 31 December 2012, 23:59
    assert list(asked.features({"due": 1_357_016_340 * 10**6}, 0).values()) == [1439, 23, 0, 31, 12, 366]
    # 2013-03-10 07:05 UTC, minutes after the clocks went forward: Sunday 03:05
    assert list(asked.features({"due": 1_362_899_100 * 10**6}, 0).values()) == [185, 3, 6, 10, 3, 69]
    assert asked.features({"due": None}, 0) == dict.fromkeys(names)


# Rows


def rows_of(asked: Oracle, as_of: int = 1000) -> list[tuple[Any, int, int]]:
    return [(row.key, row.version["known"], row.t) for row in asked.rows(as_of).rows]


def test_a_row_is_the_newest_version_known_at_its_own_t() -> None:
    plans = [plan("k", 100, 5), plan("k", 100, 90, x=2.0), plan("k", 100, 91, x=3.0)]
    assert rows_of(oracle(plans)) == [(("k",), 90, 90)]
    # the second version says t = 10, which is before it was known: the first one holds
    assert rows_of(oracle([plan("k", 100, 5), plan("k", 20, 50)])) == [(("k",), 5, 90)]
    # the third is in time for its own t, though not for that of the others
    assert rows_of(oracle([plan("k", 100, 5), plan("k", 300, 200)])) == [(("k",), 200, 290)]


def test_keys_without_a_version_in_time_are_counted() -> None:
    found = oracle([plan("k", 100, 91), plan("l", 100, 90)]).rows(1000)
    assert ([row.key for row in found.rows], found.unknown_in_time, found.closed) == ([("l",)], 1, 0)


def test_a_version_that_does_not_say_when_it_is_asked_is_never_in_time() -> None:
    until: dict[str, Any] = {"predict_at": {"column": "until", "lead": "10us", "tolerance": "1us"}}
    found = oracle([plan("k", 100, 5, until=70), plan("k", 100, 6), plan("l", 100, 5)], **until).rows(1000)
    assert ([(row.key, row.t) for row in found.rows], found.unknown_in_time) == ([(("k",), 60)], 1)


@pytest.mark.parametrize(("known", "closed"), [(89, 1), (90, 1), (91, 0)])
def test_a_key_whose_closing_fact_is_known_at_t_is_no_row(known: int, closed: int) -> None:
    found = oracle([plan("k", 100, 5)], [seen("k", 20, known)]).rows(1000)
    assert (len(found.rows), found.unknown_in_time, found.closed) == (1 - closed, 0, closed)


def test_rows_as_they_were_known_at_as_of() -> None:
    asked = oracle([plan("k", 100, 5), plan("k", 300, 50), plan("l", 100, 51)])
    assert rows_of(asked, as_of=49) == [(("k",), 5, 90)]
    assert rows_of(asked, as_of=50) == [(("k",), 50, 290)]
    assert asked.rows(50).unknown_in_time == 0


# Label


def test_the_label_is_the_newest_version_known_at_as_of() -> None:
    asked = oracle([], [seen("k", 95, 96, x=1.0), seen("k", 95, 99, x=1.5), seen("k", 95, 105, x=0.0)])
    assert [asked.label(("k",), t) for t in (95, 96, 98, 99, 104, 105)] == [
        (None, None), (False, 96), (False, 96), (True, 99), (True, 99), (False, 105)
    ]


def test_no_outcome_no_label() -> None:
    asked = oracle([], [seen("k", 95, 96, x=2.0), seen("k", 95, 99, x=None)])
    assert asked.label(("k",), 98) == (True, 96)
    assert asked.label(("k",), 99) == (None, None)
    assert asked.label(("z",), 99) == (None, None)


# Split


def test_parts_are_counted_back_from_as_of() -> None:
    assert oracle().parts(100) == {
        "test": (80, 95), "valid_select": (65, 75), "valid_fit": (50, 60), "train": (25, 45)
    }


@pytest.mark.parametrize(
    ("t", "part"),
    [(25, None), (26, "train"), (45, "train"), (46, None), (50, None), (51, "valid_fit"),
     (60, "valid_fit"), (61, None), (66, "valid_select"), (75, "valid_select"), (80, None),
     (81, "test"), (95, "test"), (96, None)],
)
def test_a_row_belongs_to_the_part_that_holds_its_t(t: int, part: str | None) -> None:
    assert oracle().part(t, t + 1, 100) == part


@pytest.mark.parametrize(
    ("t", "known", "part"),
    [(40, 50, "train"), (40, 51, None), (55, 65, "valid_fit"), (55, 66, None), (70, 80, "valid_select"),
     (70, 81, None), (90, 100, "test"), (90, 101, None), (90, None, None)],
)
def test_a_label_is_known_before_the_next_part_begins(t: int, known: int | None, part: str | None) -> None:
    assert oracle().part(t, known, 100) == part


# Random tables


def test_random_cases_are_the_same_for_the_same_seed() -> None:
    assert random_case(11) == random_case(11) != random_case(12)


def test_random_cases_keep_the_rules_and_are_hard() -> None:
    met: Counter[str] = Counter()
    for seed in range(200):
        case = random_case(seed)
        asked = Oracle(case.spec, case.tables)  # raises where a rule of facts is broken
        met.update(hard_things(asked, case))
    assert {name: met[name] for name in HARD if met[name] < 20} == {}, dict(met)


HARD = ("row", "closed", "unknown in time", "correction", "moved", "regrouped", "known later than its event",
        "null group", "group never seen", "window begin", "window end", "µs beside", "ttl edge", "tie",
        "identical rows", "train", "valid_fit", "valid_select", "test", "label too late")


def hard_things(asked: Oracle, case: Case) -> Counter[str]:
    as_of = case.as_of
    found = asked.rows(as_of)
    met: Counter[str] = Counter({"row": len(found.rows), "closed": found.closed,
                                 "unknown in time": found.unknown_in_time})
    for name, facts in asked.facts.items():
        event = asked.sources[name]["event_time"]
        met["identical rows"] += len(case.tables[name]) - len(facts)
        met["known later than its event"] += sum(f.known_at > f.event_time for f in facts)
        met["tie"] += len(facts) - len({(f.event_time, f.known_at) for f in facts})
        for a, b in combinations(facts, 2):
            met["correction"] += a.key == b.key
            met["moved"] += a.key == b.key and a.row[event] != b.row[event]
            met["regrouped"] += a.key == b.key and a.row["tail"] != b.row["tail"]
    for row in found.rows:
        known_at = asked.label(row.key, as_of)[1]
        part = asked.part(row.t, known_at, as_of)
        met[part or ("label too late" if asked.part(row.t, row.t, as_of) and known_at else "no part")] += 1
        for view in asked.spec["features"]["views"].values():
            met.update(edges(asked, view, row.version, row.t))
    return met


def edges(asked: Oracle, view: Any, version: Any, t: int) -> Counter[str]:
    """How often a view's facts lie exactly on its edges."""
    ((_, body),) = view.items()
    facts = asked.group(body, version, t)
    over = body.get("over") or asked.sources[body["from"]]["event_time"]
    nulls = sum(version[column] is None for column in body["key"])
    met: Counter[str] = Counter({"null group": nulls, "group never seen": not nulls and not facts})
    for fact in facts:
        for width in (duration(text) for text in body.get("last", ())):
            met["window begin"] += fact.row[over] == t - width
            met["window end"] += fact.row[over] == t
            met["µs beside"] += fact.row[over] in (t - width - 1, t - width + 1, t - 1)
        met["ttl edge"] += "ttl" in body and fact.event_time == t - duration(body["ttl"])
    return met
