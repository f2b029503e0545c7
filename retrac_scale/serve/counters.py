"""What is counted of the service, for Prometheus."""

from __future__ import annotations

import time

import prometheus_client as prometheus
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Counters:
    """Requests, their seconds, and the queries of each scan."""

    def __init__(self) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter("requests", "Requests answered.", ["route", "status"], registry=registry)
        self._seconds = prometheus.Histogram("request_seconds", "Time to the answer.", ["route"], registry=registry)
        self._sizes = prometheus.Histogram(
            "scan_queries", "Queries answered by one scan.", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def scanned(self, queries: int) -> None:
        """Count a scan."""
        self._sizes.observe(queries)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return prometheus.generate_latest(self._registry)


class Counting:
    """ASGI middleware that counts what is answered; whose client is gone is not."""

    def __init__(self, app: ASGIApp, counters: Counters) -> None:
        self.app, self.counters = app, counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        started, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await self.app(scope, receive, noted)
        if scope["type"] == "http" and status:
            route = getattr(scope.get("route"), "path", "other")
            self.counters.answered(route, status, time.perf_counter() - started)
