"""Concurrent queries, answered in one scan."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from retrac_scale.query.question import Question
from retrac_scale.report.content import Json, ranked
from retrac_scale.serve.asked import Asked
from retrac_scale.serve.library import Library

logger = logging.getLogger(__name__)

T = TypeVar("T")
FILTERS = 16
"""Of one scan, at most: each of them is a byte for every sample."""


@dataclass(eq=False)
class _Waiting:
    index: str
    asked: Asked
    question: Question
    answer: asyncio.Future[Json]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Queries of one kind can share a scan: they differ in k, in which samples count, and in what is asked about.

        Where copies are folded, how far they are looked for hangs on k; groups are formed of the same samples.
        """
        question = self.question
        folded = None if question.duplicates == "keep" else (question.duplicates, question.k)
        counting = None if question.group_by is None else question.where
        return self.index, counting, question.group_by, question.reduce, question.exclude_self, folded


class Batcher:
    """Gathers what arrives while a scan runs, and answers all of one kind with the next.

    No query waits for others to come: a lone one is scanned at once. All computing is done on one thread, since a scan
    uses every core by itself; a scan waits there for at most one other computation.

    Args:
        library: what is asked.
        size: most queries of one scan, of which one in views is nine.
        observe: told the number of queries of each scan.
    """

    def __init__(self, library: Library, size: int, observe: Callable[[int], object] = lambda size: None) -> None:
        self.library, self.size, self.observe = library, size, observe
        self._waiting: list[_Waiting] = []
        self._closing = threading.Event()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scan")
        self._filter = ThreadPoolExecutor(1, thread_name_prefix="where")
        self._turn = asyncio.Lock()
        self._task = asyncio.create_task(self._serve())

    @property
    def is_serving(self) -> bool:
        """Whether what is asked will be answered."""
        return not self._task.done()

    async def ask(self, index: str, asked: Asked, question: Question) -> Json:
        """The lists of one query, as the page holds them."""
        if isinstance(question.where, str) and not self.library.knows(index, question.where):
            await self.mask(index, question.where)
        one = _Waiting(index, asked, question, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        self._arrived.set()
        return await one.answer

    async def mask(self, index: str, where: str) -> None:
        """Have the library work out which samples count, on a thread of its own, for as long as somebody waits."""
        gone = threading.Event()

        def wanted() -> bool:
            return not (gone.is_set() or self._closing.is_set())

        try:
            await asyncio.get_running_loop().run_in_executor(self._filter, self.library.mask, index, where, wanted)
        finally:
            gone.set()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Something else on the thread that computes, of which one at a time stands in the way of scans."""
        async with self._turn:
            return await self._compute(function, *arguments)

    async def _compute(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def close(self) -> None:
        """Stop; whoever still waits is told so."""
        self._closing.set()
        self._task.cancel()
        for one in self._waiting:
            one.answer.cancel()
        for thread in (self._filter, self._thread):
            await asyncio.to_thread(thread.shutdown, cancel_futures=True)

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            self._waiting = [one for one in self._waiting if not one.answer.done()]  # clients that went away
            if not self._waiting:
                self._arrived.clear()
                continue
            batch = self._next()
            self._waiting = [one for one in self._waiting if one not in batch]
            try:
                await self._answer(batch)
            except Exception as error:  # whatever it is, the next batch is answered
                logger.exception("a scan's answers were lost")
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(RuntimeError(f"the scan's answers were lost: {error}"))
            finally:
                for one in batch:  # nobody waits on where the service ends
                    one.answer.cancel()

    async def _answer(self, batch: list[_Waiting]) -> None:
        self.observe(sum(len(one.asked) for one in batch))
        for one, answer in zip(batch, await self._compute(self._answers, batch), strict=True):
            if one.answer.done():
                continue
            if isinstance(answer, Exception):
                one.answer.set_exception(answer)
            else:
                one.answer.set_result(answer)

    def _next(self) -> list[_Waiting]:
        """Whoever has waited longest, and those who can share the scan."""
        first = self._waiting[0]
        batch, filters, queries = [first], {first.question.where}, len(first.asked)
        for one in self._waiting[1:]:
            fits = len(filters | {one.question.where}) <= FILTERS and queries + len(one.asked) <= self.size
            if one.kind == first.kind and fits:
                batch.append(one)
                filters.add(one.question.where)
                queries += len(one.asked)
        return batch

    def _answers(self, batch: list[_Waiting]) -> list[Json | Exception]:
        """One answer or error each; a batch that fails is asked one by one, so that each has its own error."""
        try:
            found = self.library.ask(batch[0].index, [one.asked for one in batch], [one.question for one in batch])
            return [answer if isinstance(answer, Exception) else ranked(answer)[0] for answer in found]
        except Exception as error:  # goes to whoever asked
            return [error] if len(batch) == 1 else [answer for one in batch for answer in self._answers([one])]
