"""The HTTP API: routes, their bodies, and errors in one sentence."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any, Literal

import fastapi
import prometheus_client as prometheus
from fastapi import FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from retrac_scale.index.reader import StaleIndexError
from retrac_scale.query.index import Index
from retrac_scale.query.question import Question
from retrac_scale.query.topk import Reduce
from retrac_scale.query.where import LONGEST
from retrac_scale.report.content import sides
from retrac_scale.report.page import page
from retrac_scale.serve.batcher import Batcher
from retrac_scale.serve.guard import Guard
from retrac_scale.serve.library import Asked, Library
from retrac_scale.serve.limits import Limits
from retrac_scale.serve.uploads import read_upload, region_asked
from retrac_scale.store import DamagedStoreError

Json = dict[str, Any]
Stored = Literal["queries", "training"]
Name = Annotated[str, Field(max_length=4096)]
Where = Annotated[str, Field(max_length=LONGEST, description="which samples count, such as `year < 2000`")]
MOST_IDS, MOST_PICTURES = 1000, 100


class Body(BaseModel):
    """A request's JSON; fields that nobody knows are refused."""

    model_config = ConfigDict(extra="forbid")


class Ask(Body):
    """Which training samples influenced these queries most?"""

    source: Stored = Field(description="the store of queries, or training samples, themselves left out")
    ids: list[Name] = Field(min_length=1, description="of queries in that source", examples=[["0"]])
    k: int = Field(10, ge=1, description="results per side")
    where: Where | None = None
    indexes: list[Name] | None = Field(None, min_length=1, max_length=64, description="which; null for all")


class Explain(Body):
    """What does each checkpoint and timestep add to this score?"""

    source: Literal["queries", "training", "uploads"]
    id: Name = Field(description="of the query in its source", examples=["0"])
    sample: Name = Field(description="id of the training sample", examples=["0"])
    index: Name


class Part(Body):
    """Which training samples influenced this part of a picture most?"""

    source: Literal["queries", "training", "uploads"]
    id: Name = Field(description="of the query in its source", examples=["0"])
    box: list[int] | None = Field(None, min_length=4, max_length=4, description="x0, y0, x1, y1 in pixels")
    mask: str | None = Field(None, max_length=2**20, description="a PNG in base64, white where it counts")
    rest: bool = Field(False, description="all but it")
    k: int = Field(10, ge=1, description="results per side")
    where: Where | None = None


class Groups(Body):
    """Which artists, licences, classes, ... influenced this query most?"""

    source: Literal["queries", "training", "uploads"]
    id: Name = Field(description="of the query in its source", examples=["0"])
    column: Name
    reduce: Reduce = "sum"
    k: int = Field(10, ge=1, description="groups per side")
    where: Where | None = None


class Halves(Body):
    """How many names of this query's list do two halves of the measurements share?"""

    source: Literal["queries", "training", "uploads"]
    id: Name = Field(description="of the query in its source", examples=["0"])
    k: int = Field(10, ge=1, description="length of the list of proponents")
    where: Where | None = None


class Problem(BaseModel):
    """Why a request was refused, in a sentence."""

    detail: str


