"""pcae-serve: flags to settings, settings to a listening server. It holds no logic of its own."""

import logging
import socket
import sys

import uvicorn

from pcae_serve import bundle, engines
from pcae_serve.app import create_app
from pcae_serve.command import run
from pcae_serve.errors import StartError
from pcae_serve.service import Service
from pcae_serve.settings import Settings


class Serve(Settings):
    __doc__ = Settings.__doc__

    def cli_cmd(self) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        listener = listen(self.host, self.port)
        served = bundle.load(self.bundle or bundle.demo())
        engine = engines.load(self.backend, served, self.device, self.threads)
        app = create_app(Service(self, served, engine))
        with listener:
            uvicorn.Server(uvicorn.Config(app, log_level="info")).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is told before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror}; stop what holds it or choose --port"
        ) from None
    return listener


def main() -> None:
    sys.exit(run(Serve))


if __name__ == "__main__":
    main()
