"""What a bundle says of the form in which its members answer: `inference.json` beside `model.json`."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.manifest import read_json

SERVED = "inference.json"


@dataclass(frozen=True)
class Served:
    """What answers for a member: an engine, its file, whether it answered exactly as the default did, what its code needs."""

    engine: str
    file: str
    exact: bool
    target: tuple[str, ...] = ()


def read_served(folder: Path) -> dict[str, Served]:
    """Member → what answers for it in place of the default; empty where a folder says nothing of it."""
    if not (folder / SERVED).is_file():
        return {}
    members = read_json(folder / SERVED)["members"]
    return {name: Served(m["engine"], m["file"], m["exact"], tuple(m["target"])) for name, m in members.items()}


def slack(folder: Path) -> float:
    """By how much a bundle may answer otherwise than its model as it was trained: 0 where all that answers is exact."""
    return 0.0 if all(s.exact for s in read_served(folder).values()) else float(read_json(folder / SERVED)["bound"])
