"""Weights of checkpoints: found in a training run's folder, fitted to the model, known by a digest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.task.adapters import (
    ADVICE,
    adapter_keys,
    adapter_scales,
    are_adapters,
    inject,
    layers,
    look_like_adapters,
    read_adapters,
    scale_faults,
)
from retrac_scale.task.weights import (
    COMPONENTS,
    Checkpoint,
    StateDict,
    Weights,
    read_weights,
    refuse_text_encoders,
    repository,
    weight_file,
)

__all__ = [
    "COMPONENTS",
    "Checkpoint",
    "StateDict",
    "absolute",
    "adapter_scales",
    "add_adapters",
    "configuration",
    "find_checkpoints",
    "hold_adapters",
    "load_checkpoint",
    "weights_digest",
]

logger = logging.getLogger(__name__)

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch's wrappers put into the names of the weights that they wrap, at any depth."""


def find_checkpoints(folder: str | os.PathLike[str], *, ema: bool = False) -> dict[str, Path]:
    """The checkpoints that a training run of diffusers' or accelerate's examples left, `{"checkpoint-500": file, ...}`.

    Args:
        folder: their `--output_dir`, with folders checkpoint-N or checkpoint_N in it.
        ema: the averaged weights (unet_ema, transformer_ema) in place of the last step's.

    Raises:
        ValueError: there are none, or one lacks the weights that are asked for.
    """
    numbered: dict[int, Path] = {}
    for path in Path(folder).expanduser().iterdir():
        number = re.fullmatch(r"(?:checkpoint|epoch|step)[-_](\d+)", path.name)
        if number is not None and path.is_dir():
            if int(number[1]) in numbered:
                raise ValueError(
                    f"{folder} holds both {numbered[int(number[1])].name} and {path.name}; "
                    "give checkpoints={'name': path} yourself."
                )
            numbered[int(number[1])] = path
    if not numbered:
        raise ValueError(f"{folder} holds no folders checkpoint-N; give checkpoints={{'name': path}} yourself.")
    return {path.name: weight_file(path.name, path, ema=ema) for _, path in sorted(numbered.items())}


def load_checkpoint(model: nn.Module, name: str, checkpoint: Checkpoint, loader: Any = None) -> str:
    """Load a checkpoint into a model and return the hex digest of the model's weights.

    A file of adapters is loaded into the adapters that the model has; the rest keeps its weights. Its scale must be
    the model's, where the file tells one.

    Args:
        model: whose configuration is that of the checkpoint.
        name: of the checkpoint, for messages.
        checkpoint: see `read_weights`.
        loader: the class of the model's pipeline, which reads adapters of other trainers.

    Raises:
        ValueError: it does not fit the model; names the checkpoint and the first parameters that differ.
    """
    weights = read_weights(model, name, checkpoint)
    refuse_text_encoders(name, weights.tensors)
    own = model.state_dict()
    state, unknown = _by_own_names(model, name, own, weights.tensors)
    faults, scales, theirs = _misfits(own, own, state, unknown), [], {}
    if not faults:
        _refuse_other_configuration(model, name, weights)
    elif next(layers(model), None) is not None:
        theirs = adapter_keys(model, own)
        if unknown and set(state) <= set(theirs.values()):
            adapters = read_adapters(model, weights, loader)
            state = {theirs[key]: value for key, value in adapters.tensors.items() if key in theirs}
            unknown = [key for key in adapters.tensors if key not in theirs]
            scales = scale_faults(model, adapters)
        if set(state) <= set(theirs.values()):
            faults = _misfits(own, list(theirs.values()), state, unknown) or scales
    if faults:
        advice = "build the model with the configuration that the checkpoint was trained with"
        if look_like_adapters(weights.tensors) and not theirs:
            advice = ADVICE
        elif faults is scales:
            advice = "build the task with such a file, from_pretrained(..., lora=file), or give the adapters that alpha"
        raise ValueError(f"checkpoint {name!r} does not fit the model: {'; '.join(faults[:3])}; {advice}.")
    model.load_state_dict(state, strict=False)
    return weights_digest(model.state_dict(), adapter_scales(model))


def absolute(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Checkpoints with their paths made absolute, which workers that run in another folder see the same."""
    return {
        name: os.path.abspath(os.path.expanduser(one))
        if isinstance(one, (str, os.PathLike)) and repository(one) is None
        else one
        for name, one in checkpoints.items()
    }


def configuration(model: nn.Module) -> dict[str, str]:
    """Entries of a diffusers model's configuration, JSON by name: heads and norm groups stand in no state dict."""
    config = getattr(model, "config", None)
    entries = config.items() if isinstance(config, Mapping) else ()
    return {f"config.{key}": json.dumps(value, default=str) for key, value in entries if not key.startswith("_")}


def add_adapters(model: Any, path: str | os.PathLike[str], loader: Any = None) -> None:
    """Give a diffusers model the adapters of a file or folder, and make them its only trainable parameters.

    Rank, alpha and kind are those that the file tells; else alpha is the rank, as in diffusers.

    Raises:
        ValueError: there is no such file, or it holds no adapters for this model.
    """
    name = f"lora={path}"
    weights = read_weights(model, name, path)
    refuse_text_encoders(name, weights.tensors)
    if weights.file is None or not are_adapters(weights):
        raise ValueError(f"{weights.file or path} holds no adapters.")
    inject(model, read_adapters(model, weights, loader), weights.file)
    load_checkpoint(model, name, weights.file, loader)
    theirs = set(adapter_keys(model, model.state_dict()).values())
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in theirs)


