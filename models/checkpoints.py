"""Checkpoints: one line of JSON that says what follows and whose it is, then what torch saved.

Written by a thread from a copy in memory, beside and renamed; read only when every byte is as it was written and the
spec, code and libraries are those of the reader.
"""

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from pipelines.errors import MillraceError
from pipelines.manifest import FORMAT_VERSION

KEPT = 2
LINE = 1_000_000  # bytes that the first line has at most


class Corrupt(Exception):
    """A file is not what was written: the message says why."""


def snapshot(value: Any) -> Any:
    """A copy of a state on the CPU that training does not change any more; it shares nothing that is mutable."""
    if isinstance(value, torch.Tensor):
        found = value.detach()
        return found.clone() if found.device.type == "cpu" else found.cpu()
    if isinstance(value, Mapping):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(snapshot, value))
    return value


def write(path: Path, state: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """The file holds the state whole, or there is none: written beside, synced, renamed."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    body = buffer.getbuffer()
    head = {"format_version": FORMAT_VERSION, "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body), **about}
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    try:
        with scratch.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    with path.open("rb") as file:
        line = file.readline(LINE)
        body = file.read()
    try:
        head = json.loads(line)
        version, wanted, size = head["format_version"], head["sha256"], head["bytes"]
    except (ValueError, KeyError, TypeError):
        raise Corrupt("its first line is not that of a checkpoint") from None
    if version != FORMAT_VERSION:
        raise Corrupt(f"format_version {version}, this Millrace reads {FORMAT_VERSION}")
    if len(body) != size:
        raise Corrupt(f"{len(body)} of {size} bytes")
    if hashlib.sha256(body).hexdigest() != wanted:
        raise Corrupt("its bytes are not those that were written")
    return head, body


def newest(folder: Path, about: Mapping[str, Any]) -> tuple[Path | None, list[Path], list[str]]:
    """The newest whole checkpoint under `folder`, those that are not whole, and a line about each of these.

    Raises MillraceError for one that another spec, code or library wrote.
    """
    broken: list[Path] = []
    said: list[str] = []
    for path in sorted((folder / "checkpoints").glob("step-*.ckpt"), reverse=True):
        try:
            head, _ = _read(path)
        except FileNotFoundError:  # another rank has set it aside
            continue
        except Corrupt as why:
            broken.append(path)
            said.append(f"checkpoint {path.name} is corrupt ({why}): the one before it is taken")
            continue
        differs = difference({k: head.get(k) for k in about}, about)
        if differs:
            raise MillraceError(
                f"checkpoint {path} was written for another training: {'; '.join(differs)}; "
                f"remove {path.parent} to begin anew, or run what wrote it"
            )
        return path, broken, said
    return None, broken, said


def difference(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Where two JSON values differ: `train.learning_rate 0.003, now 0.01`."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = sorted({*found, *wanted})
        return [
            line for k in names for line in difference(found.get(k), wanted.get(k), f"{name}.{k}" if name else str(k))
        ]
    return [] if found == wanted else [f"{name} {_short(found)}, now {_short(wanted)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:12]


class CheckpointIO(TorchCheckpointIO):
    """How Lightning reads them."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(
            io.BytesIO(_read(Path(path))[1]), map_location="cpu", weights_only=weights_only is not False
        )
        return state


class Writer:
    """Writes checkpoints in a thread, one at a time. A disk that is full costs an alarm, not the training.

    `mine`: whether the folder is still that of this job; nothing is written there when it is not.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], alarm: Callable[[str], None], mine: Callable[[], bool]
    ) -> None:  # fmt: skip
        self.folder, self.about, self.alarm, self.mine = folder, about, alarm, mine
        self.given: SimpleQueue[tuple[int, Mapping[str, Any]]] = SimpleQueue()
        self.idle = threading.Event()
        self.idle.set()
        self.thread: threading.Thread | None = None
        self.failing = False

    @property
    def busy(self) -> bool:
        return not self.idle.is_set()

    def begin(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes a state that nobody changes; one that is being written is waited for."""
        self.wait()
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
            self.thread.start()
        self.idle.clear()
        self.given.put((step, state))

    def wait(self) -> None:
        """Returns when nothing is being written."""
        self.idle.wait()

    def _work(self) -> None:
        while True:
            self._write(*self.given.get())
            self.idle.set()

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        path = self.folder / "checkpoints" / f"step-{step:09d}.ckpt"
        try:
            if not self.mine():
                return
            write(path, state, self.about)
            for old in sorted(path.parent.glob("step-*.ckpt"))[:-KEPT]:
                old.unlink()
            self.failing = False
        except (OSError, RuntimeError) as error:
            if not self.failing:  # one alarm until it works again
                why = getattr(error, "strerror", None) or error
                self.alarm(f"checkpoint at step {step} was not written ({why}); training goes on without it")
            self.failing = True
