"""pcae-serve [serve]: flags to settings, settings to a listening server.

It holds no logic of its own, and knows nothing of the other commands.
"""

import gc
import logging
import os
import signal
import socket
from collections.abc import Callable

from pcae_serve.api.app import create_app
from pcae_serve.api.auth import Keys
from pcae_serve.api.server import Server
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines.base import Engine, run_directly
from pcae_serve.engines.loader import load_configured_engine
from pcae_serve.errors import StartError, one_line
from pcae_serve.observability import logs
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings, unknown_variables

#: Connections that wait to be accepted.
BACKLOG = 2048

log = logging.getLogger(__name__)


class Serve(Settings):
    __doc__ = Settings.__doc__

    def cli_cmd(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
        logs.configure(self.log_format, self.log_level)
        for warning in unknown_variables():
            log.warning("%s", warning)
        with listen(self.host, self.port) as listener:
            keys, admin_keys = Keys.read(self.api_keys_file), Keys.read(self.admin_keys_file)
            served = load_bundle(self.bundle or demo_path())
            loaded = [self._engine(served, i) for i in range(len(self.devices))]
            serve(Service(self, served, loaded, self._engine), listener, keys, admin_keys)

    def _engine(
        self, served: Bundle, device: int, through: Callable[[Engine], Engine] = run_directly
    ) -> Engine:
        """An engine for a bundle on one of the devices."""
        return load_configured_engine(self, served, self.devices[device], through)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is told before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named, and with it on, answers
    # on a kept connection come 40 ms late: the body waits for the head to be acknowledged
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # two may bind, one may listen
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror}; stop what holds it or choose --port"
        ) from None
    return listener


def serve(
    service: Service,
    listener: socket.socket,
    keys: Keys | None = None,
    admin_keys: Keys | None = None,
) -> None:
    """Answer requests until a signal comes. Raises StartError where the service cannot start."""
    failures = list[BaseException]()

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(service, stop, keys, admin_keys)
    # What stands now stays: without it in its rounds the collector stops everything for 2 ms, not
    # 40, and several times that where the engine wants the same core.
    gc.collect()
    gc.freeze()
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d, not ready yet", f"[{host}]" if ":" in host else host, port)
    server = Server(app, service)
    server.run(sockets=[listener])
    if failures:
        raise StartError(f"the latencies cannot be measured: {one_line(failures[0])}")
    if service.left_behind:  # the interpreter would wait for them
        logging.shutdown()
        os._exit(0 if service.alive else 1)
