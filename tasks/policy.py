"""What every stage has in common: retries, cache, timeout, name, its line on the terminal and its page in the UI."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.states import Completed, Failed
from prefect.tasks import Task, exponential_backoff
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.record import Outcome, write_refusal
from pipelines.clock import wall_us
from pipelines.errors import Refused, UsageError
from pipelines.home import Home, give_back_memory, open_home
from pipelines.manifest import Artifact, code_digest, digest_of, find_artifact, library_versions
from pipelines.run import Run, run_lock, unfinished
from pipelines.spec import Spec, load_spec

P = ParamSpec("P")
R = TypeVar("R")


def stage(
    *, key: Callable[..., str] | None = None, retries: int = 2, timeout_s: int = 3_600, tags: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Makes a stage of a plain function whose first argument is a Run, or a pipeline's name.

    With a `key` (of the same arguments) the stage is cached: the artifact folder is the truth, Prefect's record
    follows it. A refusal or a bad spec is never retried.
    """

    def decorate(body: Callable[P, R]) -> Task[P, R]:
        name = body.__name__

        @wraps(body)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            before, began = _cpu_s(), time.monotonic()
            result = body(*args, **kwargs)
            _record(name, args, result, time.monotonic() - began, _cpu_s() - before)
            _page(name, result)
            give_back_memory()
            return result

        def cache_key(context: TaskRunContext, arguments: dict[str, Any]) -> str | None:
            return None if key is None else _verified(name, key(**arguments))

        decorated: Any = task(
            measured, name=name.replace("_", " "), task_run_name=_run_name, retries=retries,
            retry_delay_seconds=exponential_backoff(backoff_factor=1), retry_jitter_factor=0.2,
            retry_condition_fn=worth_retrying, timeout_seconds=timeout_s, tags=tags,
            cache_key_fn=cache_key if key else None, persist_result=True, result_serializer="json",
            on_completion=[_say],
        )  # type: ignore[call-overload]  # fmt: skip
        return decorated

    return decorate


def alone(story: Callable[P, R]) -> Callable[P, Any]:
    """Keeps other runs of the pipeline out while a flow works; where a contract says no, it ends Failed, named Refused."""

    @wraps(story)
    def told(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            with run_lock(open_home(), _pipeline(*args, **kwargs)):
                _ended[:] = [story(*args, **kwargs)]
        except Refused as refusal:
            _ended[:] = [Failed(name="Refused", message=str(refusal), data=refusal)]
        return _ended[0]

    return told


_ended: list[Any] = []  # what the last flow of this process returned


def ended() -> Any:
    """What the last flow of this process returned, whatever its server has kept of it."""
    (last,) = _ended
    return last.data if isinstance(last, State) else last


def refusals(story: Callable[P, Outcome]) -> Callable[P, Any]:
    """`alone`, and a record of what is refused: Failed where a contract said no, Completed where a gate did."""

    @alone
    @wraps(story)
    def told(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            outcome = story(*args, **kwargs)
        except Refused as refusal:
            run = unfinished(home := open_home(), _pipeline(*args, **kwargs))
            if run is not None:
                write_refusal(home, run, str(refusal), refusal.report)
            raise
        return Completed(name="Refused", data=outcome) if outcome.outcome == "refused" else outcome

    return told


def _pipeline(*args: Any, **kwargs: Any) -> str:
    """The pipeline that a flow's first argument names."""
    return load_spec(str(next(iter((*args, *kwargs.values()))))).pipeline


def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again can help: not after a refusal, not with a wrong spec."""
    try:
        state.result()
    except (Refused, UsageError):
        return False
    except Exception:
        return True
    return False


def stage_key(run: Run, layer: str, stage: str, **reads: Any) -> str:
    """Digest of the outputs and parameters that a stage reads, its code and the libraries of its layer."""
    return digest_of([stage, run.pipeline, code_digest(layer), library_versions(*_LIBRARIES[layer]), reads])


_LIBRARIES = {
    "features": ("numpy", "pyarrow", "feast"),
    "models": ("numpy", "pyarrow", "torch", "pytorch-lightning", "lightgbm", "optuna", "onnx", "onnxruntime"),
    "deploy": ("numpy", "pyarrow", "lightgbm", "onnxruntime", "bentoml"),
}


def opened(run: Run) -> tuple[Home, Spec]:
    """The home and the run's own spec."""
    home = open_home()
    return home, run.spec(home)


@contextmanager
def bar(name: str) -> Iterator[Callable[[float, str], None]]:
    """A progress bar on the terminal while the stage works; nothing where there is no terminal."""
    with Progress(
        TextColumn(f"  {name:<13}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    ) as progress:  # fmt: skip
        shown = progress.add_task("", total=1.0)
        yield lambda share, words: progress.update(shown, completed=share, description=words)


def _verified(name: str, key: str) -> str:
    """The key; where its folder is gone or broken, Prefect's record of it is removed first."""
    if find_artifact(open_home().root, name, key) is None:
        storage = os.environ.get("PREFECT_LOCAL_STORAGE_PATH")
        if storage:
            (Path(storage) / key).unlink(missing_ok=True)
    return key


def _run_name() -> str:
    from prefect.runtime import task_run

    subject = next(iter(task_run.parameters.values()), "")
    pipeline = subject.pipeline if isinstance(subject, Run) else subject
    return f"{task_run.task_name} · {pipeline}"


def _cpu_s() -> float:
    """CPU seconds of this process, of children that ended, and of those that live (the zygote and its ranks)."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent = sum(u.ru_utime + u.ru_stime for u in usage)
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            spent += sum(child.cpu_times()[:4])
    return spent


def _record(name: str, args: Sequence[Any], result: Any, seconds: float, cpu_s: float) -> None:
    """Appends what the stage cost to the run's `stages.jsonl`: seconds, CPU seconds, peak MB."""
    run = result if isinstance(result, Run) else next((a for a in args if isinstance(a, Run)), None)
    if run is None:
        return
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    line = {"stage": name, "seconds": round(seconds, 3), "cpu_s": round(max(0.0, cpu_s), 3),
            "peak_mb": max(peaks) // 1024, "ended_us": wall_us(), "line": getattr(result, "line", "")}  # fmt: skip
    path = run.folder(open_home()) / "stages.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _page(name: str, result: Any) -> None:
    """Shows the stage's own page, where it left one, as an artifact in the Prefect UI."""
    root = open_home().root
    if isinstance(result, Artifact):
        places = [root / result.path / "page.md", root / result.path / "volatile" / "page.md"]
    else:
        places = [root / result.page] if getattr(result, "page", "") else []
    page = next((p for p in places if p.is_file()), None)
    if page is not None:
        create_markdown_artifact(page.read_text(encoding="utf-8"), key=name.replace("_", "-"), description=result.line)


def _say(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> None:
    """One line on the terminal: stage, seconds, what it did."""
    result = state.result(raise_on_failure=False)
    spent = "cached" if state.name == "Cached" else f"{task_run.total_run_time.total_seconds():.1f} s"
    print(f"  {task.name:<13} {spent:>8}  {getattr(result, 'line', '')}", file=sys.stderr, flush=True)
