"""What becomes of a generated image when the samples that a method names are left out of training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrac_scale.evaluate.intervals import Interval, bootstrap
from retrac_scale.evaluate.retraining import retrain
from retrac_scale.evaluate.settings.base import Setting
from retrac_scale.evaluate.settings.generating import generate_anew
from retrac_scale.evaluate.settings.losses import Losses

if TYPE_CHECKING:
    from retrac_scale.arrays import Float64


@dataclass(frozen=True, eq=False)
class Removal:
    """Changes without the samples with the largest scores for a query; differences to the model that saw all samples.

    Attributes:
        loss: rise of the query's own loss, `[q]`.
        loss_of_others: mean rise of all other generated images' losses under the same model, `[q]`.
        loss_at_random: mean rise of the query's loss without as many random samples, `[q]`.
        image: root mean square difference of the image that is generated from the same noise, pixels in -1 .. 1, `[q]`.
        image_of_others: the same, mean over all other generated images, `[q]`.
        image_at_random: the same without as many random samples, `[q]`.
    """

    loss: Float64
    loss_of_others: Float64
    loss_at_random: Float64
    image: Float64
    image_of_others: Float64
    image_at_random: Float64

    def beyond(self, what: str, other: str, draws: int = 1000) -> Interval:
        """How much more the query itself changed than the others, or than at random, interval over queries.

        Args:
            what: "loss" or "image".
            other: "others" or "random".
            draws: of the bootstrap.
        """
        against = {"others": f"{what}_of_others", "random": f"{what}_at_random"}[other]
        return bootstrap(np.mean, getattr(self, what) - getattr(self, against), draws=draws)


def removal(
    setting: Setting, scores: npt.ArrayLike, *, queries: int = 8, share: float = 0.1, random: int = 8, seed: int = 0
) -> Removal:
    """Train again without each query's samples of largest score, and without random ones; resumable.

    All models have the seed of the setting's own, so that they differ by their samples alone, and are asked about all
    generated images: more queries can be added later. Models without random samples serve every method; a method adds
    one training per query.

    Args:
        setting: with generated queries.
        scores: of the generated queries, `[64, n]`, larger for proponents.
        queries: how many of them, the first, are asked about.
        share: of the training set, how much is removed.
        random: how many models are trained without random samples.
        seed: of these.

    Raises:
        ValueError: the scores have another shape, or a share leaves nothing out or nothing over.
    """
    values, n = np.asarray(scores, dtype=np.float64), len(setting.ids)
    generated = setting.queries["generated"]
    if values.shape != (len(generated), n):
        raise ValueError(f"scores are {values.shape}, expected {(len(generated), n)}: of the generated queries.")
    count = round(share * n)
    if not 0 < count < n:
        raise ValueError(f"share={share} removes {count} of {n} samples.")
    rng = np.random.default_rng(seed)
    first = [np.argsort(-row, kind="stable")[:count] for row in values[:queries]]
    chance = [rng.permutation(n)[:count] for _ in range(random)]
    kept = [setting.ids, *(np.setdiff1d(setting.ids, left_out) for left_out in [*first, *chance])]
    measure = _Changes(setting, generated)
    trainer = replace(setting.trainer, progress=False)
    found = retrain(kept, trainer, measure, setting.work / "removal", seed=setting.seed, key=measure.key)
    every, q = found.reshape(len(kept), 2, len(generated)), len(first)
    loss, image = every[1:, 0] - every[0, 0], every[1:, 1]  # [q + random, generated]
    return Removal(*_parts(loss[:q], loss[q:]), *_parts(image[:q], image[q:]))


@dataclass(frozen=True, eq=False)
class _Changes:
    """`changes(weights)`: losses of generated images, then how far those from the same noise are from them, `[2 q]`."""

    setting: Setting
    asked: Any

    @property
    def _losses(self) -> Losses:
        return Losses(self.asked, self.setting.build(), self.setting.scheduler)

    @property
    def key(self) -> str:
        return f"removal of {self._losses.key}"

    def __call__(self, weights: dict[str, Any]) -> Any:
        images = generate_anew(self.setting.training, self.setting.build(), weights, self.asked)
        far = (images - self.asked.images).flatten(1).double().pow(2).mean(1).sqrt().numpy()
        return np.concatenate([self._losses(weights), far])


def _parts(change: Any, at_random: Any) -> tuple[Any, Any, Any]:
    """Of changes `[q, generated]`: the query's own, the mean of the others, the query's own at random, `[q]` each."""
    own = np.diagonal(change)
    return own, (change.sum(1) - own) / (change.shape[1] - 1), at_random.mean(0)[: len(own)]
