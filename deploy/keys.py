"""API keys of an endpoint: made and shown once, kept as SHA-256 only. Runs in the serving process too.

A key has 256 random bits, so that no slow hash is needed. `$MILLRACE_HOME/keys/PIPELINE.txt` holds a line `HASH NAME` for each;
`$MILLRACE_API_KEYS` may hold more hashes, for a container without a home of its own.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import MillraceError, UsageError
from pipelines.manifest import write_atomic

NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
REFUSED = "send a key that this endpoint knows, as `Authorization: Bearer KEY` or `X-API-Key: KEY` (`millrace key` makes one)"


def keys_file(root: Path, pipeline: str) -> Path:
    """Where the hashes of a pipeline's keys lie in a home."""
    return root / "keys" / f"{pipeline}.txt"


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_keys(path: Path) -> dict[str, str]:
    """Hash → name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {digest: name for digest, _, name in (line.strip().partition(" ") for line in lines) if len(digest) == 64}


def make_key(path: Path, name: str) -> str:
    """A new key, whose hash is kept under the name; what is returned is told nowhere else. Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a key: 1 to 64 letters, digits, or one of _ . @ -")
    known = read_keys(path)
    if name in known.values():
        raise MillraceError(f"there is a key named {name}: revoke it first (--revoke), or choose another name")
    key = f"mr_{secrets.token_urlsafe(32)}"
    _write(path, {**known, hashed(key): name})
    return key


def revoke_key(path: Path, name: str) -> None:
    """From now on the key of that name is refused. Raises MillraceError where there is none."""
    known = read_keys(path)
    if name not in known.values():
        raise MillraceError(f"there is no key named {name!r} (known: {', '.join(sorted(known.values())) or 'none'})")
    _write(path, {digest: other for digest, other in known.items() if other != name})


def _write(path: Path, known: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, "".join(f"{digest} {name}\n" for digest, name in known.items()), mode=0o600)


class Keys:
    """The keys that an endpoint knows; a file that changes is read again within a second."""

    def __init__(self, path: Path, given: str, *, wanted: bool) -> None:
        self.path, self.wanted = path, wanted or bool(given.strip())
        self.given = {digest.lower(): "environment" for digest in re.findall(r"[0-9a-fA-F]{64}", given)}
        self.known, self.looked, self.stamp = dict(self.given), -1.0, (-1, -1)

    def who(self, headers: Mapping[str, str]) -> str | None:
        """The name of the key that a request brings, None for none that is known. Every hash is compared, in constant time."""
        self._look()
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        sent = sent.strip() if scheme.lower() == "bearer" and sent else headers.get("x-api-key", "")
        digest, found = hashed(sent).encode(), None
        for known, name in self.known.items():
            if hmac.compare_digest(known.encode(), digest):
                found = name
        return found

    def _look(self) -> None:
        now = time.monotonic()
        if now - self.looked < 1 and self.looked >= 0:
            return
        self.looked = now
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
        except OSError:
            stamp = (0, 0)
        if stamp != self.stamp:
            self.stamp, self.known = stamp, {**read_keys(self.path), **self.given}
