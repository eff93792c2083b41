"""Releases: an append-only log and one pointer, moved by compare-and-set; and the feeding of what serves."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from deploy.bundle import load_bento
from deploy.contents import SUMS, unlike
from deploy.proxy import MISSING as MISSING_PROXY
from deploy.proxy import installed
from deploy.stages import CHALLENGER, Stage, stages, under_way
from features.cells import StoreDown, open_cells
from features.feed import feed, feed_changes, is_fed
from features.ingest import Snapshot, ingest, read_snapshot
from features.online import served_store
from features.push import Delivery, land_pushed, pushed_events
from features.rows import seen_until
from features.store import FeatureSet, build_features, defs_digest
from features.views import RECENT
from pipelines.clock import MISSING, Anchor, iso, wall_us
from pipelines.errors import MillraceError, Refused
from pipelines.home import Home
from pipelines.manifest import FORMAT_VERSION, Artifact, lock, read_json, write_json, write_page
from pipelines.run import Run, accepted
from pipelines.spec import Spec

log = logging.getLogger("millrace.rollout")
KEPT = 3  # releases whose served store is fed: the champion and those before it; beside one that is on its way


@dataclass(frozen=True)
class Release:
    """One release: a bento, where it came from, and why it was let through."""

    release: str
    bento: str
    run_id: str
    snapshot: str
    as_of_us: int
    defs_digest: str
    parent: str
    reasons: tuple[str, ...]
    test_until_us: int  # end of what its training and validation have seen


def champion(home: Home, pipeline: str) -> Release | None:
    """The release that the pointer names."""
    pointer = home.releases(pipeline) / "champion.json"
    if not pointer.exists():
        return None
    return find_release(home, pipeline, read_json(pointer)["release"])


def find_release(home: Home, pipeline: str, name: str) -> Release:
    """A release by name. Raises MillraceError listing those that exist."""
    known = {r.release: r for r in released(home, pipeline)}
    if name not in known:
        raise MillraceError(f"{pipeline} has no release {name!r} (releases: {', '.join(known) or 'none'})")
    return known[name]


def released(home: Home, pipeline: str) -> list[Release]:
    """Every release, oldest first, once each."""
    found = {}
    for event in events(home, pipeline):
        if event["event"] == "release":
            body = event["body"]
            found[body["release"]] = Release(**{f.name: body[f.name] for f in fields(Release)})
    return list(found.values())


def events(home: Home, pipeline: str) -> Iterator[dict[str, Any]]:
    """The release log. A torn last line, from a crash while it was written, does not count."""
    path = home.releases(pipeline) / "log.jsonl"
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _append(home: Home, pipeline: str, event: str, body: dict[str, Any], why: str) -> None:
    path = home.releases(pipeline) / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    now = wall_us()
    line = {"format_version": FORMAT_VERSION, "event": event, "when": iso(now), "who": os.environ.get("USER", ""),
            "why": why, "body": body}  # fmt: skip
    with path.open("ab") as file:
        file.write(b"\n" + json.dumps(line, sort_keys=True).encode())  # the newline first: a torn line ends there
        file.flush()
        os.fsync(file.fileno())


def promote(
    home: Home, pipeline: str, release: Release, *, expected: str, why: str, seen: Mapping[str, Any] | None = None
) -> bool:  # fmt: skip
    """Moves the pointer from `expected` to the release. False when it was there already; `seen`: what its canary showed.

    Raises Refused when another release has taken the place of `expected` meanwhile.
    """
    with _changing(home, pipeline):
        current = _current(home, pipeline)
        if current == release.release:
            _settle(home, pipeline, current)
            return False
        _expect(pipeline, current, expected)
        _make_known(home, pipeline, release, why)
        write_json(home.releases(pipeline) / "champion.json", {"release": release.release})
        _append(home, pipeline, "promote", {"release": release.release, "from": current, **({"seen": seen} if seen else {})}, why)
    return True


def challenge(home: Home, pipeline: str, release: Release, *, expected: str, why: str) -> bool:
    """Notes a release that is to replace `expected` by steps; one that was on its way is retired. False when it was noted.

    Raises Refused as `promote` does.
    """
    with _changing(home, pipeline):
        current = _current(home, pipeline)
        open_now = under_way(stages_of(home, pipeline))
        if release.release == current or (open_now and open_now.release == release.release):
            return False
        _expect(pipeline, current, expected)
        _make_known(home, pipeline, release, why)
        if open_now:
            _append(home, pipeline, "retire", {"release": open_now.release}, f"{release.release} took its place")
        _append(home, pipeline, CHALLENGER, {"release": release.release, "from": current}, why)
    return True


def step(home: Home, pipeline: str, stage: Stage, event: str, *, why: str, **body: Any) -> bool:
    """Notes the next step of the release on its way; False where that is no longer where it was left."""
    with _changing(home, pipeline):
        now = under_way(stages_of(home, pipeline))
        if now is None or (now.release, now.state, now.share) != (stage.release, stage.state, stage.share):
            return False
        _append(home, pipeline, event, {"release": stage.release, **body}, why)
    return True


def stages_of(home: Home, pipeline: str) -> dict[str, Stage]:
    """Where every release stands, oldest first."""
    return stages(events(home, pipeline), _current(home, pipeline))


def settle(home: Home, pipeline: str) -> None:
    """Notes a promotion that was killed between pointer and log."""
    with _changing(home, pipeline):
        _settle(home, pipeline, _current(home, pipeline))


def _settle(home: Home, pipeline: str, current: str) -> None:
    moves = [e["body"] for e in events(home, pipeline) if e["event"] in ("promote", "rollback")]
    before = moves[-1]["release"] if moves else ""
    if current and current != before:
        _append(home, pipeline, "promote", {"release": current, "from": before}, "the pointer had moved when its writer died")


def _changing(home: Home, pipeline: str) -> AbstractContextManager[None]:
    return lock(home.lock(f"releases-{pipeline}"), what=f"a release of {pipeline}", wait=True)


def _current(home: Home, pipeline: str) -> str:
    pointer = home.releases(pipeline) / "champion.json"
    return str(read_json(pointer)["release"]) if pointer.exists() else ""


def _expect(pipeline: str, current: str, expected: str) -> None:
    if current != expected:
        raise Refused(
            f"the champion of {pipeline} is {current or 'none'} and not {expected or 'none'}, from which this run "
            "started: run again to be judged against it"
        )


def _make_known(home: Home, pipeline: str, release: Release, why: str) -> None:
    if release.release not in {r.release for r in released(home, pipeline)}:
        _append(home, pipeline, "release", asdict(release), why)


def rollback(home: Home, pipeline: str, *, to: str | None = None, why: str) -> Release:
    """Moves the pointer back, to the release before the champion or to a named one. Raises Refused for a bento that changed."""
    settle(home, pipeline)
    release = rollback_target(home, pipeline, to)
    with _changing(home, pipeline):
        now = _current(home, pipeline)
        write_json(home.releases(pipeline) / "champion.json", {"release": release.release})
        _append(home, pipeline, "rollback", {"release": release.release, "from": now}, why)
    return release


def rollback_target(home: Home, pipeline: str, to: str | None) -> Release:
    """The release to go back to: the one named, or that before the champion. Raises MillraceError."""
    now = champion(home, pipeline)
    if now is None:
        raise MillraceError(f"{pipeline} has no champion: nothing to roll back")
    target = to or next(
        (e["body"]["from"] for e in reversed(list(events(home, pipeline)))
         if e["event"] in ("promote", "rollback") and e["body"]["release"] == now.release), "",
    )  # fmt: skip
    if not target:
        raise Refused(f"{now.release} is the first release of {pipeline}: there is none before it")
    release = find_release(home, pipeline, target)
    src = bento_folder(home, release) / "src"
    if (src / SUMS).is_file() and (wrong := unlike(src)):  # older bentos have no such list
        raise Refused(wrong)
    return release


def by_steps(spec: Spec) -> bool:
    """Whether a challenger of a pipeline has to prove itself on live traffic; where no proxy is installed it cannot."""
    if spec.serve.rollout and not installed():
        log.warning("%s: releases are promoted without a canary, by restart", MISSING_PROXY)
    return spec.serve.rollout is not None and installed()


def bento_spec(home: Home, release: Release) -> Spec:
    """The spec inside a release's bento."""
    return Spec.model_validate(json.loads((home.root / release.bento / "src/bundle/spec.json").read_text()))


