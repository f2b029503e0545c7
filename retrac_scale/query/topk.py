"""TopK: the answer to a query."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Float64

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

Side = Literal["proponents", "opponents", "both"]
Reduce = Literal["sum", "mean", "max"]
Duplicates = Literal["keep", "fold"]


@dataclass(frozen=True, eq=False)
class TopK:
    """The best training samples (or groups of them) of each query, best first.

    Scores are sums over checkpoints of w_c times an inner product, in the estimator's units: squared loss gradient for
    TracIn, cosines for ReTrac; under a ridge they have no unit of their own. A positive score means that training on
    the sample lowered the query's loss (proponent), a negative one that it raised it (opponent).

    Attributes:
        ids: `[q, k]` sample ids, or labels of groups. Under side "both" the first half are proponents.
        scores: float64 `[q, k]`.
        query_ids: `[q]`.
        side: "proponents", "opponents" or "both".
        estimator: JSON description of the estimator.
        errors: standard error of each score, float64 `[q, k]`, from how far its timesteps agree: that of the luck of
            noise and timesteps and, but for what sketches of several timesteps have in common, of the projection. None
            under cross pairing, whose rows are means that do not tell, where there is one timestep, after `rerank`, and
            of the best of several views; `repeatability` says more. Of a group's sum or mean it is that of drawing its
            members anew, as a bootstrap over them would find it; None of the largest.
        resolved: whether a result stands more than two standard errors of the difference before the next one, bool
            `[q, k]`; half of that error's square is the mean over the list, as few timesteps tell it badly of one
            pair. None where there are no errors.
        sketch_rank: after `rerank`, the rank (from 1) that the sketch gave to the result, `[q, k]`; where it is not
            the result's rank, the place has changed.
        shares: of groups, `[q, k]`: what of a group's scores is above zero (of opponents, below) as a part of all that
            is; over all groups they sum to one. None for samples.
        share_errors: their standard errors, `[q, k]`, as of a bootstrap over all samples.
        copies: where copies were folded, ids of those folded into each result, tuples `[q, k]`, best first; else None.
    """

    ids: npt.NDArray[Any]
    scores: Float64
    query_ids: npt.NDArray[Any]
    side: Side
    estimator: dict[str, Any] = field(default_factory=dict)
    errors: Float64 | None = None
    resolved: Bools | None = None
    sketch_rank: npt.NDArray[np.int64] | None = None
    shares: Float64 | None = None
    share_errors: Float64 | None = None
    copies: npt.NDArray[Any] | None = None

    @property
    def sides(self) -> dict[str, slice]:
        """{side: its places in a row of `ids`}."""
        width = self.ids.shape[1]
        if self.side != "both":
            return {self.side: slice(width)}
        return {"proponents": slice(width // 2), "opponents": slice(width // 2, width)}

    @property
    def listed(self) -> Bools:
        """Which places hold what they say, `[q, k]`: a positive score is no opponent's, a negative one no proponent's.

        Tables and pages leave the others out, so that a list ends at zero where too few samples stand on its side.
        """
        listed = np.zeros(self.scores.shape, bool)
        for side, places in self.sides.items():
            own = self.scores[:, places]
            listed[:, places] = own > 0 if side == "proponents" else own < 0
        return listed

    def to_frame(self) -> pd.DataFrame:
        """A pandas table of what is `listed`: id, score, rank (from 1), query, side, and what else is known.

        That is error, resolved, sketch_rank, share, share_error, and copies with their number. Id and score come first,
        so that a narrow terminal leaves out others.
        """
        import pandas as pd

        q, width = self.ids.shape
        k = width // len(self.sides)
        columns: dict[str, Any] = {
            "id": self.ids.ravel(),
            "score": self.scores.ravel(),
            "rank": np.tile(np.arange(1, k + 1), q * len(self.sides)),
            "query": np.repeat(self.query_ids, width),
            "side": np.tile(np.repeat(list(self.sides), k), q),
        }
        known = {"error": self.errors, "resolved": self.resolved, "sketch_rank": self.sketch_rank}
        known |= {"share": self.shares, "share_error": self.share_errors}
        columns |= {name: x.ravel() for name, x in known.items() if x is not None}
        if self.copies is not None:
            columns |= {"copies": [len(ids) for ids in self.copies.flat], "copy_ids": list(map(list, self.copies.flat))}
        return pd.DataFrame(columns)[self.listed.ravel()].reset_index(drop=True)

    def __str__(self) -> str:
        from retrac_scale.query.table import table

        return table(self)

    def to_arrow(self) -> pyarrow.Table:
        """The table of `to_frame` for Arrow and Parquet, with the estimator in its metadata."""
        import pyarrow

        table = pyarrow.Table.from_pandas(self.to_frame(), preserve_index=False)
        return table.replace_schema_metadata({**table.schema.metadata, "estimator": json.dumps(self.estimator)})

    def to_json(self) -> str:
        """JSON: the estimator, the side, and for each query the `listed` ids and scores, and what else is known."""
        known = {"errors": self.errors, "resolved": self.resolved, "sketch_ranks": self.sketch_rank}
        known |= {"shares": self.shares, "share_errors": self.share_errors, "copies": self.copies}
        fields = {"ids": self.ids, "scores": self.scores} | {name: x for name, x in known.items() if x is not None}
        results = [
            {"query": query, **{name: values[place][listed].tolist() for name, values in fields.items()}}
            for place, (query, listed) in enumerate(zip(self.query_ids.tolist(), self.listed, strict=True))
        ]
        return json.dumps({"estimator": self.estimator, "side": self.side, "results": results})

    def report(
        self, path: str | os.PathLike[str], images: npt.ArrayLike, query_images: npt.ArrayLike, *, ids: npt.ArrayLike
    ) -> Path:
        """Write a self-contained HTML page with each query beside its results.

        Args:
            path: the file to write.
            images: training images `[n, h, w]` or `[n, h, w, 3]`, integers 0 .. 255 or floats 0 .. 1.
            query_images: likewise `[q, ...]`.
            ids: sample ids of `images`, `[n]`.
        """
        from retrac_scale.report import Pictures, write_report  # at call time: the street runs from query to report

        pictures = Pictures(np.asarray(images), np.asarray(ids), np.asarray(query_images))
        return write_report(path, {str(self.estimator.get("kind", "score")): self}, pictures)