class Plain(JSONResponse):
    """JSON in ASCII: a lone surrogate in somebody's string is no reason to fail."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


REFUSALS: dict[int | str, Any] = {
    status: {"model": Problem, "description": why}
    for status, why in {
        400: "the body cannot be read",
        401: "the token is missing or wrong",
        403: "asked by another site's page",
        404: "uploads are not served",
        408: "the body did not arrive in time",
        413: "the body is too large",
        422: "something asked for does not exist or is not allowed; says what",
        503: "too many requests at a time, or a store, index or picture has changed or is damaged",
    }.items()
}


def create_app(
    library: Library,
    *,
    title: str = "Attributions",
    token: str | None = None,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    hosts: list[str] | None = None,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        library: what is served.
        title: heading of the page.
        token: what clients must send as `Authorization: Bearer TOKEN`; None lets everybody in.
        limits: how much is taken on.
        hosts: names under which the service may be asked, against DNS rebinding; None for any.

    Raises:
        ValueError: the token is empty.
    """
    if token == "":
        raise ValueError("the token is empty, so that anybody could send it.")
    registry = prometheus.CollectorRegistry()
    requests = prometheus.Counter("requests", "Requests answered.", ["route", "status"], registry=registry)
    seconds = prometheus.Histogram("request_seconds", "Time to the answer.", ["route"], registry=registry)
    sizes = prometheus.Histogram(
        "scan_queries", "Queries answered by one scan.", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64)
    )
    about = library.about()
    known: dict[str, Json] = {}
    telling = asyncio.Lock()
    batcher: Batcher

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal batcher
        batcher = Batcher(library, limits.batch, sizes.observe)
        yield
        await batcher.close()

    app = FastAPI(
        title="retrac_scale",
        description="Which training samples made a diffusion model produce this one?",
        lifespan=lifespan,
        default_response_class=Plain,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        responses=REFUSALS,
    )
    app.add_middleware(Guard, token=token, limits=limits)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.middleware("http")
    async def measure(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        response = await answer(request)
        route = getattr(request.scope.get("route"), "path", "other")
        requests.labels(route, response.status_code).inc()
        seconds.labels(route).observe(time.perf_counter() - started)
        return response

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> Plain:
        return Plain({"detail": str(error)}, 422)

    @app.exception_handler(StaleIndexError)
    @app.exception_handler(DamagedStoreError)
    @app.exception_handler(OSError)
    async def lost(_: Request, error: Exception) -> Plain:
        return Plain({"detail": str(error)}, 503)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Plain:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Plain({"detail": f"{where}: {first['msg']}"}, 422)

    def check(k: int, asked: list[Asked], indexes: list[str]) -> None:
        if k > limits.k:
            raise ValueError(f"k must be at most {limits.k}, got {k}.")
        if len(asked) > limits.ids:
            raise ValueError(f"at most {limits.ids} ids can be asked at a time, got {len(asked)}.")
        for one in asked:
            library.check(one)
        library.check_indexes(indexes)

    async def answer(asked: list[Asked], k: int, where: str | None, indexes: list[str]) -> Json:
        check(k, asked, indexes)
        found = {}
        for name in indexes:
            own = asked[0].source == "training"
            question = Question(k, sides(library.indexes[name]), where, None, "sum", own)
            found[name] = list(await asyncio.gather(*(batcher.ask(name, one, question) for one in asked)))
        return await asyncio.to_thread(library.fragment, asked, found)

    @app.get("/", response_class=HTMLResponse, summary="The page.")
    async def root() -> HTMLResponse:
        live = resources.files("retrac_scale.serve").joinpath("live.js").read_text(encoding="utf-8")
        return HTMLResponse(page(title, {"title": title, "live": True}, live))

    @app.get("/health", summary="Whether the service is up.")
    async def health() -> Json:
        return {"status": "ok"}

    @app.get("/metrics", summary="Counters for Prometheus.", response_class=fastapi.responses.PlainTextResponse)
    async def metrics() -> Response:
        return Response(prometheus.generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/api/about", summary="Indexes, columns, sources and limits.")
    async def describe() -> Json:
        kept = {"k": limits.k, "ids": limits.ids, "upload_bytes": limits.upload_bytes}
        return {"title": title, **about, "limits": kept}

    @app.get("/api/ids", summary="Ids to choose from.")
    async def ids(
        source: Stored,
        contains: Annotated[str, Query(max_length=200)] = "",
        count: Annotated[int, Query(ge=1, le=MOST_IDS)] = 100,
        pictures: Annotated[bool, Query(description="their pictures too, of at most 100")] = False,
    ) -> Json:
        names = await asyncio.to_thread(library.ids, source, contains, min(count, MOST_PICTURES) if pictures else count)
        if not pictures:
            return {"ids": names}
        asked = [Asked(source, name) for name in names]
        return {"ids": names, "pictures": await asyncio.to_thread(lambda: list(map(library.query_picture, asked)))}

    @app.post("/api/query", summary=Ask.__doc__)
    async def query(ask: Ask) -> Json:
        asked = [Asked(ask.source, name) for name in ask.ids]
        return await answer(asked, ask.k, ask.where, ask.indexes or list(library.indexes))

    @app.post("/api/upload", summary="Which training samples influenced this image most?")
    async def upload(
        file: Annotated[UploadFile, File(description="PNG, JPEG, WebP or BMP")],
        k: Annotated[int, Form(ge=1)] = 10,
        where: Annotated[Where, Form()] = "",
    ) -> Json:
        if library.measured is None:
            raise HTTPException(404, "uploads are not served: the service was started without a model.")
        check(k, [], [])
        content = await file.read()
        image = await asyncio.to_thread(read_upload, content, library.image_shape, limits, library.background)
        asked = await batcher.run(library.upload, image)
        return await answer([asked], k, where or None, list(library.indexes))

    @app.post("/api/region", summary=Part.__doc__)
    async def region(ask: Part) -> Json:
        if library.measured is None:
            raise HTTPException(404, "parts cannot be asked about: the service was started without a model.")
        asked = Asked(ask.source, ask.id)
        check(ask.k, [asked], [])
        told = await asyncio.to_thread(region_asked, ask.box, ask.mask, ask.rest, limits)
        part = await batcher.run(library.part, asked, told)
        return await answer([part], ask.k, ask.where, list(library.indexes))

    @app.post("/api/explain", summary=Explain.__doc__)
    async def explain(ask: Explain) -> Json:
        asked = Asked(ask.source, ask.id)
        check(1, [asked], [ask.index])
        return await batcher.run(library.explain, ask.index, asked, ask.sample)

    @app.post("/api/groups", summary=Groups.__doc__)
    async def groups(ask: Groups) -> Json:
        asked = Asked(ask.source, ask.id)
        check(ask.k, [asked], [])
        if ask.column not in about["group_columns"]:  # as many groups as samples would be a table of all scores
            known = ", ".join(about["group_columns"]) or "none"
            raise ValueError(f"{ask.column!r} is no column that puts samples together; there are: {known}.")
        own = ask.source == "training"

        def question(index: Index) -> Question:
            return Question(ask.k, sides(index), ask.where, ask.column, ask.reduce, own)

        every = library.indexes.items()
        found = await asyncio.gather(*(batcher.ask(name, asked, question(index)) for name, index in every))
        return dict(zip(library.indexes, found, strict=True))

    @app.get("/api/repeatability", summary="How far each index's lists would come again, told from stored queries.")
    async def repeatability() -> Json:
        async with telling:
            for name in library.queries:
                if name not in known:
                    groups = library.compared(name)
                    found = [await batcher.run(library.repeatability, name, some) for some in groups]
                    known[name] = library.told(name, found)
        return known

    @app.post("/api/repeatability", summary=Halves.__doc__)
    async def halves(ask: Halves) -> Json:
        asked = Asked(ask.source, ask.id)
        check(ask.k, [asked], [])
        every = {name: await batcher.run(library.shared, name, asked, ask.k, ask.where) for name in library.indexes}
        return {name: shared for name, shared in every.items() if shared is not None}

    return app
