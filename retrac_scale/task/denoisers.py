"""What a denoiser tells of itself: the model within its wrappers, whose class it is, which arguments it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

TIMES = ("timestep", "timesteps", "t", "timestep_ratio")
MODULE_HOLDERS = {
    "torch": ("DataParallel", "DistributedDataParallel", "AveragedModel"),
    "deepspeed": ("DeepSpeedEngine",),
    "lightning": ("_FabricModule",),
    "lightning_fabric": ("_FabricModule",),
}
"""Wrappers, by package, that hold the model under `module`."""
CLASSES_OF_DIT = "num_embeds_ada_norm"
SHARDED = "its weights are split among processes, and a gradient here would be that of a part"


def is_a(thing: object, package: str, *names: str) -> bool:
    """isinstance of a package's classes, subclasses of them included, without importing what may not be installed."""
    return any(kind.__name__ in names and _package(kind) == package for kind in type(thing).__mro__)


def unwrapped(model: nn.Module) -> nn.Module:
    """The denoiser within what training wraps around it: DataParallel, DDP, torch.compile, PEFT, DeepSpeed, Fabric, ...

    Its weights and adapters are those of the wrapper. Mixed precision that one brings is off: a task has `autocast`.

    Raises:
        ValueError: a wrapper's own forward does more than pass on what it is given, or the weights are sharded.
    """
    while (inner := _within(model)) is not None:
        model = inner
    for name, parameter in model.named_parameters():
        if is_a(parameter, "torch", "DTensor") or hasattr(parameter, "ds_status"):
            raise ValueError(f"parameter {name!r} is sharded: {SHARDED}; gather the model first.")
    if "_original_forward" in vars(model):
        raise ValueError(
            "accelerate has put mixed precision around the model's forward; give "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False), and the task autocast='bfloat16' if it is meant."
        )
    return model


def _within(model: nn.Module) -> nn.Module | None:
    """What a known wrapper holds, None for anything else."""
    wrapper, found = type(model).__name__, None
    if is_a(model, "torch", "FullyShardedDataParallel"):
        raise ValueError(f"the model is wrapped in {wrapper}: {SHARDED}; load the gathered weights into a plain model.")
    if is_a(model, "torch", "OptimizedModule"):
        found = model._orig_mod
    elif any(is_a(model, package, *names) for package, names in MODULE_HOLDERS.items()):
        found = model.module
    elif is_a(model, "peft", "PeftModel", "PeftMixedModel"):
        tuner: Any = model.base_model
        if not is_a(tuner, "peft", "BaseTuner") or type(tuner).forward.__qualname__ != "BaseTuner.forward":
            raise ValueError(
                f"the model is wrapped in PEFT's {type(tuner).__name__}, whose own forward does more than call the "
                "model; give get_base_model() if its layers alone make the adapter."
            )
        found = tuner.model
    return found if isinstance(found, nn.Module) else None


@dataclass(frozen=True)
class Takes:
    """The arguments of a denoiser's forward.

    Attributes:
        time: the name of the one that tells of time, None where it is the second one, whatever its name.
        reserved: names that are taken: of the noisy sample, the time, `return_dict`.
        names: all others.
        needed: those of them that have no default.
        anything: it takes arguments of any name.
    """

    time: str | None
    reserved: frozenset[str]
    names: tuple[str, ...]
    needed: tuple[str, ...]
    anything: bool

    def take(self, name: str) -> bool:
        """Whether a key of an item reaches the model as an argument."""
        return name in self.names or (self.anything and name not in self.reserved)


def takes(model: nn.Module) -> Takes:
    """What a model's own forward takes, whatever its class is called."""
    parameters = inspect.signature(model.forward).parameters.values()
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [one.name for one in parameters if one.kind not in open_ended]
    time = next((name for name in TIMES if name in named), None)
    reserved = {*named[: 2 if time is None else 1], "return_dict", *(() if time is None else (time,))}
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    names = tuple(name for name in named if name not in reserved)
    needed = tuple(one.name for one in parameters if one.name in names and one.default is inspect.Parameter.empty)
    return Takes(time, frozenset(reserved), names, needed, anything)


def forward_of_diffusers(model: nn.Module) -> bool:
    """Whether the forward that runs is one that diffusers wrote, rather than one of a subclass or put in its place."""
    return _package(inspect.unwrap(model.forward)) == "diffusers"


def class_of_diffusers(model: object) -> str | None:
    """The class of diffusers that a model is an instance of, by the nearest forward that diffusers wrote; else None."""
    bases = (kind for kind in type(model).__mro__ if _package(kind) == "diffusers" and "forward" in vars(kind))
    return next((kind.__name__ for kind in bases), None)


def settings(model: object) -> Mapping[str, Any]:
    """The configuration of a class of diffusers or made in its manner; empty for others."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}


def image_shape(model: object) -> tuple[int, int, int] | None:
    """The shape of samples by a model's configuration; None where that does not tell."""
    channels, size = (settings(model).get(key) for key in ("in_channels", "sample_size"))
    if channels is None or size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def knows_classes(model: object) -> bool:
    """Whether a model of diffusers was made with classes."""
    return any(settings(model).get(key) is not None for key in ("num_class_embeds", "class_embed_type", CLASSES_OF_DIT))


def class_count(model: object) -> int | None:
    """How many classes a model of diffusers looks up, beside one that stands for none; None where it does not tell."""
    config = settings(model)
    count = config.get("num_class_embeds") or config.get(CLASSES_OF_DIT)
    return int(count) if count and config.get("class_embed_type") is None else None


def no_class(model: object) -> int | None:
    """The class by which a model is told none, None where it has no such class."""
    count = settings(model).get(CLASSES_OF_DIT)
    return int(count) if count and is_a(model, "diffusers", "DiTTransformer2DModel") else None


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]
