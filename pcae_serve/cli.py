"""pcae-serve: flags to settings, settings to a listening server. It holds no logic of its own."""

import logging
import socket
import sys

import uvicorn

from pcae_serve import bundle, engines
from pcae_serve.app import create_app
from pcae_serve.command import run
from pcae_serve.errors import StartError, one_line
from pcae_serve.service import Service
from pcae_serve.settings import Settings

#: How long requests in hand may take after SIGTERM; a longer upload is cut off.
DRAIN_S = 10

log = logging.getLogger(__name__)


class Serve(Settings):
    __doc__ = Settings.__doc__

    def cli_cmd(self) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
        with listen(self.host, self.port) as listener:
            served = bundle.load(self.bundle or bundle.demo())
            engine = engines.load(
                self.backend, served, self.device, self.threads, self.max_batch, self.cache_dir
            )
            serve(Service(self, served, engine), listener)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is told before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # two may bind, one may listen
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror}; stop what holds it or choose --port"
        ) from None
    return listener


def serve(service: Service, listener: socket.socket) -> None:
    """Answer requests until a signal comes. Raises StartError where the service cannot start."""
    failures = list[BaseException]()

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(service, on_failure=stop)
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=DRAIN_S))
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d, not ready yet", f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[listener])
    if failures:
        raise StartError(f"the latencies cannot be measured: {one_line(failures[0])}")


def main() -> None:
    sys.exit(run(Serve))


if __name__ == "__main__":
    main()
