"""What of a forward pass stands in plain attributes of modules: in no state dict, configuration or source."""

from __future__ import annotations

import dis
import hashlib
import inspect
import os
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

from retrac_scale.task.identity import is_installed

FREE_U = ("s1", "s2", "b1", "b2")
"""Attributes of up blocks by which diffusers scales backbone and skip features; None where it does not."""
OF_NO_EFFECT = ("device", "gradient_checkpointing", "inplace", "training")


def state_of(model: nn.Module) -> dict[str, str]:
    """Plain values that a model computes with, by what holds them: their text where one value is all there is.

    Those of one's own classes, except what their forward itself sets, as a counter; the constants of torch's layers
    (eps, stride, ...); FreeU's factors and the scales of IP adapters. Of other installed classes nothing is told:
    their configuration says it.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, value in _told(module):
            found.setdefault(name, []).append((path, repr(value)))
    return {name: _short(values) for name, values in sorted(found.items())}


def _told(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and plain values of one module."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        constants = {name: getattr(module, name, None) for name in getattr(kind, "__constants__", ())}
        yield from ((f"torch.{name}", value) for name, value in _plain(constants))
    elif not is_installed(kind):
        changing = _set_by_forward(kind)  # type: ignore[arg-type] # mypy takes a module's hash for its class's
        own = {name: value for name, value in vars(module).items() if name not in changing}
        yield from ((f"{kind.__qualname__}.{name}", value) for name, value in _plain(own))
    else:
        held = [module, *(value for value in vars(module).values() if hasattr(value, "__dict__"))]
        scales = [scale for one in held if isinstance(scale := vars(one).get("scale"), list)]
        yield from (("ip_adapter.scale", scale) for scale in scales)
        factors = {name: vars(module).get(name) for name in FREE_U}
        yield from ((f"freeu.{name}", value) for name, value in _plain(factors) if value is not None)


@lru_cache(maxsize=1024)
def _set_by_forward(kind: Any) -> frozenset[str]:
    """Attributes that a class's forward writes."""
    function = inspect.unwrap(kind.forward)
    if not isinstance(function, FunctionType):
        return frozenset()
    return frozenset(one.argval for one in dis.get_instructions(function) if one.opname == "STORE_ATTR")


def _plain(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if not name.startswith("_") and name not in OF_NO_EFFECT and _is_plain(value):
            yield name, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    if isinstance(value, str):
        return os.sep not in value  # a path says nothing of what is computed
    return value is None or isinstance(value, (bool, int, float, complex))


def _short(values: list[tuple[str, str]]) -> str:
    texts = {text for _, text in values}
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
    return f"{texts.pop()} in {len(values)}" if len(texts) == 1 else f"{len(texts)} values {digest}"
