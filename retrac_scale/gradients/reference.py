"""Plain autograd's gradient of one batch, for captured gradients to be compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.gradients.errors import GradientMismatchError, used_elsewhere
from retrac_scale.gradients.mixing import mix
from retrac_scale.gradients.norms import squared_norm
from retrac_scale.gradients.outer import OuterProducts

FLOAT32_TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Relative, in L2 norm, of a parameter's gradient, by whether anything on its way came in 16 bits."""

NEGLIGIBLE = 1e-2
"""A parameter whose gradient is smaller than this share of the whole is held to the tolerance of that share."""

PIECE_BYTES = 64 << 20
"""Products are formed for as many samples at a time as keep to this."""


def told_apart(n: int) -> Tensor:
    """Factors `[n]` by which the gradients of samples are told apart in their sum.

    Signs and powers of two: every float takes them without rounding, so that what goes back through the network is,
    sample by sample, what went back without them.
    """
    generator = torch.Generator().manual_seed(n)
    signs = 1 - 2 * (torch.arange(n) % 2)
    return signs * 2.0 ** torch.randint(0, 3, (n,), generator=generator)


class Reference:
    """The gradient of a batch's losses, each times its own factor, and the sum of captured ones with the same factors.

    The two are equal if every sample's is right, whatever the factors. They are not if samples meet, if rows are
    counted to another sample, or if a parameter is used where no layer is seen to use it.

    Args:
        factors: `[n]`, see `told_apart`.
        expected: parameter name -> plain autograd's gradient.
    """

    def __init__(self, factors: Tensor, expected: Mapping[str, Tensor | None], shapes: Mapping[str, Any]) -> None:
        self.factors = factors
        self.expected = {
            name: torch.zeros(shapes[name], device=factors.device) if one is None else one.to_dense().detach()
            for name, one in expected.items()
        }
        self.squares = torch.zeros(len(factors), dtype=torch.float64, device=factors.device)
        """Squared norms `[n]` of what was captured."""
        self._found: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}

    @property
    def finite(self) -> bool:
        """Whether there is something to compare with."""
        return all(bool(one.isfinite().all()) for one in self.expected.values())

    def beside(self, sink: Any) -> Any:
        """A sink that adds up what it hands on."""

        def add(name: str, gradient: Any, samples: slice) -> None:
            for own, formed, some in _pieces(name, gradient, samples):
                self._add(own, formed, some)
            sink(name, gradient, samples)

        return add

    def _add(self, name: str, gradient: Tensor, samples: slice) -> None:
        rows = gradient.flatten(1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        factors, squares = self.factors[samples], squared_norm(rows)
        self.squares[samples] += squares
        summed = (factors.to(rows.dtype) @ rows).view(gradient.shape[1:])
        self._found[name] = self._found[name] + summed if name in self._found else summed
        sizes = (factors.double().square() @ squares).cpu()
        self._sizes[name] = self._sizes.get(name, torch.zeros((), dtype=torch.float64)) + sizes

    def compare(self, mixers: Mapping[str, Tensor], whole: Set[str], half: Set[str], where: str) -> None:
        """Compare the sums.

        Args:
            mixers: of weights whose gradients were captured mixed.
            whole: those that were not, all the same.
            half: parameters whose gradients came in 16 bits.
            where: names the batch.

        Raises:
            UncapturableError: a parameter has a gradient, and no layer that was seen to use it.
            GradientMismatchError: captured gradients are others; names their parameters.
        """
        off: dict[str, tuple[float, float]] = {}
        for name, plain in self.expected.items():
            if name not in self._found and plain.any():
                raise used_elsewhere(name)
            expected = mix(mixers[name], plain[None])[0] if name in mixers.keys() - whole else plain
            found = self._found.get(name, torch.zeros_like(expected))
            size = max(float(expected.double().norm()), float(self._sizes.get(name, torch.zeros(())).sqrt()))
            off[name] = float((found.double() - expected.double()).norm()), size
        floor = NEGLIGIBLE * sum(size**2 for _, size in off.values()) ** 0.5
        tolerances = {name: HALF_TOLERANCE if name in half else FLOAT32_TOLERANCE for name in off}
        wrong = [name for name, (by, size) in off.items() if not by <= tolerances[name] * max(size, floor)]
        if wrong:
            worst = max(wrong, key=lambda name: off[name][0] / max(off[name][1], floor))
            raise GradientMismatchError(
                f"{where}: gradients in a batch of {len(self.factors)} are not those of plain autograd; they differ in "
                f"{', '.join(wrong)} (by up to {off[worst][0] / max(off[worst][1], floor):.1%}). Either samples meet on "
                "the way from there to the losses, or a layer lays them out along another axis than the first, or a "
                "parameter is used outside its own layer's forward: leave these out with parameters=, register a rule, "
                "or call rs.gradients.recompute_whole for the module that does it."
            )


def _pieces(name: str, gradient: Any, samples: slice) -> Iterator[tuple[str, Tensor, slice]]:
    """Parameters, formed gradients `[m, ...]` and which samples they are of."""
    if not isinstance(gradient, OuterProducts):
        yield name, gradient, samples
        return
    n = len(gradient.left)
    size = max(1, PIECE_BYTES // (4 * prod(gradient.shape[1:])))
    for start in range(0, n, size):
        some = slice(start, min(start + size, n))
        piece = replace(gradient, left=gradient.left[some], right=gradient.right[some])
        of_all = slice(samples.start + some.start, samples.start + some.stop)
        yield name, piece.formed(), of_all
        if gradient.with_bias:
            yield name.removesuffix("weight") + "bias", piece.bias(), of_all


def weighted(losses: Tensor, parameters: Mapping[str, nn.Parameter]) -> Reference:
    """The reference for a batch whose graph reaches the parameters; keeps the graph."""
    factors = told_apart(len(losses)).to(losses.device)
    summed = (losses * factors.to(losses.dtype)).sum()
    found = torch.autograd.grad(summed, list(parameters.values()), retain_graph=True, allow_unused=True)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return Reference(factors, dict(zip(parameters, found, strict=True)), shapes)
