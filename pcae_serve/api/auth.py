"""API keys: read from a file, required by routes.

Keys are kept as hashes and compared in constant time.
"""

import hashlib
import hmac
import logging
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param

from pcae_serve import callers, keys_file
from pcae_serve.callers import Caller
from pcae_serve.errors import Forbidden, MissingKey, StartError, one_line
from pcae_serve.observability import tracing
from pcae_serve.settings import Settings

log = logging.getLogger(__name__)

#: Minimum length of a key; a shorter one can be guessed.
MIN_CHARACTERS = 16


class Keys:
    """A set of keys. An empty set accepts no key."""

    def __init__(self, keys: Mapping[str, Caller] | frozenset[str] = frozenset()) -> None:
        """keys: with their callers, or alone; each is a caller of its own then."""
        if not isinstance(keys, Mapping):
            keys = {key: Caller(f"key-{i}") for i, key in enumerate(sorted(keys), 1)}
        self._callers = [(_digest(key), caller) for key, caller in keys.items()]

    def __bool__(self) -> bool:
        return bool(self._callers)

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> Caller | None:
        """Return the caller that a key belongs to, or None if it is unknown."""
        digest, found = _digest(key), None
        for each, caller in self._callers:  # all, so that the time does not depend on the key
            if hmac.compare_digest(each, digest):
                found = caller
        return found

    @property
    def callers(self) -> list[Caller]:
        """The callers, each once, in the order of the file."""
        return list({caller.name: caller for _, caller in self._callers}.values())

    @classmethod
    def read(cls, path: Path | None, label: str = "key") -> "Keys":
        """Read the keys of a file; no path gives an empty set.

        label: of keys without a name, in front of the number of their line. Raises StartError if
        the file or a key is unusable. No message contains a key.
        """
        if path is None:
            return cls()
        try:
            lines = keys_file.read_keys(path)
            owners = callers.of_key_lines(lines, label)
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
        return cls({line.key: owner for line, owner in zip(lines, owners, strict=True)})


def read_keys(settings: Settings) -> tuple[Keys, Keys]:
    """Return the API keys and the admin keys of a server.

    Raises StartError if a file is unusable, or a caller has other terms in each of them.
    """
    keys = Keys.read(settings.api_keys_file)
    admin_keys = Keys.read(settings.admin_keys_file, "admin-key")
    known = {caller.name: caller for caller in keys.callers}
    for caller in admin_keys.callers:
        if known.get(caller.name, caller) != caller:
            raise StartError(
                f"{settings.admin_keys_file}: name={caller.name} has another weight= or rate= in"
                f" {settings.api_keys_file}; keys of one name are one caller, so give it the same"
            )
    return keys, admin_keys


#: Header of the API key.
KEY_HEADER = "X-API-Key"

# The dependencies are coroutines: FastAPI runs a plain function in a thread, which costs 0.1 ms.


async def given_key(
    header: Annotated[str | None, Depends(APIKeyHeader(name=KEY_HEADER, auto_error=False))],
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> str | None:
    """Return the API key of the request: the header X-API-Key, or else a bearer token."""
    return header or (None if bearer is None else bearer.credentials)


def read_key(request: Request) -> str | None:
    """Return what `given_key` does, without FastAPI's solver."""
    scheme, token = get_authorization_scheme_param(request.headers.get("Authorization"))
    bearer = token if scheme.lower() == "bearer" else None
    return request.headers.get(KEY_HEADER) or bearer or None


GivenKey = Annotated[str | None, Depends(given_key)]


async def require_key(request: Request, key: GivenKey) -> None:
    """Require an API key or an admin key, unless the server runs without API keys."""
    keys: Keys = request.app.state.keys
    if not keys:
        return
    if key is None:
        raise MissingKey("send an API key in the header X-API-Key or as a bearer token")
    caller = keys.find(key) or request.app.state.admin_keys.find(key)
    if caller is None:
        raise Forbidden("unknown API key")
    _note_caller(request, caller)


def key_name(request: Request) -> str | None:
    """Return the name of the API key that `require_key` accepted; None if none was required."""
    name: str | None = getattr(request.state, "caller", None)
    return name


def caller(request: Request, mode: Literal["auto", "key", "address", "off"]) -> str:
    """Return whom the request's share belongs to; empty if callers are not distinguished."""
    if mode == "off":
        return ""
    if mode == "key" or (mode == "auto" and request.app.state.keys):
        return key_name(request) or ""
    return "" if request.client is None else callers.of_address(request.client.host)


async def require_admin_key(request: Request, key: GivenKey) -> None:
    """Require an admin key."""
    admin_keys: Keys = request.app.state.admin_keys
    if not admin_keys:
        raise Forbidden("admin routes are disabled; start the server with --admin-keys-file")
    if key is None:
        raise MissingKey("send an admin key in the header X-API-Key or as a bearer token")
    caller = admin_keys.find(key)
    if caller is None:
        raise Forbidden("this API key is not an admin key")
    _note_caller(request, caller)


def _note_caller(request: Request, caller: Caller) -> None:
    """Keep the caller's name: for its share, the access log and traces."""
    request.state.caller = caller.name
    tracing.annotate(caller=caller.name)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
