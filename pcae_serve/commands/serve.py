"""pcae-serve [serve]: start the server from command-line settings."""

import errno
import gc
import logging
import os
import signal
import socket

from pcae_serve.api.app import create_app
from pcae_serve.api.auth import Keys, read_keys
from pcae_serve.api.server import BACKLOG, Server
from pcae_serve.errors import StartError, one_line
from pcae_serve.observability import logs
from pcae_serve.runtime.build import build_service
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings, unknown_variables

log = logging.getLogger(__name__)


class Serve(Settings):
    __doc__ = Settings.__doc__

    def cli_cmd(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
        logs.configure(self.log_format, self.log_level)
        for warning in unknown_variables():
            log.warning("%s", warning)
        with listen(self.host, self.port) as listener:
            keys, admin_keys = read_keys(self)
            serve(build_service(self), listener, keys, admin_keys)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; called first, so that a taken port is reported at once.

    Raises StartError if the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm only if the protocol is named; with Nagle, responses on a
    # reused connection are delayed by 40 ms, as the body waits for the head's acknowledgement
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # two processes can bind, but only one can listen
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        what_to_do = "stop the process that uses it or choose another --port"
        hint = f"; {what_to_do}" if taken else ""
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from None
    return listener


def serve(
    service: Service,
    listener: socket.socket,
    keys: Keys | None = None,
    admin_keys: Keys | None = None,
) -> None:
    """Serve until a signal arrives. Raises StartError if the service cannot start."""
    failures = list[BaseException]()

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(service, stop, keys, admin_keys)
    # Objects allocated so far live as long as the process: excluding them keeps pauses of the
    # garbage collector short.
    gc.collect()
    gc.freeze()
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    playground = "; the playground is at /" if service.settings.playground else ""
    log.info("listening on http://%s, not ready yet%s", address, playground)
    server = Server(app, service)
    server.run(sockets=[listener])
    if failures:
        raise StartError(f"cannot measure latencies: {one_line(failures[0])}")
    if service.left_behind:  # the interpreter would wait for these threads
        logging.shutdown()
        os._exit(0 if service.alive else 1)
