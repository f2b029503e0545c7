"""Plain autograd's gradient of one batch, for captured gradients to be compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.gradients.errors import GradientMismatchError, used_elsewhere
from retrac_scale.gradients.factored import FactoredGradients
from retrac_scale.gradients.mixing import mix
from retrac_scale.gradients.norms import rows_of, squared_norm

TOLERANCE, TENSOR_FLOAT_TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-3, 2e-2
"""Relative, in L2 norm, of a parameter's gradient against plain autograd's in the same batch: on a CPU in 32 bits or
more, on accelerators, which may round factors to 10 bits, and where anything on its way came in 16 bits."""

ALONE_TOLERANCE, ALONE_HALF_TOLERANCE = 1e-3, 1e-1
"""Of a sample in a batch against the same sample in a forward pass of its own, which is rounded otherwise."""

NEGLIGIBLE = 1e-5, 1e-4
"""Differences below this share of the full gradient's norm count as none; the second one for 16 bits."""

PIECE_BYTES = 64 << 20
"""Products are formed for as many samples at a time as keep to this."""


def told_apart(n: int) -> Tensor:
    """Factors `[n]` by which the gradients of samples are told apart in their sum.

    Signs and powers of two: every float takes them without rounding, so that what goes back through the network is,
    sample by sample, what went back without them. They differ, and do not add up to nothing, so that errors which
    cancel between samples show as well as those which all samples have in common.
    """
    generator = torch.Generator().manual_seed(n)
    while True:
        signs = 1 - 2 * torch.randint(0, 2, (n,), generator=generator)
        factors = signs * 2.0 ** torch.randint(0, 3, (n,), generator=generator)
        if n == 1 or (factors[0] != factors[1] and 2 * factors.sum().abs() >= factors.norm()):
            return factors


class Reference:
    """The gradient of a batch's losses, each times its own factor, and the sum of captured ones with the same factors.

    The two are equal if every sample's is right, whatever the factors. They are not if samples meet, if rows are
    counted to another sample, or if a parameter is used where no layer is seen to use it.

    Args:
        n: samples of the batch.
        parameters: that are captured, by name.
    """

    def __init__(self, n: int, parameters: Mapping[str, nn.Parameter]) -> None:
        device = next(iter(parameters.values())).device
        self._parameters = parameters
        self.factors = told_apart(n).to(device)
        """`[n]`."""
        self.expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        """Parameter name -> plain autograd's gradient."""
        self.squares = torch.zeros(n, dtype=torch.float64, device=device)
        """Squared norms `[n]` of what was captured."""
        self._found: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}

    def expect(self, output: Tensor, grad: Tensor | None = None) -> None:
        """Add what autograd makes of an output's gradient; keeps the graph."""
        given = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        found = torch.autograd.grad(output, given, grad, retain_graph=True, allow_unused=True)
        gradients = {id(parameter): one for parameter, one in zip(given, found, strict=True) if one is not None}
        for name, parameter in self._parameters.items():
            if id(parameter) in gradients:
                self.expected[name] += gradients[id(parameter)].to_dense()

    def spread(self, grad: Tensor) -> Tensor:
        """The gradient of an output that holds the samples' rows one after another, each times its sample's factor."""
        each = self.factors.repeat_interleave(len(grad) // len(self.factors)).to(grad.dtype)
        return grad * each.view(-1, *[1] * (grad.ndim - 1))

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
        rows = rows_of(gradient)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        factors, squares = self.factors[samples], squared_norm(rows)
        self.squares[samples] += squares
        summed = (factors.to(rows.dtype) @ rows).view(gradient.shape[1:])
        self._found[name] = self._found[name] + summed if name in self._found else summed
        sizes = (factors.double().square() @ squares).cpu()
        self._sizes[name] = self._sizes.get(name, torch.zeros((), dtype=torch.float64)) + sizes

    def compare(self, mixers: Mapping[str, Tensor], half: Set[str], where: str) -> None:
        """Compare the sums.

        Args:
            mixers: of the weights whose gradients were captured mixed.
            half: parameters whose gradients came in 16 bits.
            where: names the batch.

        Raises:
            UncapturableError: a parameter has a gradient, and no layer that was seen to use it.
            GradientMismatchError: captured gradients are others; names their parameters.
        """
        off: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for name, plain in self.expected.items():
            if name not in self._found and plain.any():
                raise used_elsewhere(name)
            expected = mix(mixers[name], plain[None])[0] if name in mixers else plain
            found = self._found.get(name, torch.zeros_like(expected))
            sizes[name] = max(float(expected.double().norm()), float(self._sizes.get(name, torch.zeros(())).sqrt()))
            off[name] = float((found.double() - expected.double()).norm())
        whole_norm = sum(size**2 for size in sizes.values()) ** 0.5
        full = TOLERANCE if self.factors.device.type == "cpu" else TENSOR_FLOAT_TOLERANCE
        wrong = []
        for name, size in sizes.items():
            tolerance, least = (HALF_TOLERANCE, NEGLIGIBLE[1]) if name in half else (full, NEGLIGIBLE[0])
            if not off[name] <= max(tolerance * size, least * whole_norm):
                wrong.append(name)
        if wrong:
            worst = max(off[name] / sizes[name] for name in wrong)
            raise GradientMismatchError(
                f"{where}: gradients in a batch of {len(self.factors)} are not those of plain autograd; they differ in "
                f"{', '.join(wrong)} (by up to {worst:.1%}). Either samples meet on the way from there to the losses, "
                "or a layer lays them out along another axis than the first, or a parameter is used outside its own "
                "layer's forward, or a module that is run again for each sample drops out: leave these out with "
                "parameters=, register a rule, call rs.gradients.recompute_whole for that module, or eval()."
            )


def _pieces(name: str, gradient: Any, samples: slice) -> Iterator[tuple[str, Tensor, slice]]:
    """Parameters, formed gradients `[m, ...]` and which samples they are of."""
    if not isinstance(gradient, FactoredGradients):
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
