"""Running the service, to the end of what it has begun."""

from __future__ import annotations

import ipaddress
import signal
from types import FrameType

import uvicorn

from retrac_scale.serve.app import create_app
from retrac_scale.serve.library import Library
from retrac_scale.serve.limits import Limits

GRACE = 30
"""Seconds that requests have to end after a signal."""
LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]", "::1"]


def run(library: Library, *, host: str, port: int, token: str | None, limits: Limits, title: str) -> None:
    """Serve until SIGINT or SIGTERM; requests that have begun are answered.

    Raises:
        ValueError: others could reach the service and no token is set.
    """
    local = is_local(host)
    if not local and token is None:
        raise ValueError(f"--host {host} lets others in; set a token that they must send (--token-file).")
    app = create_app(library, title=title, token=token, limits=limits, hosts=LOCAL_NAMES if local else None)
    config = uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=GRACE, server_header=False)
    server = uvicorn.Server(config)

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:  # uvicorn puts these handlers back and raises the signal once more when it is done
        server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
