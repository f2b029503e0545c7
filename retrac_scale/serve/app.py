"""The HTTP API: routes, their bodies, and errors in one sentence."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any

import fastapi
from fastapi import FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from retrac_scale.index.reader import StaleIndexError
from retrac_scale.query.index import Index
from retrac_scale.query.question import Question
from retrac_scale.query.topk import Duplicates
from retrac_scale.query.views import check_views
from retrac_scale.report.content import Json, sides
from retrac_scale.report.page import page
from retrac_scale.serve.asked import Asked, Sketches
from retrac_scale.serve.batcher import Batcher
from retrac_scale.serve.bodies import Against, Ask, Explain, Fold, Groups, Halves, InViews, Part, Stored, Told, Where
from retrac_scale.serve.counters import Counters, Counting
from retrac_scale.serve.following import Follower
from retrac_scale.serve.guard import Guard
from retrac_scale.serve.library import Library
from retrac_scale.serve.limits import Limits
from retrac_scale.serve.uploads import Upload, read_upload, region_asked
from retrac_scale.store import DamagedStoreError

if TYPE_CHECKING:
    from retrac_scale.task.concepts import Concept

MOST_IDS, MOST_PICTURES = 1000, 100
DECODED_AT_ONCE = 2
"""Uploads, each of which may take hundreds of megabytes meanwhile."""


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


async def _wrong(_: Request, error: Exception) -> Plain:
    return Plain({"detail": str(error)}, 422)


async def _lost(_: Request, error: Exception) -> Plain:
    return Plain({"detail": str(error)}, 503)


async def _malformed(_: Request, error: Exception) -> Plain:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return Plain({"detail": f"{where}: {first['msg']}"}, 422)


REFUSING: dict[type[Exception], Any] = {
    ValueError: _wrong,
    StaleIndexError: _lost,
    DamagedStoreError: _lost,
    OSError: _lost,
    RequestValidationError: _malformed,
}


class Service:
    """What the routes do, and what they share."""

    def __init__(
        self, library: Library, title: str, limits: Limits, renew: Callable[[], Library] | None = None
    ) -> None:
        self.library, self.title, self.limits = library, title, limits
        self._follower = Follower(library, renew, self._take)
        self.counters = Counters()
        self._about = library.about()
        self._known: dict[str, Json] = {}
        self._telling = asyncio.Lock()
        self._batcher: Batcher
        self._decoder: ThreadPoolExecutor

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Scans are made while the service is up."""
        self._decoder = ThreadPoolExecutor(DECODED_AT_ONCE, thread_name_prefix="decode")
        self._batcher = Batcher(self.library, self.limits.batch, self.counters.scanned)
        loading = self._batcher.run(importlib.import_module, "retrac_scale.index.approximate")  # torch takes seconds
        beside = [asyncio.create_task(task) for task in (self._follower.follow(), loading)]
        yield
        for task in beside:
            task.cancel()
        self._decoder.shutdown(wait=False, cancel_futures=True)
        await self._batcher.close()

    def _take(self, library: Library, about: Json) -> None:
        """Answer from another library from now on."""
        self.library = self._batcher.library = library
        self._about, self._known = about, {}

    async def root(self) -> HTMLResponse:
        """The page."""
        own = resources.files("retrac_scale.serve")
        scripts = [own.joinpath(name).read_text(encoding="utf-8") for name in ("regions.js", "live.js")]
        return HTMLResponse(page(self.title, {"title": self.title, "live": True}, *scripts))

    async def health(self) -> Json:
        """Whether the service can answer, and whether each index is ready, behind its store, loading or refused."""
        if not self._batcher.is_serving:
            raise HTTPException(503, "queries are no longer answered; start the service again.")
        states = await self._follower.state()
        if set(states.values()) == {"refused"}:
            raise HTTPException(503, "the indexes no longer belong to their stores; build them again.")
        return {"status": "ok", "indexes": states}

    async def metrics(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.counters.text(), media_type="text/plain; version=0.0.4")

    async def describe(self) -> Json:
        """Indexes, columns, sources and limits."""
        kept = {"k": self.limits.k, "ids": self.limits.ids, "upload_bytes": self.limits.upload_bytes}
        return {"title": self.title, **self._about, "limits": kept}

    async def ids(
        self,
        source: Stored,
        contains: Annotated[str, Query(max_length=200)] = "",
        count: Annotated[int, Query(ge=1, le=MOST_IDS)] = 100,
        pictures: Annotated[bool, Query(description="their pictures too, of at most 100")] = False,
    ) -> Json:
        """Ids to choose from."""
        names = await asyncio.to_thread(
            self.library.ids, source, contains, min(count, MOST_PICTURES) if pictures else count
        )
        if not pictures:
            return {"ids": names}
        asked = [Asked(source, name) for name in names]
        return {"ids": names, "pictures": await asyncio.to_thread(lambda: list(map(self.library.query_picture, asked)))}

    async def query(self, ask: Ask) -> Json:
        """Which training samples influenced these queries most?"""
        asked = [Asked(ask.source, name) for name in ask.ids]
        return await self._answer(asked, ask.k, ask.where, ask.duplicates, ask.indexes)

    async def upload(
        self,
        file: Annotated[UploadFile, File(description="PNG, JPEG, WebP or BMP")],
        k: Annotated[int, Form(ge=1)] = 10,
        where: Annotated[Where, Form()] = "",
        duplicates: Annotated[Fold, Form()] = "keep",
        concept: Annotated[Told | None, Form()] = None,
        against: Annotated[Against | None, Form()] = None,
        views: Annotated[InViews, Form()] = False,
    ) -> Json:
        """Which training samples influenced this image most, or what the model makes of a concept in it?"""
        if self.library.measured is None:
            raise HTTPException(404, "uploads are not served: the service was started without a model.")
        await self._check_measured(k, [], where or None, duplicates, views)
        asked_for = self.library.measured.task.told.concept(concept, against)
        shape, background = self.library.image_shape, self.library.background

        def read() -> Upload:
            return read_upload(file.file.read(), shape, self.limits, background)

        image = await asyncio.get_running_loop().run_in_executor(self._decoder, read)
        if asked_for is not None or views:
            image = await asyncio.to_thread(image.part, None, asked_for, self.library.views if views else ())
        return await self._answer([await self._measured(image)], k, where or None, duplicates)

    async def region(self, ask: Part) -> Json:
        """Which training samples influenced this part of a picture most, or what the model makes of a concept in it?"""
        if self.library.measured is None:
            raise HTTPException(404, "parts cannot be asked about: the service was started without a model.")
        asked = Asked(ask.source, ask.id)
        await self._check_measured(ask.k, [asked], ask.where, ask.duplicates, ask.views)
        concept = self.library.measured.task.told.concept(ask.concept, ask.against)
        part = await self._batcher.run(self._part, asked, ask, concept)
        return await self._answer([await self._measured(part)], ask.k, ask.where, ask.duplicates)

    def _part(self, asked: Asked, ask: Part, concept: Concept | None) -> Upload:
        """What is asked about, whose mask is small while others are answered: it is decoded here, not before."""
        library = self.library
        region = region_asked(ask.box, ask.mask, ask.rest, library.image_shape[1:])
        if concept is None and region is None and not ask.views:
            raise ValueError("give box, [x0, y0, x1, y1], or mask, a PNG in base64, or a concept, or views.")
        return library.part(asked, region, concept, library.views if ask.views else ())

    async def explain(self, ask: Explain) -> Json:
        """What each checkpoint and timestep adds to a score."""
        asked = Asked(ask.source, ask.id)
        self._check(1, [asked], [ask.index])
        return await self._batcher.run(self.library.explain, ask.index, asked, ask.sample, ask.side)

    async def groups(self, ask: Groups) -> Json:
        """Which groups influenced a query most?"""
        asked = Asked(ask.source, ask.id)
        self._check(ask.k, [asked], [])
        if ask.column not in self._about["group_columns"]:  # as many groups as samples would be a table of all scores
            known = ", ".join(self._about["group_columns"]) or "none"
            raise ValueError(f"{ask.column!r} is no column that puts samples together; there are: {known}.")
        own = ask.source == "training"

        def question(index: Index) -> Question:
            return Question(ask.k, sides(index), ask.where, ask.column, ask.reduce, own, duplicates=ask.duplicates)

        every = self.library.indexes.items()
        if self.library.uploads.views(asked):
            check_views(question(next(iter(self.library.indexes.values()))))
        found = await asyncio.gather(*(self._batcher.ask(name, asked, question(index)) for name, index in every))
        return dict(zip(self.library.indexes, found, strict=True))

    async def repeatability(self) -> Json:
        """How far each index's lists would come again, told from stored queries."""
        async with self._telling:
            library, known = self.library, self._known  # of which there are others once an index was built again
            for name in library.queries:
                if name not in known:
                    groups = library.compared(name)
                    found = [await self._batcher.run(library.repeatability, name, some) for some in groups]
                    known[name] = library.told(name, found)
        return known

    async def halves(self, ask: Halves) -> Json:
        """How many names of a query's list two halves of the measurements share."""
        asked = Asked(ask.source, ask.id)
        self._check(ask.k, [asked], [])
        every = {}
        for name in self.library.indexes:
            if ask.where is not None:
                await self._batcher.mask(name, ask.where)
            every[name] = await self._batcher.run(self.library.shared, name, asked, ask.k, ask.where)
        return {name: shared for name, shared in every.items() if shared is not None}

    def _check(self, k: int, asked: list[Asked], indexes: list[str]) -> None:
        if k > self.limits.k:
            raise ValueError(f"k must be at most {self.limits.k}, got {k}.")
        if len(asked) > self.limits.ids:
            raise ValueError(f"at most {self.limits.ids} ids can be asked at a time, got {len(asked)}.")
        for one in asked:
            self.library.check(one)
        self.library.check_indexes(indexes)

    async def _check_measured(
        self, k: int, asked: list[Asked], where: str | None, duplicates: Duplicates, views: bool
    ) -> None:
        """What cannot be answered is told before it is measured."""
        self._check(k, asked, [])
        if views:
            check_views(Question(k, "both", where, None, "sum", False, duplicates=duplicates))
        if where is not None:
            for name in self.library.indexes:
                await self._batcher.mask(name, where)

    async def _measured(self, upload: Upload) -> Asked:
        """Sketched a piece at a time: others are answered between, and for who has left nothing more is measured."""
        library, pieces, asked = self.library, list[Sketches](), None
        while asked is None:
            asked = await self._batcher.run(library.upload, upload, pieces)
        return asked

    async def _answer(
        self,
        asked: list[Asked],
        k: int,
        where: str | None,
        duplicates: Duplicates,
        indexes: list[str] | None = None,
    ) -> Json:
        indexes = indexes or list(self.library.indexes)
        self._check(k, asked, indexes)
        found = {}
        for name in indexes:
            own = asked[0].source == "training"
            side = sides(self.library.indexes[name])
            question = Question(k, side, where, None, "sum", own, duplicates=duplicates)
            found[name] = list(await asyncio.gather(*(self._batcher.ask(name, one, question) for one in asked)))
        return await asyncio.to_thread(self.library.fragment, asked, found)


