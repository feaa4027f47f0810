"""API keys: read from a file, required by routes.

Keys are kept as hashes and compared in constant time.
"""

import hashlib
import hmac
import logging
import stat
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from pcae_serve import keys_file
from pcae_serve.errors import Forbidden, MissingKey, StartError, one_line

log = logging.getLogger(__name__)

#: Minimum length of a key; a shorter one can be guessed.
MIN_CHARACTERS = 16


class Keys:
    """A set of keys. An empty set accepts no key."""

    def __init__(self, keys: frozenset[str] = frozenset()) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, key: str) -> bool:
        digest, known = _digest(key), False
        for each in self._digests:  # all of them, so that the time does not depend on the key
            known |= hmac.compare_digest(each, digest)
        return known

    @classmethod
    def read(cls, path: Path | None) -> "Keys":
        """Read the keys of a file; no path gives an empty set.

        Raise StartError if the file or a key is unusable. No message contains a key.
        """
        if path is None:
            return cls()
        try:
            lines = keys_file.read_keys(path)
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise StartError(f"cannot read the API keys in {path}: {one_line(error)}") from None
        if short := [line.number for line in lines if len(line.key) < MIN_CHARACTERS]:
            raise StartError(
                f"{path}, line {short[0]}: a key needs at least {MIN_CHARACTERS} characters;"
                " generate one with `openssl rand -hex 32`"
            )
        if non_ascii := [line.number for line in lines if not line.key.isascii()]:
            raise StartError(
                f"{path}, line {non_ascii[0]}: a key must be ASCII to fit in an HTTP header"
            )
        if not lines:
            raise StartError(f"{path} contains no API key; write one key a line")
        if mode & stat.S_IROTH:
            log.warning("every user of this machine can read %s: run chmod o-r", path)
        if any(line.options.keys() - {"name"} for line in lines):
            log.warning("%s: weight and rate are accepted, but have no effect yet", path)
        return cls(frozenset(line.key for line in lines))


# The dependencies are coroutines: FastAPI runs a plain function in a thread, which costs 0.1 ms.


async def given_key(
    header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> str | None:
    """Return the API key of the request: the header X-API-Key, or else a bearer token."""
    return header or (None if bearer is None else bearer.credentials)


GivenKey = Annotated[str | None, Depends(given_key)]


async def require_key(request: Request, key: GivenKey) -> None:
    """Require an API key or an admin key, unless the server runs without API keys."""
    keys: Keys = request.app.state.keys
    if not keys:
        return
    if key is None:
        raise MissingKey("send an API key in the header X-API-Key or as a bearer token")
    if key not in keys and key not in request.app.state.admin_keys:
        raise Forbidden("unknown API key")


async def require_admin_key(request: Request, key: GivenKey) -> None:
    """Require an admin key."""
    admin_keys: Keys = request.app.state.admin_keys
    if not admin_keys:
        raise Forbidden("admin routes are disabled; start the server with --admin-keys-file")
    if key is None:
        raise MissingKey("send an admin key in the header X-API-Key or as a bearer token")
    if key not in admin_keys:
        raise Forbidden("this API key is not an admin key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