def feed_all(
    home: Home, pipeline: str, snapshot: Snapshot, anchor: Anchor, built: FeatureSet | None, *, at: str = ""
) -> list[str]:  # fmt: skip
    """Feeds the served store of every kept release; names those that moved. Repeating it changes nothing.

    A store is moved on by the cells that changed since its last feed; where that is not possible or would not pay, it is
    written whole from the steps of `built`, where that defines features alike, or from steps made from the anchor on. What
    was pushed and is not in the snapshot stays served. `at`: the server that holds the stores, where that is not the home.
    """
    fed, kept = [], served_stores(home, pipeline, at)
    for release, spec, store in kept:
        if is_fed(spec, store, anchor, snapshot.digest):
            continue
        facts = Delivery(spec, home, snapshot, anchor.data_us, [other for _, _, other in kept])
        if _move_on(facts, store, anchor) or _feed_whole(facts, store, anchor, built, release.defs_digest):
            fed.append(release.release)
    if fed:
        body = {"data_us": anchor.data_us, "wall_us": anchor.wall_us, "snapshot": snapshot.digest, "releases": fed}
        _append(home, pipeline, "feed", body, "new facts")
    return fed


def kept_releases(home: Home, pipeline: str) -> list[Release]:
    """Whose served store is fed, oldest release first: the last champions, the one of now included, and who is on its way."""
    moves = [e["body"]["release"] for e in events(home, pipeline) if e["event"] in ("promote", "rollback")]
    names = set(list(dict.fromkeys([_current(home, pipeline), *reversed(moves)]))[:KEPT])
    coming = under_way(stages_of(home, pipeline))
    return [r for r in released(home, pipeline) if r.release in names or (coming and r.release == coming.release)]


