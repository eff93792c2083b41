"""Where each release stands: challenger → shadow → canary → champion → retired, a function of the release log and the pointer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

CHALLENGER, SHADOW, CANARY, CHAMPION, RETIRED = STATES = ("challenger", "shadow", "canary", "champion", "retired")
OPEN = (CHALLENGER, SHADOW, CANARY)  # on its way


@dataclass(frozen=True)
class Stage:
    """A release's state and what led to it. `share`: percent of the traffic in a canary; `parent`: the champion then."""

    release: str
    state: str
    share: int
    held: bool
    parent: str
    when: str
    who: str
    why: str

    @property
    def words(self) -> str:
        state = f"canary {self.share} %" if self.state == CANARY else self.state
        return f"{state} (held)" if self.held else state


def stages(events: Iterable[Mapping[str, Any]], champion: str) -> dict[str, Stage]:
    """The stage of every release, oldest first. The pointer is the truth of the champion, where a crash left the log behind."""
    found: dict[str, Stage] = {}
    for event in events:
        if "release" in event["body"]:
            _apply(found, event["event"], event["body"], event)
    if champion and champion in found and found[champion].state != CHAMPION:
        last = found[champion]
        _apply(found, "promote", {"release": champion}, {"when": last.when, "who": last.who, "why": last.why})
    return found


def under_way(found: Mapping[str, Stage]) -> Stage | None:
    """The release that is on its way to be champion by steps."""
    return next((s for s in found.values() if s.state in OPEN and s.parent), None)


def _apply(found: dict[str, Stage], event: str, body: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    name: str = body["release"]
    made: dict[str, Any] = {k: told[k] for k in ("when", "who", "why")}
    if event == "release":
        found.setdefault(name, Stage(name, CHALLENGER, 0, False, "", **made))
    elif name not in found:
        return
    elif event == CHALLENGER:
        found[name] = Stage(name, CHALLENGER, 0, False, body["from"], **made)
    elif event in (SHADOW, CANARY):
        found[name] = replace(found[name], state=event, share=body.get("share", 0), **made)
    elif event in ("hold", "resume") and found[name].state in OPEN:
        found[name] = replace(found[name], held=event == "hold")
    elif event == "retire":
        found[name] = replace(found[name], state=RETIRED, share=0, held=False, **made)
    elif event in ("promote", "rollback"):
        for other, stage in found.items():
            if other != name and (stage.state == CHAMPION or (stage.state in OPEN and stage.parent)):
                found[other] = replace(stage, state=RETIRED, share=0, held=False, **made | {"why": f"{name} became champion"})
        found[name] = replace(found[name], state=CHAMPION, share=0, held=False, **made)
