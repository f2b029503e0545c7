"""What is asked, checked, and who answers it: what is sketched already, or samples that are measured first."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from retrac_scale.index.reader import IndexReader
from retrac_scale.query.question import NO_SAMPLES, Question
from retrac_scale.query.together import answer_sketched
from retrac_scale.query.topk import TopK
from retrac_scale.store import SketchStore

if TYPE_CHECKING:
    from distributed import Client

    from retrac_scale.sketching.samples import Samples


def answer(index: IndexReader, queries: SketchStore | Samples, question: Question, client: Client | None) -> TopK:
    """See `Index.query`."""
    if client is not None and not isinstance(index.url, str | os.PathLike):
        raise ValueError("workers cannot reach an index in this process's memory; build it at a path or URL.")
    store = index.check_store()
    if question.rerank is not None:
        _check_exact(index)
    if index.estimator.squared and question.side != "proponents":
        raise ValueError("a squared score is never negative, so it has no opponents; ask for side='proponents'.")
    if not isinstance(queries, SketchStore):
        from retrac_scale.query.measured import answer_samples  # needs torch, which stored sketches have no use for

        return answer_samples(index, store, queries, question, client)
    if question.rerank is not None:
        raise ValueError(NO_SAMPLES)
    return answer_sketched(index, queries, question, client)


def _check_exact(index: IndexReader) -> None:
    """Raise ValueError unless scores can be computed from full gradients."""
    if index.estimator.damping is not None:
        raise ValueError(
            f"{index.meta['estimator']['kind']} has no exact scores: its ridge over full gradients cannot be solved; "
            "rerank an index of TracIn, ReTrac, GradDot or GradCos, such as ReTrac(pairing='matched')."
        )
    if "precondition" in index.meta:
        raise ValueError("rerank computes plain gradients, but the store's were preconditioned; leave out rerank=.")
