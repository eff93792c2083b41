"""What is in a bento: a hash of each file, every package that it runs with, their licences; and whether that is still so.

`src/SHA256SUMS` holds the hashes, as `sha256sum -c` reads them; the tag is a digest of it and of the locked packages.
`src/bundle/sbom.cdx.json` is a CycloneDX bill of materials. Runs inside the serving process too.
"""

import json
import re
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from pipelines.errors import MillraceError
from pipelines.manifest import digest_of, file_digest, write_atomic

SUMS, ERASED = "SHA256SUMS", "ERASED.json"
LOCK, SBOM = "bundle/requirements.txt", "bundle/sbom.cdx.json"
BY_BENTOML = {"bentofile.yaml"}  # what its builder adds


def locked(names: Iterable[str]) -> dict[str, str]:
    """These packages and all that they need here: name → version, sorted. Raises MillraceError for one that is missing."""
    found: dict[str, str] = {}
    waiting = [(name, "") for name in names]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        package = _package(name)
        found[_normal(package.name)] = package.version
        for needed in _needs(package, extra):
            if needed not in seen:
                seen.add(needed)
                waiting.append(needed)
    return dict(sorted(found.items()))


def _needs(package: Distribution, extra: str) -> list[tuple[str, str]]:
    """What a package with an extra needs here: names and extras."""
    from packaging.requirements import Requirement

    found = []
    for line in package.requires or []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            found += [(_normal(needed.name), more) for more in ("", *sorted(needed.extras))]
    return found


def _package(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise MillraceError(f"{name} is not installed, but what is served needs it: type `pip install {name}`") from None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bill(component: str, pins: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Any]:
    """CycloneDX 1.6: the packages with their licences and what each needs, and the model's files by SHA-256.

    It tells nothing of when or where it was made, so that the same contents have the same bill.
    """
    refs = {name: f"pkg:pypi/{name}@{version}" for name, version in pins.items()}
    components: list[dict[str, Any]] = [
        {"type": "library", "bom-ref": refs[name], "name": name, "version": version, "purl": refs[name], **_licence(name)}
        for name, version in pins.items()
    ]
    components += [
        {"type": "machine-learning-model" if not name.endswith((".json", ".md", ".txt")) else "data", "bom-ref": f"file:{name}",
         "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
        for name, digest in files.items()
    ]  # fmt: skip
    needed = {name: {refs[n] for n, _ in _needs(_package(name), "") if n in refs} for name in pins}
    about = {"component": {"type": "application", "bom-ref": component, "name": component}}
    identity = uuid.UUID(digest_of([component, dict(pins), dict(files)])[:32], version=5)
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{identity}", "version": 1,
        "metadata": about, "components": components,
        "dependencies": [{"ref": component, "dependsOn": sorted([*refs.values(), *(f"file:{n}" for n in files)])},
                         *({"ref": refs[name], "dependsOn": sorted(some)} for name, some in needed.items())],
    }  # fmt: skip


@cache
def _licence(name: str) -> dict[str, Any]:
    """What a package says of its licence."""
    about = _package(name).metadata
    if expression := about.get_all("License-Expression"):
        return {"licenses": [{"expression": expression[0]}]}
    classified = [line.split(" :: ")[-1] for line in about.get_all("Classifier") or [] if line.startswith("License :: ")]
    said = [line for line in about.get_all("License") or [] if 0 < len(line) < 80 and "\n" not in line]
    return {"licenses": [{"license": {"name": name}} for name in classified or said]} if classified or said else {}


def write_sums(src: Path) -> dict[str, str]:
    """Writes the hashes of all files of a folder beside them; path → digest."""
    found = {name: file_digest(src / name) for name in _files(src) if name != SUMS}
    _write(src, found)
    return found


def _files(folder: Path) -> list[str]:
    """Paths of all files of a folder; what Python has compiled beside them is none of them."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def _erased(src: Path) -> dict[str, str]:
    """The digests by which files were named out of which somebody was erased since."""
    path = src / ERASED
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write(src: Path, sums: Mapping[str, str]) -> None:
    write_atomic(src / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def version_of(sums: Mapping[str, str], pins: Mapping[str, str]) -> str:
    """The version of a bento with these contents."""
    return digest_of([dict(sums), dict(pins)])[:12]


def read_sums(src: Path) -> dict[str, str]:
    """Path → digest. Raises MillraceError where the list is missing or is none."""
    try:
        lines = (src / SUMS).read_text(encoding="utf-8").splitlines()
        return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    except (OSError, UnicodeDecodeError) as error:
        raise MillraceError(f"{src / SUMS} cannot be read ({error}): package the release again") from None


def read_lock(src: Path) -> dict[str, str]:
    """Package → version. Raises MillraceError where the list is missing."""
    try:
        lines = (src / LOCK).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise MillraceError(f"{src / LOCK} cannot be read ({error}): package the release again") from None
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def problems(src: Path, version: str, direct: Iterable[str]) -> list[str]:
    """What is wrong with a bento's contents: files that changed, are missing or too many, another tag, other packages.

    `direct`: the packages whose versions must be those that it was packaged with.
    """
    try:
        sums, pins = read_sums(src), read_lock(src)
    except MillraceError as error:
        return [str(error)]
    found = []
    there = set(_files(src))
    for name, digest in sums.items():
        if name not in there:
            found.append(f"{name} is missing")
        elif file_digest(src / name) != digest:
            found.append(f"{name} was changed")
    found += [f"{name} was added" for name in sorted(there - sums.keys() - BY_BENTOML - {SUMS, ERASED})]
    if version_of({**sums, **_erased(src)}, pins) != version:
        found.append(f"{SUMS} or {LOCK} is not that of {version}")
    for name in direct:
        try:
            here = distribution(name).version
        except PackageNotFoundError:
            here = "none"
        if pins.get(_normal(name)) != here:
            found.append(f"{name} is {here}, it was packaged with {pins.get(_normal(name), 'none')}")
    return found


def unlike(src: Path) -> str:
    """What is wrong with the bento around this folder, in a sentence; empty where all is as it was packaged."""
    about, version = src / "bundle/bundle.json", src.parent.name
    with suppress(OSError):
        found = re.search(r"(?m)^version: '?([^'\n]+)'?$", (src.parent / "bento.yaml").read_text(encoding="utf-8"))
        version = found[1] if found else version
    names = json.loads(about.read_text(encoding="utf-8")).get("direct", ()) if about.is_file() else ()
    wrong = problems(src, version, names)
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    said = f"the bento {src.parent} is not as it was packaged: {'; '.join(wrong[:5])}{more}; package the release again"
    return said if wrong else ""


def sign_again(path: Path) -> None:
    """After a file was changed by an erasure: its new hash, and beside it the one by which the bento was named."""
    for src in path.parents:
        if (src / SUMS).is_file() and (name := path.relative_to(src).as_posix()) in (sums := read_sums(src)):
            write_atomic(src / ERASED, json.dumps({name: sums[name], **_erased(src)}, indent=1, sort_keys=True))
            _write(src, {**sums, name: file_digest(path)})
            return


def tree_digest(folder: Path) -> str:
    """Digest of all files of a folder and their names."""
    return digest_of({name: file_digest(folder / name) for name in _files(folder)})
