"""`millrace VERB PIPELINE`: the command line. Exit codes: 0 done or unchanged, 1 error, 2 usage, 3 refused."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from pipelines.clock import parse_time
from pipelines.errors import MillraceError, Refused, UsageError
from pipelines.home import Home, open_home, process_env
from pipelines.manifest import canonical_json, read_json, write_atomic
from pipelines.run import run_lock
from pipelines.spec import Spec, find_pipeline, json_schema, load_spec

Answer = dict[str, Any]


class _Verbs(click.Group):
    """Verbs whose errors are one clear sentence and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.exit(code if isinstance(code, int) else 0)
        except click.ClickException as error:
            error.show()
            sys.exit(2)
        except click.Abort:
            sys.exit(1)
        except MillraceError as error:
            print(f"{error.word}: {error}", file=sys.stderr)
            if isinstance(error, Refused) and error.report:
                print(f"report: {open_home().root / error.report}", file=sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            print(f"error: {error}; free space or rights there, and try again", file=sys.stderr)
            sys.exit(1)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """From raw Parquet to a served, self-retraining model."""


@main.group()
def contract() -> None:
    """The rules that landed data must meet."""


def _verb(function: Callable[..., Answer | None], into: click.Group = main) -> click.Command:
    """A verb with `--json` and `--set`: prints its answer for a person, or as one JSON object."""

    def run(as_json: bool, **kwargs: Any) -> None:
        try:
            answer = function(**kwargs)
        except MillraceError as error:
            if as_json:
                print(canonical_json({"outcome": error.word, "error": str(error), "report": getattr(error, "report", "")}))
            raise
        if answer is None:
            return
        code = int(answer.pop("exit_code", 0))
        print(canonical_json({k: v for k, v in answer.items() if k != "text"}) if as_json else answer["text"])
        if code:
            raise click.exceptions.Exit(code)

    run.__doc__ = function.__doc__
    command = click.command(function.__name__.rstrip("_"))(run)
    command.params += getattr(function, "__click_params__", [])[::-1]
    command.params.append(click.Option(["--json", "as_json"], is_flag=True, help="One JSON object on stdout."))
    into.add_command(command)
    return command


def _time(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """The text of an option, after a look whether it is a time."""
    try:
        if text is not None:
            parse_time(text)
    except ValueError as error:
        raise UsageError(f"{option.opts[0]}: {error}") from None
    return text


_pipeline = click.argument("pipeline")
_why = click.option("--why", default="by hand", help="Reason, for the log.")
_set = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Changes a field of the spec.")


def _prepared(home: Home) -> None:
    """This process and its children run under the home's environment."""
    os.environ.update(process_env(home))
    if hasattr(time, "tzset"):
        time.tzset()


@_verb
@_pipeline
@click.option("--until", callback=_time, help="Land what is known up to this time; default: the sample's own end.")
@click.option("--daily", is_flag=True, help="One file per day instead of per month.")
@_set
def sample(pipeline: str, until: str | None, daily: bool, overrides: tuple[str, ...]) -> Answer:
    """Writes a pipeline's sample data to its landing folder."""
    from pipelines.sample import land

    home, spec = open_home(), load_spec(pipeline, overrides)
    report = land(spec, home, until=until, daily=daily)
    lines = [f"{name:<14} {rows:>9,} rows" for name, rows in report.rows.items()]
    lines += [f"{report.files} new files in {home.landing(spec.pipeline)}", *(f"· {note}" for note in report.notes)]
    return {"text": "\n".join(lines), "rows": dict(report.rows), "files": report.files, "notes": list(report.notes)}


@partial(_verb, into=contract)
@_pipeline
@click.option("--out", type=click.Path(dir_okay=False), help="Write the YAML there, as a spec that extends the pipeline's.")
@_set
def propose(pipeline: str, out: str | None, overrides: tuple[str, ...]) -> Answer:
    """Rules for the spec's columns, from what landed: those that the spec does not state yet."""
    import yaml

    from features.contract_propose import count_rules, propose
    from features.ingest import ingest

    home, spec = open_home(), load_spec(pipeline, overrides)
    sources = propose(spec, home, ingest(spec, home))
    text = yaml.safe_dump({"sources": sources}, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    if out:
        write_atomic(Path(out), f"extends: {find_pipeline(pipeline).name}\n{text}")
    rules = count_rules(sources, spec)
    said = f"# {rules} rules that {spec.pipeline} does not state and its data meet\n{text}" if rules else "nothing to add"
    return {"text": f"{rules} rules written to {out}" if out else said.rstrip(), "rules": rules, "sources": sources}


@_verb
@_pipeline
@_set
def check(pipeline: str, overrides: tuple[str, ...]) -> Answer:
    """Validates spec, sources, keys, columns and free disk, and says what it found."""
    from flows.check import check_pipeline

    home, spec = open_home(), load_spec(pipeline, overrides)
    found = check_pipeline(spec, home, find_pipeline(pipeline))
    return {"text": "\n".join(found.lines), "problems": list(found.problems), "exit_code": 2 if found.problems else 0}


@_verb
@_pipeline
@click.option("--as-of", callback=_time, help="Pretend that it is this time; default: the newest known-at.")
@_set
def run(pipeline: str, as_of: str | None, overrides: tuple[str, ...]) -> Answer:
    """Runs the whole pipeline: from what landed to a verdict and a release."""
    from deploy.tracking import require

    home, spec = open_home(), load_spec(pipeline, overrides)
    require(spec.tracking)
    _prepared(home)
    with run_lock(home, spec.pipeline):
        pass  # said at once, before anything heavy starts; the flow takes it for itself
    outcome = _retrain(home, spec, pipeline, as_of, list(overrides))
    code = {"refused": 3}.get(outcome.outcome, 0)
    report = home.root / outcome.report
    lines = [f"{outcome.outcome}: {outcome.release or 'no champion'} (run {outcome.run_id})"]
    lines += [f"  {reason}" for reason in outcome.reasons]
    lines += [f"report: {report}"] + ([f"result_digest: {outcome.result_digest}"] if outcome.result_digest else [])
    lines += outcome.tracking
    return {"text": "\n".join(lines), **asdict(outcome), "report": str(report), "exit_code": code}


def _retrain(home: Home, spec: Spec, pipeline: str, as_of: str | None, overrides: list[str]) -> Any:
    from flows.quick import nothing_new

    known = nothing_new(home, spec, as_of)
    if known is not None:
        return known
    print(f"{spec.title}", file=sys.stderr, flush=True)
    from flows.inprocess import run_flow

    return run_flow(home, pipeline, as_of, overrides)


@_verb
@_pipeline
@click.option("--from", "begin", required=True, callback=_time, help="Rows asked about from this time on.")
@click.option("--to", "end", required=True, callback=_time, help="Rows asked about before this time.")
@click.option("--as-of", callback=_time, help="With what was known at this time; default: the newest known-at.")
@_set
def backfill(pipeline: str, begin: str, end: str, as_of: str | None, overrides: tuple[str, ...]) -> Answer:
    """Features and labels of a range of the past, as they were known at a time; goes on where it was killed."""
    from features.backfill import pin_backfill

    home, spec = open_home(), load_spec(pipeline, overrides)
    _prepared(home)
    with run_lock(home, spec.pipeline):  # what is wrong with the range is said at once, before anything heavy starts
        pin_backfill(spec, home, parse_time(begin), parse_time(end), None if as_of is None else parse_time(as_of))
    from flows.inprocess import run_story

    again = f"millrace backfill {pipeline} --from {begin} --to {end}" + (f" --as-of {as_of}" if as_of else "")
    found = run_story(home, "backfill", pipeline, begin, end, as_of, list(overrides), again=again)
    lines = [found.line, f"rows: {home.root / found.path}", f"Feast repository: {home.root / found.features}"]
    return {"text": "\n".join(lines), **asdict(found), "path": str(home.root / found.path)}


@_verb
@_pipeline
@click.option("--port", type=int, help="Port; default: serve.port of the spec.")
@click.option("--background", is_flag=True, help="Return when it is ready, and leave it running.")
@_set
def serve(pipeline: str, port: int | None, background: bool, overrides: tuple[str, ...]) -> Answer | None:
    """Serves the champion over HTTP."""
    home, spec = open_home(), load_spec(pipeline, overrides)
    _prepared(home)
    from deploy.process import running
    from flows.serving import admin_name, serve_champion

    service = serve_champion(home, spec, port=port, background=background)
    if service is None:
        return None
    admin = running(home, admin_name(spec.pipeline))
    text = f"{service.release} answers on {service.url}" + (f"\nit takes events on {admin.url}/push" if admin else "")
    return {"text": text, **asdict(service), "url": service.url, "admin": admin.url if admin else None}


@_verb
@click.argument("pipeline", required=False)
def down(pipeline: str | None) -> Answer:
    """Stops the endpoint of a pipeline, or everything that `up` and `serve` left running."""
    home = open_home()
    from flows.serving import stop_all

    stopped = stop_all(home, pipeline)
    return {"text": "\n".join(f"stopped {s}" for s in stopped) or "nothing was running", "stopped": stopped}


@_verb
def status() -> Answer:
    """What runs, and which release each pipeline serves."""
    home = open_home()
    from flows.serving import status_of

    return status_of(home)


@_verb
@_pipeline
@click.option("--input", "source", metavar="PATH", help="Parquet to be scored: a file, a folder, a glob, a URI.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for its scores; {release} in it: the release's version.")
@click.option("--release", help="Release that scores; default: the champion.")
@click.option("--by", type=click.Choice(["keys", "features"]), help="Asked how; default: by features where all are there.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes, one thread each; default: one per core.")
@click.option("--batch-rows", type=click.IntRange(min=1), help="Rows in memory per process; default: 8,192.")
def score(pipeline: str, source: str | None, output: Path | None, release: str | None, by: Any, workers: int | None,
          batch_rows: int | None) -> Answer:  # fmt: skip
    """Scores Parquet files as the endpoint would; without --input every row that can still be asked about."""
    home = open_home()
    _prepared(home)
    spec = load_spec(pipeline)
    if (source is None) != (output is None) or (source is None and (release or by or workers or batch_rows)):
        raise UsageError("give --input PATH and --output FOLDER, or neither, to score what can still be asked about")
    if source is None or output is None:
        from deploy.scoring import score_open

        opened = score_open(home, spec.pipeline, at=spec.serve.store)
        return {"text": f"{opened.line}\n{home.root / opened.path}", **asdict(opened)}
    from deploy.score_parts import score_files

    found = score_files(home, spec.pipeline, source, output, release=release, by=by, workers=workers, batch_rows=batch_rows,
                        at=spec.serve.store, tell=partial(print, file=sys.stderr, flush=True))  # fmt: skip
    return {"text": f"{found.line}\n{found.path}", **asdict(found)}


@_verb
@_pipeline
def monitor(pipeline: str) -> Answer:
    """Quality on the labels that arrived since, drift of features and scores, and skew."""
    from deploy.monitor import monitor as look

    home = open_home()
    _prepared(home)
    found = look(home, load_spec(pipeline).pipeline)
    most = sorted(found.drift.items(), key=lambda item: -item[1])[:5]
    lines = [found.line, *(f"alarm: {alarm}" for alarm in found.alarms)]
    lines += [f"{m:<10} {v:.4f} since then, {found.promised[m]:.4f} on test" for m, v in found.quality.items()]
    lines += [f"drift {value:.3f}  {name}" for name, value in most]
    lines += [f"skew: {found.skew.line if found.skew else found.not_compared}"]
    return {"text": "\n".join(lines), **asdict(found)}


@_verb
@_pipeline
@click.option("--since", callback=_time, help="Answers from this time of the clock on; default: the last day of them.")
@click.option("--until", callback=_time, help="Answers up to this time of the clock.")
@click.option("--rows", type=click.IntRange(min=1), default=1_000, show_default=True, help="Most answers, spread evenly.")
def skew(pipeline: str, since: str | None, until: str | None, rows: int) -> Answer:
    """Logged answers against what training computes for them, cell by cell; 3 when one differs."""
    from deploy.skew import check_skew

    home = open_home()
    _prepared(home)
    begin, end = (parse_time(text) if text is not None else None for text in (since, until))
    found = check_skew(home, load_spec(pipeline).pipeline, since=begin, until=end, rows=rows)
    lines = [found.line]
    for what, counts in (("skewed", found.by_view), ("skewed", found.by_feature), ("late", found.late_by_view)):
        lines += [f"{what:<7} {count:>9,}  {name}" for name, count in counts.items()]
    lines += [f"{s['feature']} of {canonical_json(s['key'])} at {s['at']} (request {s['request_id']}): served {s['served']!r}, "
              f"training computes {s['offline']!r}" for s in found.samples]  # fmt: skip
    return {"text": "\n".join(lines), **asdict(found), "exit_code": 3 if found.skewed_cells else 0}


@_verb
@_pipeline
def releases(pipeline: str) -> Answer:
    """The releases of a pipeline, newest last: which is champion, where each of them stands, and why."""
    home, spec = open_home(), load_spec(pipeline)
    from deploy.rollout import champion, released, stages_of
    from pipelines.clock import iso

    now, found, at = champion(home, spec.pipeline), released(home, spec.pipeline), stages_of(home, spec.pipeline)
    width = max((len(stage.words) for stage in at.values()), default=0)
    lines = [
        f"{'*' if now and r.release == now.release else ' '} {r.release}  {at[r.release].words:<{width}}  "
        f"as of {iso(r.as_of_us)}  run {r.run_id}  {at[r.release].why}"
        for r in found
    ]
    listed = [{**asdict(r), "stage": asdict(at[r.release])} for r in found]
    return {"text": "\n".join(lines) or f"{spec.pipeline} has no release: type `millrace run {pipeline}`",
            "champion": now.release if now else "", "releases": listed}  # fmt: skip


@_verb
@_pipeline
@click.argument("compare", nargs=-1, metavar="[A B]")
def runs(pipeline: str, compare: tuple[str, ...]) -> Answer:
    """The runs of a pipeline, or two of them side by side: names, how they begin, or `champion`."""
    from deploy.runs import HEAD, list_runs

    home, spec = open_home(), load_spec(pipeline)
    if len(compare) not in (0, 2):
        raise UsageError(f"give two runs to compare, or none to list them; found {len(compare)}")
    if compare:
        from deploy.compare import compare_runs, words

        found, page = compare_runs(home, spec.pipeline, compare)
        return {"text": "\n".join((*words(found), f"page: {page}")), "same": found.same, "rows": found.rows, "page": str(page),
                "gains": {m: asdict(gain) for m, gain in found.gains.items()},
                "differences": {s: [asdict(d) for d in ds] for s, ds in found.differences.items()}}  # fmt: skip
    listed = list_runs(home, spec.pipeline)
    lines = [HEAD, *(run.line for run in listed)] if listed else [f"{spec.pipeline} has no run: type `millrace run {pipeline}`"]
    return {"text": "\n".join(lines), "runs": [asdict(run) for run in listed]}


@_verb
@_pipeline
@click.option("--release", help="Release that is looked at; default: the champion.")
def verify(pipeline: str, release: str | None) -> Answer:
    """Whether a release's bento is as it was packaged: every file, its name, and the packages that it runs with."""
    from deploy.contents import read_lock, read_sums, unlike
    from deploy.rollout import bento_folder, champion, find_release

    home, spec = open_home(), load_spec(pipeline)
    found = champion(home, spec.pipeline) if release is None else find_release(home, spec.pipeline, release)
    if found is None:
        raise UsageError(f"{spec.pipeline} has no release: type `millrace run {pipeline}`")
    src = bento_folder(home, found) / "src"
    if wrong := unlike(src):
        return {"text": f"refused: {wrong}", "release": found.release, "wrong": wrong, "exit_code": 3}
    files, packages = len(read_sums(src)), len(read_lock(src))
    text = f"{found.release}: {files} files and {packages} packages are as they were packaged ({src})"
    return {"text": text, "release": found.release, "files": files, "packages": packages}


@_verb
@_pipeline
@click.option("--to", help="Release to go back to; default: the one before the champion.")
@_why
def rollback(pipeline: str, to: str | None, why: str) -> Answer:
    """Makes an earlier release the champion again; behind the proxy it answers when this returns."""
    from deploy.live import roll_back

    home, spec = open_home(), load_spec(pipeline)
    _prepared(home)
    return _champion_now(home, spec, roll_back(home, spec.pipeline, to=to, why=why, at=spec.serve.store))


@_verb
@_pipeline
@click.argument("release")
@click.option("--canary", is_flag=True, help="By the steps of serve.rollout, in the foreground; default: at once.")
@_why
@_set
def promote(pipeline: str, release: str, canary: bool, why: str, overrides: tuple[str, ...]) -> Answer:
    """Makes a release the champion: at once, or by the steps of a rollout."""
    from deploy.live import promote_now
    from deploy.rollout import challenge, champion, find_release

    home, spec = open_home(), load_spec(pipeline, overrides)
    _prepared(home)
    wanted = find_release(home, spec.pipeline, release)
    if not canary:
        promote_now(home, spec.pipeline, wanted, why=why)
        return _champion_now(home, spec, wanted)
    if spec.serve.rollout is None:
        raise UsageError("the spec has no serve.rollout: write serve: {rollout: {}}, or add --set serve.rollout={}")
    now = champion(home, spec.pipeline)
    challenge(home, spec.pipeline, wanted, expected=now.release if now else "", why=why)
    return _rolled_out(home, spec)


@_verb
@_pipeline
@click.option("--hold", "order", flag_value="hold", help="Stay at this step; the guard rails watch on.")
@click.option("--resume", "order", flag_value="resume", help="Go on.")
@click.option("--abort", "order", flag_value="retire", help="Take the challenger back.")
@_why
@_set
def rollout(pipeline: str, order: str | None, why: str, overrides: tuple[str, ...]) -> Answer:
    """Brings the challenger through shadow and canary to its end, and goes on where it was killed; or steers it."""
    home, spec = open_home(), load_spec(pipeline, overrides)
    _prepared(home)
    if order is None:
        return _rolled_out(home, spec)
    from deploy.live import reconcile
    from deploy.rollout import stages_of, step
    from deploy.stages import under_way

    stage = under_way(stages_of(home, spec.pipeline))
    if stage is None or not step(home, spec.pipeline, stage, order, why=why):
        raise MillraceError(f"no release of {spec.pipeline} is on its way")
    reconcile(home, spec.pipeline)
    now = stages_of(home, spec.pipeline)[stage.release]
    return {"text": f"{now.release}: {now.words}", **asdict(now)}


def _rolled_out(home: Home, spec: Spec) -> Answer:
    from deploy.canary import roll_out
    from deploy.tracking import mirror

    found = roll_out(home, spec, tell=partial(print, file=sys.stderr, flush=True), replaced=True)
    note = mirror(home, spec.pipeline, spec.tracking)
    report, code = str(home.root / found.report), 0 if found.outcome == "promoted" else 3
    text = "\n".join(filter(None, (found.line, f"report: {report}", note)))
    return {"text": text, **asdict(found), "report": report, "exit_code": code}


def _champion_now(home: Home, spec: Spec, release: Any) -> Answer:
    from deploy.tracking import mirror
    from flows.serving import take_over

    text, note = take_over(home, spec, release), mirror(home, spec.pipeline, spec.tracking)
    return {"text": "\n".join(filter(None, (text, note))), "release": release.release, "note": note}


@_verb
@_pipeline
@click.argument("name")
@click.option("--revoke", is_flag=True, help="Refuse the key of that name from now on.")
def key(pipeline: str, name: str, revoke: bool) -> Answer:
    """Makes an API key of the endpoint and shows it once; only its hash is kept."""
    from deploy.keys import keys_file, make_key, revoke_key

    home, spec = open_home(), load_spec(pipeline)
    path = keys_file(home.root, spec.pipeline)
    if revoke:
        revoke_key(path, name)
        return {"text": f"the key {name} of {spec.pipeline} is refused from now on", "name": name, "revoked": True}
    made = make_key(path, name)
    note = "" if spec.serve.api_keys else "\nno key is asked for yet: set serve.api_keys to true"
    return {"text": f"{made}\nthis is the only time that it is shown{note}", "name": name, "key": made}


@_verb
@_pipeline
@click.option("--run", "run_id", help="Run whose data is wanted; its manifest is in this home.")
@click.option("--manifest", type=click.Path(exists=True, dir_okay=False), help="Manifest of a run of another home.")
@click.option("--remote", default="", help="DVC remote; default: the one that the run was pushed to.")
def checkout(pipeline: str, run_id: str | None, manifest: str | None, remote: str) -> Answer:
    """Brings the exact data of a run into this home: snapshot, objects and, where nothing has landed, landing files."""
    from features.versions import Version, check_out

    home, spec = open_home(), load_spec(pipeline)
    if (run_id is None) == (manifest is None):
        raise UsageError("give either --run RUN_ID, for a run of this home, or --manifest FILE, for one of another")
    body = read_json(Path(manifest) if manifest else home.runs(spec.pipeline) / str(run_id) / "manifest.json")
    if body.get("pipeline") != spec.pipeline or not body.get("data_version"):
        raise UsageError(f"{manifest or run_id} is no manifest of a run of {spec.pipeline} that names a version of its data")
    found = check_out(home, spec.pipeline, body["inputs"]["snapshot"], Version(**body["data_version"]), remote)
    words = f"snapshot {found.snapshot[:12]} is here: {found.objects:,} new objects, {found.landed:,} landing files"
    return {"text": words, **asdict(found)}


@_verb
@click.option("--delete", is_flag=True, help="Remove it; without this it is only counted.")
def gc(delete: bool) -> Answer:
    """What no run, release, backfill or landing file names any more."""
    from deploy.collect import collect

    found = collect(open_home(), delete=delete)
    return {"text": found.line, **asdict(found)}


@_verb
@_pipeline
@click.option("--key", multiple=True, required=True, metavar="COLUMN=VALUE", help="Names the entity; all must hold.")
def erase(pipeline: str, key: tuple[str, ...]) -> Answer:
    """Removes an entity from data, logs, versions and the served store, and names who had seen it."""
    from deploy.erase import erase as remove
    from features.erased import Entity

    home, spec = open_home(), load_spec(pipeline)
    _prepared(home)
    found = remove(home, spec, Entity.of(spec, key))
    lines = [found.line, *(f"seen by run {run}" for run in found.runs)]
    lines += [f"learned from it: release {release}" for release in found.releases]
    return {"text": "\n".join(lines), **asdict(found)}


@_verb
@click.option("--port", type=int, default=4200, help="Port of the Prefect UI.")
@click.option("--no-worker", is_flag=True, help="Only the server and its UI.")
def up(port: int, no_worker: bool) -> Answer:
    """Starts the Prefect server with its UI, and a worker for the schedules, on this machine."""
    home = open_home()
    _prepared(home)
    from flows.serving import start_prefect

    started = start_prefect(home, port=port, worker=not no_worker)
    return {"text": "\n".join(started.lines), "ui": started.ui}


@_verb
@click.option("--out", type=click.Path(dir_okay=False), help="File; default: pipelines/schema.json.")
def schema(out: str | None) -> Answer:
    """Writes the JSON schema of a pipeline's YAML file, for editors."""
    from pipelines.spec import HERE

    path = Path(out) if out else HERE / "schema.json"
    path.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
    return {"text": f"wrote {path}", "path": str(path)}


if __name__ == "__main__":
    main()
