"""Training: the network on N ranks beside the baselines on the same rows, calibration, and the choice on valid_select."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from features.tokens import pretrained_digest
from features.trainset import TrainingSet, load_training_set
from models.arrays import epoch_shape, write_arrays
from models.elastic import finish, start_zygote, submit
from models.ensemble import Choice, choose
from models.gbdt import Trees, default_threads, fit_gbdt
from models.job import LIBRARIES, PROFILE, Job, Outcome, Progress, own_code
from models.score import KINDS
from models.tune import apply
from models.words import fit_words
from pipelines.errors import MillraceError
from pipelines.home import give_back_memory
from pipelines.manifest import Note, code_digest, digest_of, file_digest, library_versions, read_json, write_json, write_page
from pipelines.spec import Spec

FILES = {"gbdt": "gbdt.txt", "gbdt_tuned": "gbdt_tuned.txt", "network": "network.onnx", "words": "words.json"}


def train_candidates(
    spec: Spec, data_folder: Path, study: Path, work: Path, out: Path, *, progress: Progress | None = None
) -> Note:
    """The stage: trains, calibrates and chooses; writes models, `model.json`, `choice.json`, `curves.json`.

    `work` holds checkpoints, from which an interrupted training resumes. Raises UsageError where the rows cannot be
    cut for the ranks, and MillraceError where the network diverges or its ranks die too often.
    """
    start_zygote()  # it imports while the rows are read
    data = replace(load_training_set(data_folder), frame={})  # only what models read is kept
    give_back_memory()
    run = work.parent
    # a run that is taken up with other code or libraries, or rows made by other code, does not resume from what those left
    work /= digest_of([code_digest("models"), library_versions(*LIBRARIES), file_digest(data_folder / "frame.parquet"),
                       *own_code(spec.train).values(), *pretrained_digest(spec.features.text).values()])[:16]  # fmt: skip
    best = read_json(study / "best.json")
    ranks, accelerator = world(spec)
    epoch_shape(len(data.rows("train")), spec.train.batch_size, ranks)
    job = Job(str(write_arrays(data, work / "arrays", spec.train)), apply(spec.training, _params(best, "network")), spec.seed,
              spec.train.max_epochs, accelerator=accelerator)  # fmt: skip
    folder = work / "network"
    job.prepare(folder)
    future = submit(folder, ranks=ranks, max_restarts=spec.train.max_restarts, hang_s=spec.train.hang_after / 1e6)
    trees = _forests(spec, data, best, out, max(1, default_threads() - ranks))  # while the ranks train
    if data.batch.tokens is not None:
        fit_words(data.batch, data.label, data.part).save(out / FILES["words"])
    outcome = finish(future, folder, ranks, progress, _follow_devices(folder, ranks) if accelerator == "gpu" else None)
    result = outcome.result
    if result.stopped or result.best_epoch is None:
        raise MillraceError(
            f"the network diverged: {result.stopped or f'no finite log loss in {len(result.curve)} epochs'}; lower "
            "train.learning_rate, or its upper end in tune.space; train.skip_bad_batches leaves some batches out"
        )
    for name in ("network.safetensors", "network.onnx"):
        shutil.copyfile(folder / name, out / name)
    shutil.copyfile(data_folder / "preprocess.json", out / "preprocess.json")
    choice = _choose(data, out)
    _write(data, choice, outcome, trees, out, read_json(folder / "usage.json"))
    profile = ""
    if (folder / PROFILE).is_dir():
        shutil.copytree(folder / PROFILE, run / PROFILE, dirs_exist_ok=True)
        profile = f"; profile: {run / PROFILE}"
    shutil.rmtree(work / "arrays")  # made again in a second, and large
    chosen = choice.chosen
    restarts = f", {len(outcome.restarts)} restarts" if outcome.restarts else ""
    return Note(
        f"network {len(outcome.result.curve)} epochs on {ranks} rank(s){restarts}, LightGBM {trees['gbdt'].rounds} "
        f"trees; chosen: {chosen.name}, log loss {chosen.log_loss:.4f} on valid_select{profile}"
    )


def world(spec: Spec) -> tuple[int, str]:
    """Number of ranks, and what they run on. The driver is asked by a file, never through CUDA."""
    found = devices()
    ranks = spec.train.ranks if isinstance(spec.train.ranks, int) else max(1, found)
    return ranks, "gpu" if found >= ranks and found else "cpu"


def devices() -> int:
    """GPUs that the driver has now, of those that this process may use."""
    found = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        found = min(found, len([d for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if d.strip()]))
    return found


def _follow_devices(folder: Path, ranks: int) -> Callable[[], None]:
    """Looks how many GPUs there are: with fewer than ranks, half of the ranks go on, and all when they are back."""
    working = ranks

    def look() -> None:
        nonlocal working
        wanted = ranks
        while wanted > max(1, devices()):
            wanted //= 2
        if wanted != working:
            working = wanted
            start_zygote().resize(folder, list(range(wanted)))

    return look


def _params(best: dict[str, Any], kind: str) -> dict[str, Any]:
    return dict(best[kind]["params"]) if kind in best else {}


def _forests(spec: Spec, data: TrainingSet, best: dict[str, Any], out: Path, threads: int) -> dict[str, Trees]:
    """The baseline at fixed defaults, and the tuned one where it was tuned."""
    wanted = {"gbdt": {}, **({"gbdt_tuned": _params(best, "gbdt_tuned")} if "gbdt_tuned" in best else {})}
    found = {
        name: fit_gbdt(spec.gbdt, data.batch, data.label, data.part, spec.seed, extra=extra, threads=threads)
        for name, extra in wanted.items()
    }
    for name, trees in found.items():
        (out / FILES[name]).write_text(trees.text, encoding="utf-8")
    return found


def _kind(name: str) -> str:
    """What kind of model a member is."""
    return name.removesuffix("_tuned")


def _choose(data: TrainingSet, out: Path) -> Choice:
    """Calibration and choice by the artefacts that would ship."""
    rows = data.rows("valid_select")
    batch = data.batch.take(rows)
    logits = {name: KINDS[_kind(name)](out / file).logit(batch) for name, file in FILES.items() if (out / file).exists()}
    return choose(logits, data.label[rows])


def _write(
    data: TrainingSet, choice: Choice, outcome: Outcome, trees: dict[str, Trees], out: Path, usage: dict[str, Any]
) -> None:  # fmt: skip
    members = [
        {"name": n, "kind": _kind(n), "file": FILES[n], "a": c.a, "b": c.b}
        for n, c in choice.calibrations.items()
    ]
    prior = float(np.mean(data.label[data.rows("train")]))
    write_json(out / "model.json", {
        "chosen": choice.chosen.name, "members": members, "prior": prior,
        "candidates": {c.name: dict(c.weights) for c in choice.candidates},
    })  # fmt: skip
    table = [asdict(c) for c in choice.candidates]
    write_json(out / "choice.json", {"chosen": choice.chosen.name, "candidates": table})
    curves = {"network": [asdict(e) for e in outcome.result.curve], **{n: list(t.curve) for n, t in trees.items()}}
    write_json(out / "curves.json", curves)
    write_json(out / "volatile" / "stats.json", {
        "ranks": outcome.ranks, "restarts": list(outcome.restarts), "notes": list(outcome.notes),
        "network_s": round(outcome.seconds, 3), "parameters": outcome.result.parameters,
        "usage": {k: v for k, v in usage.items() if k != "format_version"},
    })  # fmt: skip
    rows = [("candidate", "log loss", "AUC")]
    rows += [(c.name, f"{c.log_loss:.4f}", f"{c.auc:.4f}") for c in choice.candidates]
    epochs = [("epoch", "train loss", "log loss", "AUC")]
    epochs += [(str(e.epoch), f"{e.train_loss}", f"{e.log_loss}", f"{e.auc}") for e in outcome.result.curve]
    write_page(out / "page.md", f"chosen: {choice.chosen.name}", [("On valid_select", rows), ("Network", epochs)])
