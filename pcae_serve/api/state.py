"""Access to the service from a route; `create_app` stores it in the application's state."""

from fastapi import Request

from pcae_serve.runtime.service import Service


def service_of(request: Request) -> Service:
    """Return the service that the application serves."""
    service: Service = request.app.state.service
    return service
