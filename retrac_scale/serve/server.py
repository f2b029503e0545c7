"""Running the service, to the end of what it has begun."""

from __future__ import annotations

import faulthandler
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from retrac_scale.serve.app import create_app
from retrac_scale.serve.library import Library
from retrac_scale.serve.limits import Limits

GRACE = 30
"""Seconds that requests have to end after a signal."""
LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]", "::1"]


def run(
    library: Library,
    *,
    host: str,
    port: int,
    token: str | None,
    limits: Limits,
    title: str,
    announce: Callable[[str], object] = lambda url: None,
    renew: Callable[[], Library] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests that have begun are answered.

    Args:
        library: what is served.
        host: address to listen on.
        port: 0 for any that is free.
        token: see `create_app`; limits and title too.
        announce: told the address once it is taken.
        renew: see `create_app`.

    Raises:
        ValueError: others could reach the service and no token is set.
        OSError: the address cannot be had.
    """
    if token is None and not is_local(host):
        raise ValueError(f"--host {host} lets others in; set a token that they must send (--token-file).")
    app = create_app(library, title=title, token=token, limits=limits, hosts=names_of(host), renew=renew)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE, server_header=False)
    server = uvicorn.Server(config)

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    if sys.__stderr__ is not None:  # a mapped file that is cut short while it is scanned ends the process: say where
        faulthandler.enable(sys.__stderr__, all_threads=False)
    with _listen(host, port) as listener:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:  # uvicorn puts these handlers back and raises the signal once more when it is done
            announce(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/")
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: a port is a number from 0 to 65535.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(
            error.errno, f"cannot listen on {host}, port {port}: {why}; choose another --port or --host"
        ) from None


def names_of(host: str) -> list[str] | None:
    """What a service at an address may be called in requests; None for anything where others can reach it."""
    return [*LOCAL_NAMES, host, f"[{host}]"] if is_local(host) else None


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