def hold_adapters(model: nn.Module, checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether checkpoints are adapters for a model, and not all of its weights.

    Raises:
        ValueError: some are and some are not, or one cannot be read; names them.
    """
    kinds = {name: are_adapters(read_weights(model, name, one)) for name, one in checkpoints.items()}
    if len({*kinds.values()}) > 1:
        of = {kind: ", ".join(name for name, own in kinds.items() if own == kind) for kind in (True, False)}
        raise ValueError(
            f"the checkpoints {of[True]} are adapters, {of[False]} all weights of the model; what is differentiated is "
            "the same for all of a store: sketch them into two, with another --out."
        )
    return True in kinds.values()


def weights_digest(state: StateDict, beside: str = "") -> str:
    """Hex digest of names and values, and of what else the weights' effect depends on."""
    digest = hashlib.blake2b(beside.encode(), digest_size=16)
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _bare(key: str) -> str:
    """A name without what wrappers put into it."""
    return ".".join(part for part in key.removeprefix("base_model.model.").split(".") if part not in WRAPPERS)


def _by_own_names(
    model: nn.Module, name: str, own: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's tensors by the model's names, and the names of those that it has not.

    What stands outside of the prefix under which the model's weights are found, an optimizer's state or another
    part of a pipeline, is left aside.
    """
    names = {_bare(key): key for key in own}
    if len(names) < len(own):  # a model with a layer that is called like a wrapper
        names = {key: key for key in own}
    shadow = [value for key, value in tensors.items() if key.startswith("shadow_params.")]
    parameters = [key for key, _ in model.named_parameters()]
    if len(shadow) == len(parameters):  # of diffusers' EMAModel, which keeps the parameters in their order
        return {**own, **dict(zip(parameters, shadow, strict=True))}, []
    prefix, found = _placed(name, names, tensors)
    inside = {key: value for key, value in tensors.items() if key.startswith(prefix)}
    rest = {key.removeprefix(prefix): value for key, value in inside.items() if key not in found}
    state = {**{bare: tensors[key] for key, bare in found.items()}, **rest}
    fix = getattr(model, "_fix_state_dict_keys_on_load", getattr(model, "_convert_deprecated_attention_blocks", None))
    if rest and fix is not None:
        fix(state)
    aside = [key for key, value in tensors.items() if key not in inside and value.is_floating_point()]
    if found and aside:
        logger.info("checkpoint %r: %d tensors beside the model's are left aside, as %s", name, len(aside), aside[0])
    return {names[key]: value for key, value in state.items() if key in names}, [
        key for key in state if key not in names
    ]


def _placed(name: str, names: Collection[str], tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """The prefix under which the most of a model's weights are found, and {name there: bare name} of them."""
    places: dict[str, dict[str, str]] = {}
    for key in tensors:
        parts = key.split(".")
        for cut in range(len(parts)):
            bare = _bare(".".join(parts[cut:]))
            if bare in names:
                places.setdefault("".join(f"{part}." for part in parts[:cut]), {})[key] = bare
    prefix = max(places, key=lambda place: (len(places[place]), len(place)), default="")
    found = places.get(prefix, {})
    rivals = [place for place, keys in places.items() if len(keys) == len(found) and not keys.keys() & found.keys()]
    for rival in rivals:
        key_of = {bare: key for key, bare in places[rival].items()}
        if any(not torch.equal(tensors[key], tensors[key_of[bare]]) for key, bare in found.items() if bare in key_of):
            both = " and ".join(sorted(place.removesuffix(".") for place in (prefix, rival)))
            one = prefix.removesuffix(".")
            raise ValueError(
                f"checkpoint {name!r} holds weights of the model under {both}; say which, as in file#{one}, or give "
                "the state dict of the one that is meant."
            )
    return prefix, found


def _misfits(
    own: Mapping[str, Tensor], needed: Collection[str], state: Mapping[str, Tensor], unknown: Collection[str]
) -> list[str]:
    """What of a checkpoint differs from a model, in words; weights that share their memory may be given once."""
    tied: dict[Any, list[str]] = {}
    for key, value in own.items():
        place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else key
        tied.setdefault(place, []).append(key)
    shared = {key: group for group in tied.values() for key in group}
    missing = [key for key in needed if not any(one in state for one in shared[key])]
    faults = [f"it lacks {missing[0]}{_more(missing)}"] if missing else []
    faults += [f"it has an unknown {next(iter(unknown))}{_more(unknown)}"] if unknown else []
    for key in needed:
        if key in state and state[key].shape != own[key].shape:
            faults.append(f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}")
        elif key in state and _kind(state[key]) != _kind(own[key]):
            faults.append(f"{key} is {state[key].dtype} instead of {own[key].dtype}")
    for first, *others in tied.values():
        for other in others:
            if first in state and other in state and not torch.equal(state[first], state[other]):
                faults.append(f"{first} and {other} differ, which are one in the model")
    return faults


def _more(keys: Collection[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _refuse_other_configuration(model: nn.Module, name: str, weights: Weights) -> None:
    """ValueError where the config.json beside a checkpoint's file tells another model that has the same shapes."""
    config = getattr(model, "config", None)
    beside = None if weights.file is None else weights.file.parent / "config.json"
    if not isinstance(config, Mapping) or beside is None or not beside.exists():
        return
    there, here = json.loads(beside.read_text()), json.loads(json.dumps(dict(config), default=str))
    for key in sorted(there.keys() & here.keys() - {"sample_size", "dropout"}):
        if not key.startswith("_") and there[key] != here[key]:
            raise ValueError(
                f"checkpoint {name!r} does not fit the model: {beside} says {key} = {there[key]!r}, the model has "
                f"{here[key]!r}; build the model with the configuration that the checkpoint was trained with."
            )


@contextmanager
def borrowed_weights(model: torch.nn.Module) -> Iterator[None]:
    """The model's weights may be changed within; afterwards they are what they were."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)