def create_app(
    library: Library,
    *,
    title: str = "Attributions",
    token: str | None = None,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    hosts: list[str] | None = None,
    renew: Callable[[], Library] | None = None,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        library: what is served.
        title: heading of the page.
        token: what clients must send as `Authorization: Bearer TOKEN`; None lets everybody in.
        limits: how much is taken on.
        hosts: names under which the service may be asked, against DNS rebinding; None for any.
        renew: opens everything anew, when an index was built again at its place; None to stay with what is there.

    Raises:
        ValueError: the token is empty.
    """
    if token == "":
        raise ValueError("the token is empty, so that anybody could send it.")
    service = Service(library, title, limits, renew)
    app = FastAPI(
        title="retrac_scale",
        description="Which training samples made a diffusion model produce this one?",
        lifespan=service.lifespan,
        default_response_class=Plain,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        responses=REFUSALS,
    )
    app.add_middleware(Guard, token=token, limits=limits)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(Counting, counters=service.counters)
    for kind, handler in REFUSING.items():
        app.add_exception_handler(kind, handler)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    """Each is told of in the OpenAPI by the sentence that stands with it here."""
    text = fastapi.responses.PlainTextResponse
    for path, handler, more in (
        ("/", service.root, {"response_class": HTMLResponse}),
        ("/health", service.health, {}),
        ("/metrics", service.metrics, {"response_class": text}),
        ("/api/about", service.describe, {}),
        ("/api/ids", service.ids, {}),
        ("/api/query", service.query, {"methods": ["POST"]}),
        ("/api/upload", service.upload, {"methods": ["POST"]}),
        ("/api/region", service.region, {"methods": ["POST"]}),
        ("/api/explain", service.explain, {"methods": ["POST"]}),
        ("/api/groups", service.groups, {"methods": ["POST"]}),
        ("/api/repeatability", service.repeatability, {}),
        ("/api/repeatability", service.halves, {"methods": ["POST"]}),
    ):
        app.add_api_route(path, handler, summary=handler.__doc__, **more)
