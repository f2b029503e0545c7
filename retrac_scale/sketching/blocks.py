"""Filling the blocks that a store lacks, one at a time, here or on Dask workers."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from retrac_scale.arrays import Bools, Float32, Ids, Int64
from retrac_scale.projections import GradientMismatchError, GradientSketcher
from retrac_scale.runtime.runs import run
from retrac_scale.runtime.tasks import Task
from retrac_scale.sketching.calibration import torch_threads
from retrac_scale.sketching.content import ITEM, ChangedItemsError
from retrac_scale.sketching.job import Job, shapes, sketch_pairs
from retrac_scale.sketching.pairs import Items, measured_pairs, without_autocast
from retrac_scale.store import SketchStore, open_store, write_block
from retrac_scale.store.encoding import decode
from retrac_scale.store.reader import Words
from retrac_scale.store.schema import CONTENT, whereabouts
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.timesteps import Pairs

if TYPE_CHECKING:
    from distributed import Client

FATAL = (GradientMismatchError, ChangedItemsError)
CHECKED_PAIRS = 2

_model_in_use = threading.Lock()
_sound: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
"""What was checked of a model in this process: questions, whose stores are in memory, are checked once."""


def fill(
    parts: Sequence[SketchStore],
    job: Job,
    sketcher: GradientSketcher,
    client: Client | None,
    resources: Mapping[str, float] | None,
    progress: bool | str,
) -> None:
    """Compute what parts lack, those over the same samples together."""
    together: dict[str, list[SketchStore]] = {}
    for store in parts:
        together.setdefault(store.only_part.same_samples, []).append(store)
    rows = {sample: row for row, sample in enumerate(job.ids.tolist())}
    name = progress if isinstance(progress, str) else "sketch"
    loaded = list(job.checkpoints)[-1]  # by `describe`
    with tqdm(total=0, unit="pair", desc=name, disable=not progress) as bar:
        for stores in together.values():
            ids, todo = stores[0].ids, _missing(stores)
            chosen = [rows[sample] for sample in ids.tolist()]
            own = replace(job, dataset=Subset(job.dataset, chosen), ids=ids, content=job.content[chosen])
            bar.total += sum(len(store.checkpoints) * store.shape[0] * store.shape[1] for store in stores)
            bar.update(bar.total - bar.n - sum(_pairs_in(stores[0], i) * len(x) for (_, i), x in todo.items()))
            blocks = (_block_task(stores[0], *place, lacking) for place, lacking in todo.items())
            if client is None:
                share = _Share(own, stores, sketcher, bar.update, loaded)
                for _ in run(_Share.sketch, blocks, shared=share, threads=1, fatal=FATAL):
                    pass
                loaded = share.loaded or loaded
            else:
                there = run(
                    _sketch_there,
                    blocks,
                    client,
                    shared=_There(own, whereabouts(str(stores[0].url)), [store.only_part.name for store in stores]),
                    resources=resources,
                    fatal=FATAL,
                )
                for _, pairs in there:
                    bar.update(pairs)


def _missing(stores: Sequence[SketchStore]) -> dict[tuple[str, int], list[str]]:
    """Checkpoint and block -> the parts over the same samples that lack it, one for each measure."""
    lacking: dict[tuple[str, int], list[str]] = {}
    for store in stores:
        for name in store.checkpoints:
            for block in np.flatnonzero(~store.committed(name)).tolist():
                lacking.setdefault((name, block), []).append(store.only_part.name)
    return lacking


def _block_task(store: SketchStore, checkpoint: str, block: int, parts: Sequence[str]) -> Task:
    samples = store.blocks[block]
    return Task(f"sketch-{checkpoint}-samples-{samples.start}-{samples.stop}", (checkpoint, block, parts))


class _Share:
    """One process's share of a job: the model at one checkpoint, and a sketcher whose first pair is checked.

    `loaded` is the checkpoint whose weights the model has, if it has any's.
    """

    def __init__(
        self,
        job: Job,
        stores: Sequence[SketchStore],
        sketcher: GradientSketcher,
        advance: Callable[[int], Any],
        loaded: str | None = None,
    ) -> None:
        self._job, self._sketcher, self._advance = job, sketcher, advance
        self._stores = {store.only_part.name: store for store in stores}
        self.loaded = loaded
        self._ready: str | None = None
        self._checked: set[str] = set()

    def pairs_if_committed(self, checkpoint: str, block: int, parts: Sequence[str]) -> int | None:
        """The pairs of a block that is committed to all of the parts, else None."""
        stores = [self._stores[name] for name in parts]
        if any(store.only_part.record(checkpoint, block) is None for store in stores):
            return None
        return sum(_pairs_in(store, block) for store in stores)

    def sketch(self, checkpoint: str, block: int, parts: Sequence[str]) -> int:
        """Compute one block as the store's plan says and commit it to parts, one for each measure; returns its pairs.

        Of the first block, the first pair is recomputed by plain autograd before anything is written.
        """
        job, stores = self._job, [self._stores[name] for name in parts]
        store = stores[0]
        self._load(checkpoint, store)
        samples = store.blocks[block]
        ids = job.ids[samples]
        plan = job.timesteps.pairs(checkpoint, ids, job.task.num_train_timesteps)
        rows = _Rows.empty(stores, plan, job.content[samples].copy())
        same = rows.take_over(stores, checkpoint, block)
        todo = np.flatnonzero(~np.repeat(same, plan.timesteps.shape[1]))
        self._advance((plan.timesteps.size - len(todo)) * len(stores))
        self._measure(checkpoint, stores, ids, plan, rows, samples.start, todo)
        for place, store in enumerate(stores):
            write_block(
                store,
                checkpoint,
                block,
                rows.sketches[place].reshape(*plan.timesteps.shape, -1),
                rows.norms[place].reshape(plan.timesteps.shape),
                losses=rows.losses[place].reshape(plan.timesteps.shape),
                timesteps=plan.timesteps,
                contents=rows.contents,
            )
            store.only_part.forget_aside(checkpoint, block)
        return plan.timesteps.size * len(stores)

    def _load(self, checkpoint: str, store: SketchStore) -> None:
        """The checkpoint's weights into the model, and its preconditioner into the sketcher."""
        if checkpoint == self._ready:
            return
        if checkpoint != self.loaded:
            digest = self._job.task.load(checkpoint, self._job.checkpoints[checkpoint])
            if digest != store.fingerprint["checkpoints"][checkpoint]:
                raise ValueError(
                    f"checkpoint {checkpoint!r} has other weights on {platform.node()} than where sketch(...) was "
                    "called; give a state dict, or the same file on all machines."
                )
        self._sketcher.precondition(self._job.precondition.get(checkpoint))
        self.loaded = self._ready = checkpoint

    def _measure(
        self,
        checkpoint: str,
        stores: Sequence[SketchStore],
        ids: Ids,
        plan: Pairs,
        rows: _Rows,
        first: int,
        todo: Int64,
    ) -> None:
        """Fill in pairs of a block that begins with the data set's `first` sample, a batch at a time."""
        job, t = self._job, plan.timesteps.shape[1]
        task = job.task.only(*(store.fingerprint["measure"] for store in stores))
        items: dict[int, Any] = {}
        size = max(1, stores[0].plan["batch_rows"] // plan.draws)
        for start in range(0, len(todo), size):
            pairs = todo[start : start + size]
            # of a block only one batch is held, beside the sample that all others must be like
            wanted = {0, *(pairs // t).tolist()}
            items = {row: item for row, item in items.items() if row in wanted}
            for row in wanted - items.keys():
                items[row], rows.contents[row] = job.item(first + row)
            with torch_threads(stores[0].plan["threads"]):
                found = sketch_pairs(self._sketcher, task, items, ids, plan, pairs)
                for store, measure, (sketched, norm, _) in zip(stores, task.measures, found, strict=True):
                    if measure in self._checked:
                        continue
                    sound, kind = _sound.setdefault(task.model, set()), self._kind(store, task.model, items)
                    if store.url is not None or kind not in sound:
                        self._check(checkpoint, task.only(measure), (sketched, norm), items, ids, plan, pairs)
                        sound |= {kind} if len(pairs) >= CHECKED_PAIRS else set()
                    self._checked.add(measure)
            for place, (sketched, norm, loss) in enumerate(found):
                rows.sketches[place, pairs], rows.norms[place, pairs] = sketched.cpu(), norm.cpu()
                rows.losses[place, pairs] = loss.cpu()
            self._advance(len(pairs) * len(stores))

    def _kind(self, store: SketchStore, model: nn.Module, items: Items) -> str:
        """All that decides whether the gradients of such pairs can be told apart and are formed rightly."""
        described = {name: of for name, of in store.fingerprint.items() if name not in ("checkpoints", "timesteps")}
        return repr((described, shapes(items[0]), self._sketcher.rules, [one.training for one in model.modules()]))

    def _check(
        self,
        checkpoint: str,
        task: DiffusionTask,
        found: tuple[torch.Tensor, torch.Tensor],
        items: Items,
        ids: Ids,
        plan: Pairs,
        pairs: Int64,
    ) -> None:
        """The first pair against plain autograd.

        In full precision, unless torch cannot differentiate the model there: kernels differ in what they allow.
        """
        row, step = divmod(int(pairs[0]), plan.timesteps.shape[1])
        where = f"checkpoint {checkpoint!r}, sample {ids[row]}, timestep {plan.timesteps[row, step]}"
        few = partial(_values, *without_autocast(task, items), ids, plan, pairs[:CHECKED_PAIRS])
        alone = partial(_values, task, items, ids, plan, pairs[:1])
        try:
            with task.in_full_precision():
                self._sketcher.check(found, few, alone, where)
        except GradientMismatchError:
            raise
        except RuntimeError:
            self._sketcher.check(found, few, alone, where)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Of a block: `sketches [measure, pair, k]`, `norms` and `losses [measure, pair]`, `contents [n, words]`."""

    sketches: Float32
    norms: Float32
    losses: Float32
    contents: Words

    @staticmethod
    def empty(stores: Sequence[SketchStore], plan: Pairs, contents: Words) -> _Rows:
        """To be filled in."""
        shape = (len(stores), plan.timesteps.size)
        sketches = np.empty((*shape, stores[0].shape[2]), dtype=np.float32)
        norms, losses = np.empty((2, *shape), dtype=np.float32)
        return _Rows(sketches, norms, losses, contents)

    def take_over(self, stores: Sequence[SketchStore], checkpoint: str, block: int) -> Bools:
        """Which samples of a block that was set aside are the same, bool `[n]`; fills in what was sketched of them."""
        asides = [store.only_part.aside(checkpoint, block) for store in stores]
        same = np.ones(len(self.contents), bool)
        for place, aside in enumerate(asides):
            if aside is None or CONTENT not in aside:
                return np.zeros(len(self.contents), bool)
            same &= aside[CONTENT][:, ITEM] == self.contents[:, ITEM]
            self.sketches[place] = decode(aside["sketch"], aside["scale"]).reshape(self.sketches[place].shape)
            self.norms[place], self.losses[place] = aside["norm"].reshape(-1), aside["loss"].reshape(-1)
        return same


@dataclass(frozen=True, eq=False)
class _There:
    """A job as a worker process gets it once, and loses it with the run's end."""

    job: Job
    url: str
    parts: Sequence[str]

    @cached_property
    def share(self) -> _Share:
        """One for all blocks of a process: the random signs are as large as the model."""
        stores = [open_store(self.url, mode="r+", part=part) for part in self.parts]
        return _Share(self.job, stores, self.job.sketcher(), advance=lambda pairs: None)


def _sketch_there(there: _There, checkpoint: str, block: int, lacking: Sequence[str]) -> int:
    with _model_in_use:
        share = there.share
        # a task runs again when the worker that holds its result dies: what it committed stands
        return share.pairs_if_committed(checkpoint, block, lacking) or share.sketch(checkpoint, block, lacking)


def fastest_there(job: Job, checkpoint: str, sharing: int) -> tuple[int, int]:
    """See `Job.fastest`, in a worker."""
    with _model_in_use, torch_threads(1):
        return job.fastest(job.sketcher(), checkpoint, sharing=sharing)


def _values(task: DiffusionTask, items: Items, ids: Ids, plan: Pairs, pairs: Any) -> torch.Tensor:
    return measured_pairs(task, items, ids, plan, pairs)[0][0]


def _pairs_in(store: SketchStore, block: int) -> int:
    samples = store.blocks[block]
    return len(range(samples.start, samples.stop)) * store.shape[1]
