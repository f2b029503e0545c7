"""Which of diffusers' denoisers are sketched exactly: writes docs/models.md.

    .venv/bin/python -m benchmarks.architectures > docs/models.md

Every model class under diffusers.models.unets and diffusers.models.transformers is built in a tiny configuration; its
per-sample gradients are compared with autograd of one sample at a time, in float64 where its own code allows it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from dataclasses import dataclass
from types import ModuleType

import diffusers
import torch
from diffusers.models import transformers, unets

import retrac_scale as rs
from retrac_scale.gradients import GradientCapture, UncapturableError
from retrac_scale.sketching.check import FALLBACK
from tests.architectures import ARCHITECTURES, batch, build, largest_error

TOLERANCE = 1e-4
HEAD = """# Which models are sketched exactly

Written by `python -m benchmarks.architectures` with diffusers {version} and torch {torch}; not by hand.

Every model class under `diffusers.models.unets` and `diffusers.models.transformers` in a tiny configuration: its
per-sample gradients, captured in a batch of two (of one where it says so), against autograd of one sample at a time (in
float64 where the model's own code allows it). **{exact} of {total} classes ({share:.1%}) are exact**, that is, within
{tolerance:.0e} in relative L2 norm. The others are refused by `rs.check_model`; the table has its error.

Shares of P are those of the tiny configuration: tables of positions or modulation weigh less in a large model.
Parameters under *per-sample autograd* are exact too, at the speed of batches of one for the module that holds them;
where that is the whole model, [a rule](writing-a-rule.md) is worth writing.

`rs.check_model(model, example)` says the same of your own model, before a long run.

| class | sketched exactly | share of P by rule | largest error |
| --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Row:
    """One class in the table."""

    name: str
    exact: bool
    shares: str
    error: str

    def __str__(self) -> str:
        return f"| {self.name} | {'yes' if self.exact else 'no'} | {self.shares} | {self.error} |"


def model_classes() -> list[str]:
    """Names of the model classes under the two packages, in alphabetical order."""
    names = set()
    packages: list[ModuleType] = [unets, transformers]
    for package in packages:
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            for name, found in vars(loaded).items():
                if inspect.isclass(found) and issubclass(found, diffusers.ModelMixin):
                    names.add(name) if found.__module__ == loaded.__name__ else None
    return sorted(names)


def row(name: str) -> Row:
    """Build, compare, describe."""
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        return Row(name, False, "no tiny configuration is known", "")
    model = build(name, architecture)
    if architecture.refused:
        try:
            rs.check_model(model, batch(architecture) | architecture.shared, samples=architecture.samples)
        except UncapturableError as refusal:
            return Row(name, False, f"refused: {refusal}", "")
    error = largest_error(model, architecture)
    sizes: dict[str, int] = {}
    for parameter, (_, rule) in GradientCapture(model).users.items():
        kind = FALLBACK if rule is None else rule.form.__name__
        sizes[kind] = sizes.get(kind, 0) + model.get_parameter(parameter).numel()
    total = sum(sizes.values())
    shares = [f"{kind} {size / total:.1%}" for kind, size in sorted(sizes.items(), key=lambda item: -item[1])]
    alone = "one sample in each forward pass; " if architecture.samples == 1 else ""
    return Row(name, error < TOLERANCE, alone + ", ".join(shares), f"{error:.0e}")


def main() -> None:
    """Print the page."""
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [row(name) for name in model_classes()]
    exact = sum(found.exact for found in rows)
    head = HEAD.format(
        version=diffusers.__version__,
        torch=torch.__version__.split("+")[0],
        exact=exact,
        total=len(rows),
        share=exact / len(rows),
        tolerance=TOLERANCE,
    )
    print("\n".join([head, *map(str, rows)]))


if __name__ == "__main__":
    main()
