"""check_model: which parameters can be sketched, and whether rightly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrac_scale.gradients import GradientCapture, ParameterFilter, UncapturableError
from retrac_scale.gradients.nested import tensors
from retrac_scale.gradients.recompute import alone_by, batched_sizes
from retrac_scale.gradients.reference import ALONE_HALF_TOLERANCE, ALONE_TOLERANCE, HALF_TOLERANCE
from retrac_scale.gradients.registry import why_alone
from retrac_scale.sketching.pairs import measured_pairs, without_autocast
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.timesteps import EvenlySpaced

NEGLIGIBLE = 1e-3
"""Gradients below this share of the tolerated error of the whole count as none."""

FALLBACK, REFUSED = "per-sample autograd", "refused"


@dataclass(frozen=True)
class ParameterCheck:
    """One selected parameter.

    Attributes:
        name: in the model.
        layer: class name of the layer that uses it.
        rule: the rule's name, "per-sample autograd" (exact, slow), or "refused".
        size: entries.
        error: relative L2 error of its gradient against autograd of one sample alone, the largest over the samples
            (below 1e-6 of the full gradient's norm it counts as none, 2e-5 in 16 bits); None when refused.
        reached: whether the example gives it a gradient that could have come out wrong.
        reason: why it is refused, else empty.
    """

    name: str
    layer: str
    rule: str
    size: int
    error: float | None
    reached: bool
    reason: str = ""


@dataclass(frozen=True)
class ModelCheck:
    """What `check_model` found; its str is a table.

    Attributes:
        parameters: one entry for each selected parameter.
        frozen: entries of the model's other parameters.
        samples: that were compared.
        tolerance: the relative error up to which a gradient counts as right.
    """

    parameters: tuple[ParameterCheck, ...]
    frozen: int
    samples: int
    tolerance: float

    @property
    def wrong(self) -> tuple[ParameterCheck, ...]:
        """Parameters whose gradients differ from autograd's."""
        return tuple(p for p in self.parameters if p.error is not None and p.error > self.tolerance)

    @property
    def exact(self) -> bool:
        """Whether all selected parameters are captured, and as autograd has them."""
        return not self.wrong and all(p.rule != REFUSED for p in self.parameters)

    def share(self, rule: str) -> float:
        """Share of the selected entries that a rule covers."""
        return sum(p.size for p in self.parameters if p.rule == rule) / sum(p.size for p in self.parameters)

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules in use, by falling share."""
        return tuple(sorted({p.rule for p in self.parameters}, key=lambda rule: (-self.share(rule), rule)))

    def __str__(self) -> str:
        total = sum(p.size for p in self.parameters)
        lines = [f"{'rule':<24}{'layers':<44}{'entries':>14}{'share':>8}{'largest error':>15}"]
        for rule in self.rules:
            of_rule = [p for p in self.parameters if p.rule == rule]
            layers = ", ".join(sorted({p.layer for p in of_rule}))
            errors = [p.error for p in of_rule if p.error is not None]
            worst = f"{max(errors):.0e}" if errors else "-"
            layers = layers if len(layers) < 43 else layers[:39] + "..."
            lines.append(
                f"{rule:<24}{layers:<44}{sum(p.size for p in of_rule):>14,}{self.share(rule):>8.1%}{worst:>15}"
            )
        unreached = sum(p.size for p in self.parameters if not p.reached and p.rule != REFUSED)
        lines.append(
            f"{total:,} entries selected, {self.frozen:,} frozen; compared with autograd: {self.samples} samples"
        )
        if unreached:
            lines.append(
                f"{unreached / total:.1%} of them have no gradient in the example, so nothing is shown for them"
            )
        for reason in dict.fromkeys(p.reason for p in self.parameters if p.reason):
            lines.append(f"refused: {reason}")
        for p in self.wrong:
            lines.append(f"wrong: {p.name} ({p.layer}, {p.rule}) is off by {p.error:.1e}")
        lines.append(
            "sketches are exact" if self.exact else "not all sketches are exact: leave the above out, or register"
        )
        return "\n".join(lines)


def check_model(
    model: nn.Module | DiffusionTask, example: Any, *, samples: int | None = None, parameters: ParameterFilter = None
) -> ModelCheck:
    """Before any long run: what covers each parameter, how much of the model that is, and whether gradients are right.

    The gradients of every sample of the example, captured in one batch, are compared with plain autograd of that sample
    alone, parameter by parameter; where weights are of 16 bits, whose rounding depends on the batch, with plain
    autograd of its loss in the batch. A task's mixed precision is left out. It takes one backward pass per sample more
    than training on the example would, and memory for one more gradient. The model is left as it was.

    Args:
        model: a DiffusionTask, or any torch module.
        example: for a task, a list of dataset items, each measured at two timesteps; for a module, its forward's
            arguments for a batch of different samples: a dict of keyword arguments, a tuple, or one tensor.
        samples: how many samples the module's example holds; None takes the leading size of its first tensor.
        parameters: glob patterns or a predicate on names; None for all trainable ones.

    Raises:
        ValueError: fewer than two samples, where the model takes more than one at a time; a sample alone gives another
            output than in the batch; or nothing can be differentiated.
    """
    if isinstance(model, DiffusionTask):
        network = model.model
        batch, alone, n = _of_task(model, example)
    else:
        network = model
        batch, alone, n = _of_module(model, example, samples)
    half = any(parameter.itemsize < 4 for parameter in network.parameters())
    tolerance, between_runs = (HALF_TOLERANCE, ALONE_HALF_TOLERANCE) if half else (ALONE_TOLERANCE, ALONE_TOLERANCE)
    if n < 2 and not why_alone(network):
        raise ValueError(f"check_model compares samples within a batch and needs two or more, got {n}.")
    with torch.no_grad():
        together = batch()
        for sample in range(n):
            if not torch.allclose(alone(sample), together[sample : sample + 1], rtol=between_runs, atol=1e-6):
                raise ValueError(
                    f"sample {sample} of the example alone gives another output than in the batch, so samples meet "
                    "somewhere in the model (or samples= is wrong); such a model has no per-sample gradients."
                )
    single = (lambda sample: batch()[sample : sample + 1]) if half else alone
    capture, reasons = _capturable(network, parameters, batch)
    errors, reached = dict.fromkeys(capture.shapes, 0.0), dict.fromkeys(capture.shapes, False)
    for sample in range(n):
        for name, error in _errors(capture, batch, single, sample, tolerance):
            errors[name], reached[name] = max(errors[name], error), True
    users = GradientCapture(network, parameters=parameters).users
    checks = [
        ParameterCheck(
            name=name,
            layer=type(layer).__name__,
            rule=REFUSED if name in reasons else FALLBACK if rule is None else rule.form.__name__,
            size=network.get_parameter(name).numel(),
            error=errors.get(name),
            reached=reached.get(name, False),
            reason=reasons.get(name, ""),
        )
        for name, (layer, rule) in users.items()
    ]
    selected = sum(check.size for check in checks)
    return ModelCheck(tuple(checks), sum(p.numel() for p in network.parameters()) - selected, n, tolerance)


def _of_task(task: DiffusionTask, items: Any) -> tuple[Callable[[], Tensor], Callable[[int], Tensor], int]:
    """The values of dataset items at two timesteps each, the value of one pair alone, and how many there are."""
    ids = np.arange(len(items))
    items = [task.check_item(sample, item) for sample, item in zip(ids, items, strict=True)]
    task, checked = without_autocast(task, items)
    plan = EvenlySpaced(2).pairs("check", ids, task.num_train_timesteps)
    pairs = np.arange(plan.timesteps.size)
    return (
        lambda: measured_pairs(task, checked, ids, plan, pairs)[0][0],
        lambda sample: measured_pairs(task, checked, ids, plan, pairs[sample : sample + 1])[0][0],
        len(pairs),
    )


def _of_module(
    module: nn.Module, example: Any, samples: int | None
) -> tuple[Callable[[], Tensor], Callable[[int], Tensor], int]:
    """Losses without symmetries of a batch, that of one sample alone, and how many samples the batch holds."""
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args = () if kwargs else tuple(example) if isinstance(example, (tuple, list)) else (example,)
    n = len(next(tensors((args, kwargs)))) if samples is None else samples
    with torch.no_grad():
        outputs = list(tensors(module(*args, **kwargs)))
    if not outputs:
        raise UncapturableError(
            f"{type(module).__name__} returns no tensor, so there is no loss whose gradient its "
            f"{next(iter(dict(module.named_parameters())))!r} could have; check the model that runs its layers.",
            dict(module.named_parameters()),
        )
    GradientCapture(module).check_samples(n)
    try:
        with torch.no_grad():
            sizes = batched_sizes("", module, {}, args, kwargs, outputs, n)
    except UncapturableError:
        raise ValueError(
            f"a sample of the example alone gives another output than among the {n} of the batch: samples meet in the "
            "model, samples= is wrong, or it is in training mode and random; it has no per-sample gradients so."
        ) from None

    def losses(outputs: list[Tensor], count: int) -> Tensor:
        return torch.stack([x.reshape(count, -1).sin().square().mean(1) for x in outputs]).sum(0)

    return (
        lambda: losses(list(tensors(module(*args, **kwargs))), n),
        lambda sample: losses(alone_by(module, {}, args, kwargs, n, sample, sizes), 1),
        n,
    )


def _capturable(
    network: nn.Module, parameters: ParameterFilter, batch: Callable[[], Tensor]
) -> tuple[GradientCapture, dict[str, str]]:
    """A capture of all that can be captured, and why each other parameter cannot."""
    reasons: dict[str, str] = {}
    names = set(GradientCapture(network, parameters=parameters).shapes)
    while True:
        capture = GradientCapture(network, parameters=names.__contains__)
        try:
            with capture:
                capture.backward(batch(), lambda name, gradient, samples: None)
        except UncapturableError as error:
            reasons |= dict.fromkeys(error.parameters, str(error))
            names -= set(error.parameters)
            if not names:
                raise
        else:
            return capture, reasons


def _errors(
    capture: GradientCapture,
    batch: Callable[[], Tensor],
    single: Callable[[int], Tensor],
    sample: int,
    tolerance: float,
) -> Iterator[tuple[str, float]]:
    """Relative errors of one sample's gradients, of the parameters that have any."""
    with torch.enable_grad():
        expected = capture.plain(lambda: single(sample))
    missing = dict(expected)
    differences: dict[str, float] = {}

    def compare(name: str, gradient: Tensor, part: slice) -> None:
        if part.start <= sample < part.stop:
            own = gradient[sample - part.start].reshape(expected[name].shape)
            differences[name] = float((own - expected[name]).norm())
            del missing[name]

    with capture:
        capture.backward(batch(), compare)
    differences |= {name: float(gradient.norm()) for name, gradient in missing.items()}
    floor = NEGLIGIBLE * tolerance * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    for name, difference in differences.items():
        norm = float(expected[name].norm())
        if max(norm, difference) > floor:
            yield name, difference / max(norm, floor)
