"""API keys: who may ask, and who may administer. Kept as hashes, compared in constant time.

A file holds one key a line; empty lines and lines that begin with # do not count. It knows strings
and files, nothing of HTTP.
"""

import hashlib
import hmac
import logging
import stat
from pathlib import Path

from pcae_serve.errors import StartError, one_line

log = logging.getLogger(__name__)

#: A shorter key can be guessed.
LEAST_CHARACTERS = 16


class Keys:
    """A set of keys. An empty one knows nobody."""

    def __init__(self, keys: frozenset[str] = frozenset()) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, key: str) -> bool:
        digest, known = _digest(key), False
        for each in self._digests:  # all of them, whichever fits: the time must not tell
            known |= hmac.compare_digest(each, digest)
        return known

    @classmethod
    def read(cls, path: Path | None) -> "Keys":
        """The keys of a file; none without one. Raises StartError, which never shows a key."""
        if path is None:
            return cls()
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
            mode = path.stat().st_mode
        except (OSError, UnicodeError) as error:
            raise StartError(f"cannot read the API keys in {path}: {one_line(error)}") from None
        keys = {(number, key) for number, key in enumerate(lines, 1) if key and key[0] != "#"}
        short = sorted(number for number, key in keys if len(key) < LEAST_CHARACTERS)
        if short:
            raise StartError(
                f"{path}, line {short[0]}: a key needs at least {LEAST_CHARACTERS} characters; make"
                " one by `openssl rand -hex 32`"
            )
        if foreign := sorted(number for number, key in keys if not key.isascii()):
            raise StartError(f"{path}, line {foreign[0]}: a key must be ASCII, to go in a header")
        if not keys:
            raise StartError(f"{path} holds no API key: one a line")
        if mode & stat.S_IROTH:
            log.warning("everybody on this machine can read %s: chmod o-r", path)
        return cls(frozenset(key for _, key in keys))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
