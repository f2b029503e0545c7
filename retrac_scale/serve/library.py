"""What is served: indexes, queries, pictures; everything here blocks."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from retrac_scale.arrays import Bools, Float32
from retrac_scale.columns import distinct
from retrac_scale.measurement.halves import MeasuredOnceError, repeatability_of_rows
from retrac_scale.query.answer import answers_by_one_scan
from retrac_scale.query.explain import explain_lists
from retrac_scale.query.index import Index
from retrac_scale.query.question import Question
from retrac_scale.query.topk import Side, TopK
from retrac_scale.query.where import satisfying
from retrac_scale.report import Pictures, norm_curve
from retrac_scale.report.content import (
    Json,
    Rows,
    check_same_samples,
    curve_of,
    explained,
    group_columns,
    plain,
    queries_of_indexes,
)
from retrac_scale.report.pictures import PictureFiles, data_uri
from retrac_scale.report.shown import check_shown
from retrac_scale.report.trust import Told, joined, repeatability_for_page, shared_by_halves, told
from retrac_scale.serve.asked import Asked, Measured, Sketches, Source, Uploads
from retrac_scale.serve.masks import Masks
from retrac_scale.serve.named import Named
from retrac_scale.serve.uploads import Upload, shape_of
from retrac_scale.store import SketchStore
from retrac_scale.store.taking import take, taken

if TYPE_CHECKING:
    from retrac_scale.sketching.samples import Samples
    from retrac_scale.task.concepts import Concept

T = TypeVar("T")
MOST_CHOICES = 60
"""A column with more distinct values is searched, not chosen from."""
CACHED_PICTURES, CACHED_ROWS, CACHED_MASKS = 16_384, 1024, 32
MASK_BYTES = 2**26
COMPARED, COMPARED_AT_ONCE, COMPARED_LENGTH = 32, 4, 10
"""Stored queries by which an index's repeatability is told, how many while other questions wait, and their lists'
length."""
SMALL = 2**24
"""As for a report, but others wait: seconds."""


class Library:
    """Indexes with their queries, pictures and columns, kept open; one thread at a time may ask it.

    Args:
        indexes: {name: index}, of the same samples.
        pictures: of training samples, and of the queries in their order.
        queries: a store of query sketches for all indexes, or {name: store} of the same queries in the same order.
        measured: how uploads are sketched: task, checkpoints and, unless as each index's store was, timesteps; its
            dataset is not used.
        kept_uploads: how many uploads are remembered, of which one in views is nine.
        background: that transparent uploads are put onto, as the training images were.

    Raises:
        ValueError: the indexes hold other samples, the queries fit one badly or are not the same for all, or uploads
            cannot be sketched like an index's store.
    """

    def __init__(
        self,
        indexes: Mapping[str, Index],
        pictures: Pictures,
        *,
        queries: SketchStore | Mapping[str, SketchStore] | None = None,
        measured: Samples | None = None,
        kept_uploads: int = 64,
        background: str = "",
    ) -> None:
        self.indexes, self.pictures, self.measured = dict(indexes), pictures, measured
        self.background = background
        check_same_samples(self.indexes)
        for index in self.indexes.values():
            index.patient = True  # new samples are no reason to fall silent until the index is built again
        self.queries = queries_of_indexes(self.indexes, queries)
        first = next(iter(self.indexes.values()))
        self.store = first.check_store()
        for name, index in self.indexes.items() if measured is not None else ():
            store = index.check_store()
            if store is None or "scheduler" not in store.fingerprint:
                raise ValueError(
                    f"uploads can only be sketched like a store that sketch(...) made and that is still there; that of "
                    f"{name} is not."
                )
        sample = () if self.store is None else self.store.plan.get("sample", ())
        self.image_shape = (1, 1, 1) if measured is None else shape_of(measured.task, sample)
        self._samples = Named(first.places)
        self._rows = Rows(first)
        self._places: dict[Source, dict[str, int]] = {"queries": {}}
        for name, own in self.queries.items():
            places = {str(query): place for place, query in enumerate(own.ids.tolist())}
            if list(self._places["queries"]) not in ([], list(places)):
                raise ValueError(
                    f"the queries of {name} are others than those of the first index, or in another order."
                )
            self._places["queries"] = places
        self._asked = {name: self.indexes[name].query_rows(own) for name, own in self.queries.items()}
        stored = self._by_store(lambda store: Named(store.places, store.alive))
        self._stored = stored if len(stored) == len(self.indexes) else {}  # a store that is gone has no samples to ask
        self.uploads = Uploads(kept_uploads)
        self._training_rows = lru_cache(CACHED_ROWS)(self._read_training_rows)
        self._masks = Masks(max(1, min(CACHED_MASKS, MASK_BYTES // first.shape[1])))
        self.sample = lru_cache(CACHED_PICTURES)(self._describe)
        self.query_picture = lru_cache(CACHED_PICTURES)(self._query_picture)

    @property
    def is_current(self) -> bool:
        """Whether none of the indexes was built again at its place."""
        return all(index.is_current for index in self.indexes.values())

    def keep_uploads(self, before: Library) -> None:
        """Remember the uploads of another library of the same indexes, whose stores have not been measured anew."""
        if list(self.indexes) == list(before.indexes):
            self.uploads = before.uploads

    def about(self) -> Json:
        """What there is to ask, for the page."""
        first = next(iter(self.indexes.values()))
        columns = {name: distinct(first.column(name), MOST_CHOICES) for name in first.column_names}
        return {
            "estimators": list(self.indexes),
            "samples": first.shape[1],
            "sources": [*(["queries"] if self.queries else []), *(["training"] if self._stored else [])],
            "uploads": self.measured is not None,
            "views": self.views,
            "told": None if self.measured is None else asdict(self.measured.task.told),
            "size": None if self.measured is None else [*reversed(self.image_shape[1:])],
            "columns": {
                name: None if values is None else [plain(value) for value in values] for name, values in columns.items()
            },
            "group_columns": group_columns(first),
            "curve": None if self.store is None or not self.store.has("timestep") else curve_of(norm_curve(self.store)),
        }

    def ids(self, source: Source, contains: str, count: int) -> list[str]:
        """The first ids of a source that contain a text."""
        if source == "training":
            return self._training_names.containing(contains, count) if self._stored else []
        names = self._places.get(source, self.uploads)
        return list(islice((name for name in names if contains in name), count))

    def check(self, asked: Asked) -> None:
        """ValueError unless there is such a query."""
        training = asked.source == "training"
        names: Container[str] = self._places.get(asked.source, self.uploads)
        if training:
            names = self._training_names if self._stored else ()
        if asked.upload is None and asked.id not in names:
            raise ValueError(f"there is no {asked.id!r} among the {asked.source}.")

    def check_indexes(self, names: list[str]) -> None:
        """ValueError unless there are such indexes."""
        for name in names:
            if name not in self.indexes:
                raise ValueError(f"there is no index {name!r}; there are {', '.join(self.indexes)}.")

    def ask(self, name: str, asked: list[Asked], questions: list[Question]) -> list[TopK | ValueError]:
        """The answer of one index to each of several queries, or why there is none, in one scan.

        Args:
            name: of the index.
            asked: the queries, of one source.
            questions: of each, see `answers_by_one_scan`; `where` is an expression.
        """
        index = self.indexes[name]
        index.check_store()
        rows = [self._query_rows(name, one) for one in asked]
        masked = [replace(x, where=self.mask(name, x.where)) if isinstance(x.where, str) else x for x in questions]
        return answers_by_one_scan(index, rows, self._query_ids(asked), masked)

    def knows(self, name: str, where: str) -> bool:
        """Whether the samples that count for an expression need not be worked out."""
        return (name, where) in self._masks

    def mask(self, name: str, where: str, wanted: Callable[[], bool] = lambda: True) -> Bools:
        """The samples of an index that count for an expression; any thread may ask. Raises as `which`."""
        return self._masks.get((name, where), lambda: satisfying(where, self.indexes[name], wanted))

    def explain(self, name: str, asked: Asked, sample: str, side: Side) -> Json:
        """A score of one index, taken apart, and of a query in views, in which of them it has that side's best."""
        index, one = self.indexes[name], [self._sample_id(sample)]
        every = [x for own in self._sketches(name, asked) for (x,) in explain_lists(index, own, [one] * own.shape[0])]
        scores = [x.score for x in every]
        best = scores.index(min(scores) if side == "opponents" else max(scores))
        views = self.uploads.views(asked)
        return {**explained(every[best]), "view": views[best] if views else None}

    def compared(self, name: str) -> list[Any]:
        """Some of the stored queries' ids, in the groups in which `repeatability` is to be asked about them."""
        ids = self.queries[name].ids
        some = ids[np.unique(np.linspace(0, len(ids) - 1, min(COMPARED, len(ids))).astype(int))]
        matched = self.indexes[name].estimator.pairing == "matched"  # otherwise each call would build indexes anew
        return np.split(some, range(COMPARED_AT_ONCE, len(some), COMPARED_AT_ONCE)) if matched else [some]

    def repeatability(self, name: str, ids: Any) -> Told:
        """How far an index's lists of some stored queries would come again, or why that is not told."""
        return repeatability_for_page(self.indexes[name], take(self.queries[name], ids), COMPARED_LENGTH, SMALL)

    def told(self, name: str, found: list[Told]) -> Json:
        """What `repeatability` gave for all groups, as the page holds it."""
        return told(joined(found), self.indexes[name].shape[1])

    def shared(self, name: str, asked: Asked, k: int, where: str | None) -> Json | None:
        """How many names of one query's list two halves of the measurements share; None where they cannot tell."""
        index = self.indexes[name]
        if index.estimator.pairing != "matched" or self.uploads.views(asked):
            return None
        index.check_store()
        mask = None if where is None else self.mask(name, where)
        rows, own = self._query_rows(name, asked), asked.source == "training"
        try:
            found = repeatability_of_rows(index, rows, self._query_ids([asked]), k, exclude_self=own, where=mask)
        except MeasuredOnceError:
            return None
        return shared_by_halves(found)[0]

    @property
    def views(self) -> tuple[str, ...]:
        """Of what is measured here: as it is, moved, ...; none where nothing is."""
        if self.measured is None:
            return ()
        from retrac_scale.task.views import VIEWS  # needs torch

        return tuple(VIEWS)

    def upload(self, upload: Upload, pieces: list[Sketches]) -> Asked | None:
        """Sketch an upload's next piece, unless it was seen before.

        Args:
            upload: what is asked about.
            pieces: what was sketched of it by the calls before; is added to.

        Returns:
            None while pieces are missing; then how it is asked about, while it is remembered also by its key.
        """
        if upload.key not in self.uploads:
            assert self.measured is not None
            upload = replace(upload, prompt="" if self.measured.task.told.prompts else None)
            every = upload.pieces
            samples = replace(self.measured, dataset=every[len(pieces)])
            pieces.append(self._by_store(samples.sketch))
            if len(pieces) < len(every):
                return None
            self.uploads.keep(Measured(upload, pieces))
        self.uploads.move_to_end(upload.key)
        return Asked("uploads", upload.key, self.uploads[upload.key])

    def part(self, asked: Asked, region: Any, concept: Concept | None, views: tuple[str, ...]) -> Upload:
        """A part of a query's picture, or all of it for a concept or in views, as an upload.

        Raises:
            ValueError: there is no such part, or the picture is not as the model takes it.
        """
        if asked.source == "uploads":
            whole = self.uploads.of(asked).upload
            if asked.id in self.uploads:  # its parts do not push it out
                self.uploads.move_to_end(asked.id)
        else:
            pictures = self.pictures
            training = asked.source == "training"
            pixels = (
                pictures.image(self._sample_id(asked.id))
                if training
                else pictures.query(self._places["queries"][asked.id])
            )
            channels, *size = self.image_shape
            if list(pixels.shape[:2]) != size or (channels == 1 and pixels.ndim == 3):
                raise ValueError(
                    f"the picture of {asked.id!r} has shape {pixels.shape}, and the model takes {self.image_shape}; "
                    "parts can be asked about of pictures as the model takes them."
                )
            whole = Upload(f"{asked.source} {asked.id}", pixels, "")
        return whole.part(region, concept, views)

    def fragment(self, asked: list[Asked], answers: Mapping[str, list[Json]]) -> Json:
        """Queries and the samples in their lists, as the page holds them.

        Args:
            asked: the queries.
            answers: {index: lists of each query}.
        """
        queries = [
            {
                "id": one.id,
                "source": one.source,
                **self._shown(one),
                "lists": {name: lists[place] for name, lists in answers.items()},
            }
            for place, one in enumerate(asked)
        ]
        results = (x for lists in answers.values() for sides in lists for side in sides.values() for x in side)
        named = (name for x in results for name in (x["id"], *x.get("copies", ())))
        return {"queries": queries, "samples": {name: self.sample(name) for name in named}}

    def _shown(self, asked: Asked) -> Json:
        """Picture and note of a query."""
        if asked.source != "uploads":
            return {"picture": self.query_picture(asked), "note": ""}
        upload = self.uploads.of(asked).upload
        return {"picture": data_uri(upload.pixels), "note": upload.words}

    def _by_store(self, function: Callable[[SketchStore], T]) -> dict[str, T]:
        """{index: what a function makes of its store}, once for indexes of the same one; none where it is gone."""
        made: dict[Any, T] = {}
        found = {}
        for name, index in self.indexes.items():
            store = index.check_store()
            if store is not None:
                place = index.meta["store"] or id(store), str(index.meta["measure"])  # of which there may be several
                if place not in made:
                    made[place] = function(store)
                found[name] = made[place]
        return found

    @property
    def _training_names(self) -> Named:
        return next(iter(self._stored.values()))

    def _query_ids(self, asked: list[Asked]) -> Any:
        """As the index has them, where a sample is to be left out of its own list."""
        training = asked[0].source == "training"
        return np.array([self._samples.id(one.id) if training else one.id for one in asked])

    def _query_rows(self, name: str, asked: Asked) -> Float32:
        """`[c, v, k]`, of a query in v views."""
        if asked.source == "queries":
            place = self._places["queries"][asked.id]
            rows: Float32 = self._asked[name][:, place : place + 1]
            return rows
        if asked.source == "training":
            return self._training_rows(name, asked.id)
        return np.concatenate([self.indexes[name].query_rows(own) for own in self._sketches(name, asked)], axis=1)

    def _read_training_rows(self, name: str, sample: str) -> Float32:
        store, place = self._training(name, sample)
        return self.indexes[name].rows_of(store, slice(place, place + 1))

    def _training(self, name: str, sample: str) -> tuple[SketchStore, int]:
        """An index's store, and where a sample stands in it."""
        store = self.indexes[name].check_store()
        assert store is not None
        return store, self._stored[name].place(sample)

    def _sketches(self, name: str, asked: Asked) -> list[SketchStore]:
        """Of a query all, one after the other."""
        if asked.source == "uploads":
            return self.uploads.of(asked).of(name)
        if asked.source == "training":
            store, place = self._training(name, asked.id)
        else:
            store, place = self.queries[name], self._places["queries"][asked.id]
        return [taken(store, np.array([place]), {})]

    def _sample_id(self, sample: str) -> Any:
        if sample not in self._samples:
            raise ValueError(f"there is no training sample {sample!r}.")
        return self._samples.id(sample)

    def _describe(self, sample: str) -> Json:
        name = self._sample_id(sample)
        picture = self.pictures.image(name)
        if self.store is not None:
            check_shown(self.store, [name], [picture], exact=isinstance(self.pictures.images, PictureFiles))
        return {"picture": data_uri(picture), "columns": self._rows[name]}

    def _query_picture(self, asked: Asked) -> str:
        if asked.source == "training":
            picture: str = self.sample(asked.id)["picture"]
            return picture
        place = self._places["queries"][asked.id]
        shown = self.pictures.query(place)
        for own in self.queries.values():
            check_shown(own, [own.ids[place].item()], [shown], exact=isinstance(self.pictures.queries, PictureFiles))
        return data_uri(shown)
