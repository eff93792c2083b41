"""The release page, `releases/PIPELINE/rollout.html`: where each release stands, what its steps showed, and why it went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.report import environment
from deploy.rollout import champion, events, stages_of
from deploy.stages import CANARY, CHALLENGER, CHAMPION, SHADOW, Stage, under_way
from pipelines.home import Home
from pipelines.manifest import write_atomic
from pipelines.spec import Spec

MOST = 60  # events that are listed
_SAID = {"release": "packaged", CHALLENGER: "challenges the champion", SHADOW: "answers a copy of the traffic",
         "retire": "retired", "promote": "champion", "rollback": "champion again", "hold": "held",
         "resume": "goes on"}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """What one step of a rollout showed: its name, until when, and the figures of champion and challenger."""

    name: str
    when: str
    seen: Mapping[str, Any]


def write_rollout_page(home: Home, spec: Spec) -> Path:
    """Writes the page; the same log gives the same bytes."""
    log, found = list(events(home, spec.pipeline)), stages_of(home, spec.pipeline)
    now, coming = champion(home, spec.pipeline), under_way(found)
    last = coming or _last_rolled(log, found)
    page = home.releases(spec.pipeline) / "rollout.html"
    rules = spec.serve.rollout
    text = environment().get_template("rollout.html.j2").render(
        spec=spec, pipeline=spec.pipeline, champion=now.release if now else "", lead=_lead(coming, last),
        stages=list(found.values()), last=last, track=_track(last, rules.canary if rules else (), log),
        shown=_shown(log, last), tone=_tone(coming, last),
        history=[(e["when"], e["body"].get("release", ""), _words(e), e["why"], e["who"]) for e in reversed(log)
                 if e["event"] in _SAID or e["event"] == CANARY][:MOST],
    )  # fmt: skip
    write_atomic(page, text)
    return page


def _words(event: Mapping[str, Any]) -> str:
    return f"canary {event['body']['share']} %" if event["event"] == CANARY else _SAID[event["event"]]


def _last_rolled(log: Sequence[Mapping[str, Any]], found: Mapping[str, Stage]) -> Stage | None:
    """The release whose rollout began last."""
    name = next((e["body"]["release"] for e in reversed(log) if e["event"] == CHALLENGER), "")
    return found.get(name)


def _of_last(log: Sequence[Mapping[str, Any]], last: Stage) -> list[Mapping[str, Any]]:
    """The events of the release since its challenge."""
    own = [e for e in log if e["body"].get("release") == last.release]
    begin = max(i for i, e in enumerate(own) if e["event"] == CHALLENGER)
    return own[begin:]


def _track(last: Stage | None, shares: Sequence[int], log: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The steps from challenger to champion, each with `done`, `here`, `no` or nothing."""
    if last is None:
        return []
    been = [_step(e["event"], e["body"]) for e in _of_last(log, last) if e["event"] in (CHALLENGER, SHADOW, CANARY, "promote")]
    names = [CHALLENGER, SHADOW, *(f"{share} %" for share in sorted({*shares, *_shares(log, last)})), CHAMPION]
    at = names.index(been[-1])
    here = {CHAMPION: "done", "retired": "no"}.get(last.state, "here")
    marks = ["done" if n in been[:-1] else "" for n in names]
    marks[at] = here if last.state != "retired" or been[-1] != CHAMPION else "done"
    return list(zip(names, marks, strict=True))


def _shares(log: Sequence[Mapping[str, Any]], last: Stage) -> list[int]:
    return [e["body"]["share"] for e in _of_last(log, last) if e["event"] == CANARY]


def _step(event: str, body: Mapping[str, Any]) -> str:
    return f"{body['share']} %" if event == CANARY else CHAMPION if event == "promote" else event


def _shown(log: Sequence[Mapping[str, Any]], last: Stage | None) -> list[Shown]:
    """The figures that the steps left: each is noted with the event that ended it."""
    found, at = [], CHALLENGER
    for event in _of_last(log, last) if last else ():
        if "seen" in event["body"]:
            found.append(Shown(at, event["when"], event["body"]["seen"]))
        if event["event"] in (SHADOW, CANARY):
            at = f"canary {event['body']['share']} %" if event["event"] == CANARY else SHADOW
    return found


def _lead(coming: Stage | None, last: Stage | None) -> str:
    if coming is not None:
        return f"{coming.release} is on its way: {coming.words}, since {coming.when[:19].replace('T', ' ')}."
    if last is None:
        return "No release was rolled out by steps yet."
    if last.state == CHAMPION:
        return f"{last.release} went all the way: {last.why}."
    return f"{last.release} did not stay: {last.why}."


def _tone(coming: Stage | None, last: Stage | None) -> str:
    return "unchanged" if coming or last is None else "promoted" if last.state == CHAMPION else "refused"