def served_stores(home: Home, pipeline: str, at: str) -> list[tuple[Release, Spec, Path | str]]:
    """The kept releases, what each means by its features, and where its served store lies."""
    kept = [(release, bento_spec(home, release)) for release in kept_releases(home, pipeline)]
    return [(r, spec, served_store(at, pipeline, home.online(pipeline, defs_digest(spec)))) for r, spec in kept]


def _move_on(facts: Delivery, store: Path | str, anchor: Anchor) -> bool:
    """Moves a store on by what changed since the snapshot that it holds; False where it is to be written whole."""
    held = open_cells(store).meta()
    old_rows = int(held.get("whole_us", MISSING)) < anchor.data_us - RECENT  # which only a whole feed clears away
    path = facts.home.snapshots(facts.spec.pipeline) / f"{held.get('snapshot')}.json"
    if old_rows or not path.exists() or not facts.read_since(read_snapshot(facts.home, facts.spec.pipeline, held["snapshot"])):
        return False
    return feed_changes(facts.spec, store, anchor, facts.snapshot.digest, since=held["snapshot"], newest=facts.newest,
                        fresh=facts.fresh)  # fmt: skip


def _feed_whole(facts: Delivery, store: Path | str, anchor: Anchor, built: FeatureSet | None, defs: str) -> bool:
    same = built is not None and built.defs_digest == defs
    features = built if built and same else build_features(facts.spec, facts.home, facts.snapshot, since=anchor.data_us)
    return feed(facts.spec, facts.home.root / features.path, store, anchor, facts.snapshot.digest, newest=features.newest_us,
                fresh=facts.pushed)  # fmt: skip


def take_in(spec: Spec, home: Home) -> Snapshot:
    """The snapshot of everything landed, with what was pushed into the served stores. Raises Refused as `ingest` does."""
    land_events(spec, home)
    return ingest(spec, home)


def land_events(spec: Spec, home: Home) -> None:
    """Lands what was pushed into the served stores; of one that is down, when it is back."""
    stores = [store for _, _, store in served_stores(home, spec.pipeline, spec.serve.store)]
    try:
        land_pushed(spec, home, pushed_events(stores))
    except StoreDown as down:
        log.warning("%s", down)


def feed_elsewhere(home: Home, pipeline: str, at: str) -> list[str]:
    """Brings the stores on another server to what the last run that no contract stopped has fed."""
    last = accepted(home, pipeline)
    if last is None:
        return []
    inputs = last["inputs"]
    anchor = Anchor(inputs["as_of_us"], inputs["anchor_wall_us"])
    return feed_all(home, pipeline, read_snapshot(home, pipeline, inputs["snapshot"]), anchor, None, at=at)


def bento_folder(home: Home, release: Release) -> Path:
    """Where a release's bento lies."""
    return home.root / release.bento


@dataclass(frozen=True)
class Released:
    """What a run did to the champion: promoted, challenger (by steps), refused or unchanged; and which stores were fed."""

    outcome: str
    release: str
    reasons: tuple[str, ...]
    fed: tuple[str, ...]
    line: str
    page: str = ""  # home-relative


def release_run(
    spec: Spec, home: Home, run: Run, features: FeatureSet, verdict: Artifact, bento: Artifact | None,
    checked: Artifact | None,
) -> Released:  # fmt: skip
    """Moves the pointer when both verdicts are yes, and feeds on either. Repeating it changes nothing."""
    reasons = tuple(read_json(home.root / verdict.path / "verdict.json")["reasons"])
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    outcome, name = "refused", run.parent
    if bento is not None and checked is not None:
        built = load_bento(home.root / bento.path)
        if not checked.ok:
            reasons = tuple(read_json(home.root / checked.path / "preflight.json")["reasons"])
        else:
            outcome = "unchanged" if built.tag == run.parent else "promoted"
            name = built.tag
            new = Release(built.tag, built.path, run.run_id, run.snapshot, run.as_of_us, features.defs_digest,
                          run.parent, reasons, seen_until(spec, run.as_of_us))  # fmt: skip
            if outcome == "promoted" and run.parent and by_steps(spec):
                challenge(home, run.pipeline, new, expected=run.parent, why="; ".join(reasons))
                outcome = "promoted" if _current(home, run.pipeline) == new.release else CHALLENGER
            else:
                promote(home, run.pipeline, new, expected=run.parent, why="; ".join(reasons))
    anchor = Anchor(run.as_of_us, run.anchor_wall_us)
    fed = tuple(feed_all(home, run.pipeline, snapshot, anchor, features, at=spec.serve.store))
    shown = name or "no champion"
    line = {"promoted": f"{shown} is champion", "refused": f"refused; {shown} stays",
            CHALLENGER: f"{shown} is to prove itself: `millrace rollout {run.pipeline}`",
            "unchanged": f"equal to the champion {shown}"}[outcome]  # fmt: skip
    line += f"; {len(fed)} store(s) fed" if fed else ""
    page = home.releases(run.pipeline) / "page.md"
    listed = [("release", "as of", "run")] + [(r.release, iso(r.as_of_us), r.run_id) for r in released(home, run.pipeline)]
    write_page(page, f"{run.pipeline}: {line}", [("Why", [(r, "") for r in reasons]), ("Releases", listed)])
    return Released(outcome, name, reasons, fed, line, home.relative(page))
