"""Weights of checkpoints: found in a training run's folder, read, fitted to the model."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

StateDict = Mapping[str, Tensor]
Checkpoint = StateDict | str | os.PathLike[str] | Callable[[], StateDict]

ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors")
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    *ADAPTER_FILES,
)
COMPONENTS = ("unet", "transformer", "controlnet")
PREFIXES = ("module.", "_orig_mod.", "base_model.model.", *(f"{name}." for name in COMPONENTS))


def find_checkpoints(folder: str | os.PathLike[str], *, ema: bool = False) -> dict[str, Path]:
    """The checkpoints that a training run of diffusers' or accelerate's examples left, `{"checkpoint-500": file, ...}`.

    Args:
        folder: their `--output_dir`, with folders checkpoint-N or checkpoint_N in it.
        ema: the averaged weights (unet_ema, transformer_ema) in place of the last step's.

    Raises:
        ValueError: there are none, or one lacks the weights that are asked for.
    """
    numbered: dict[int, Path] = {}
    for path in Path(folder).iterdir():
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


def weight_file(name: str, folder: Path, *, ema: bool = False) -> Path:
    """The file of weights in a checkpoint's folder, or in its unet, transformer or controlnet folder.

    Raises:
        ValueError: there is none, or it is split among processes.
    """
    subfolders = [f"{part}_ema" for part in COMPONENTS] if ema else ["", *COMPONENTS]
    for subfolder in subfolders:
        for file in WEIGHT_FILES:
            if (folder / subfolder / file).exists():
                return folder / subfolder / file
    if any(folder.glob("pytorch_model_fsdp*")) or (folder / "pytorch_model").is_dir():
        raise ValueError(
            f"checkpoint {name!r}: the weights in {folder} are split among processes; join them first, with "
            "`accelerate merge-weights` (FSDP) or zero_to_fp32.py (DeepSpeed)."
        )
    where = " or ".join(subfolder for subfolder in subfolders if subfolder)
    raise ValueError(
        f"checkpoint {name!r}: the folder {folder} holds none of {', '.join(WEIGHT_FILES)}"
        + (f" in {where}." if ema else f", nor does {where} in it.")
    )


def read_checkpoint(name: str, checkpoint: Checkpoint) -> StateDict:
    """The state dict of a checkpoint given as such, as a file or folder, or as a callable that returns it."""
    if isinstance(checkpoint, Mapping):
        return checkpoint
    if callable(checkpoint):
        return checkpoint()
    path = Path(checkpoint)
    if path.is_dir():
        path = weight_file(name, path)
    if not path.exists():
        raise ValueError(f"checkpoint {name!r}: there is no file {path}.")
    if path.name.endswith(".index.json"):
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {key: value for shard in shards for key, value in read_checkpoint(name, path.parent / shard).items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: StateDict = load_file(path)
        return tensors
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    weights: StateDict = state.get("model", state)
    return weights


def load_checkpoint(model: nn.Module, name: str, checkpoint: Checkpoint) -> str:
    """Load a checkpoint into a model and return the hex digest of the model's weights.

    A file of LoRA adapters is loaded into the adapters that the model has; the rest keeps its weights.

    Raises:
        ValueError: it does not fit the model; names the checkpoint and the first parameters that differ.
    """
    own = model.state_dict()
    state = read_checkpoint(name, checkpoint)
    _refuse_text_encoders(name, state)
    state = _named_as(own, state)
    adapters = {key for key in own if _is_adapter(key)}
    needed = adapters if adapters and all(map(_is_adapter, state)) else set(own)
    missing = [key for key in own if key in needed and key not in state]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unknown or shapes:
        faults = [f"it lacks {missing[0]}"] * bool(missing) + [f"it has an unknown {unknown[0]}"] * bool(unknown)
        lora = any(map(_is_adapter, state)) and not adapters
        advice = "give the model the adapters first (from_pretrained(..., lora=file))" if lora else ""
        raise ValueError(
            f"checkpoint {name!r} does not fit the model: {'; '.join(faults + shapes[:1])}; "
            f"{advice or 'build the model with the configuration that the checkpoint was trained with'}."
        )
    model.load_state_dict(state, strict=False)
    return weights_digest(model.state_dict(), adapter_scales(model))


def configuration(model: nn.Module) -> dict[str, str]:
    """Entries of a diffusers model's configuration, JSON by name: heads and norm groups stand in no state dict."""
    config = getattr(model, "config", None)
    entries = config.items() if isinstance(config, Mapping) else ()
    return {f"config.{key}": json.dumps(value, default=str) for key, value in entries if not key.startswith("_")}


def add_adapters(model: Any, component: str, path: str | os.PathLike[str]) -> None:
    """Give a diffusers model the LoRA adapters of a file or folder, and make them its only trainable parameters.

    Folders that PEFT itself wrote tell rank and alpha in their adapter_config.json.

    Raises:
        ValueError: there is no such file, or it holds no adapters for this component of the pipeline.
    """
    file = weight_file(str(path), Path(path)) if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise ValueError(f"lora: there is no file {file}.")
    _refuse_text_encoders(str(path), read_checkpoint(str(path), file))
    if file.name == "adapter_model.safetensors" and (file.parent / "adapter_config.json").exists():
        from peft import PeftConfig

        model.add_adapter(PeftConfig.from_pretrained(str(file.parent)), adapter_name="default")
        load_checkpoint(model, str(path), file)
    else:
        model.load_lora_adapter(file.parent, weight_name=file.name, prefix=component, adapter_name="default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{file} holds no adapters under {component!r}.")


def _refuse_text_encoders(name: str, state: StateDict) -> None:
    if any(key.startswith("text_encoder") for key in state):
        raise ValueError(
            f"checkpoint {name!r} has weights of a text encoder too, and a task has one text encoder for all "
            "checkpoints; compute the prompt embeddings with it, and give the denoiser's weights alone."
        )


def _is_adapter(key: str) -> bool:
    return "lora_" in key or ".lora." in key


def _named_as(own: StateDict, state: StateDict) -> StateDict:
    """The state dict by the model's own names: prefixes of wrappers and pipelines off, adapters by PEFT's names."""
    if all(key in own for key in state):
        return state
    if any(map(_is_adapter, state)):
        state = _adapters_named_as(own, state)
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state) and not any(key in own for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _adapters_named_as(own: StateDict, state: StateDict) -> StateDict:
    """Keys of adapter files, in PEFT's or diffusers' older form, by a model's names; other components' are left off."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    components = [name for name in COMPONENTS if any(key.startswith(f"{name}.") for key in state)]
    if components:
        state = {
            key.removeprefix(f"{name}."): value
            for name in components
            for key, value in state.items()
            if key.startswith(f"{name}.")
        }
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    if any(".lora." in key for key in state):
        state = convert_unet_state_dict_to_peft(state)
    # PEFT writes the adapter's name, "default" and the like, between lora_A and weight, and leaves it out in files
    plain = {re.sub(r"(lora_\w+)\.[^.]+(\.weight|\.bias)?$", r"\1\2", key): key for key in own if _is_adapter(key)}
    return {plain.get(key, key): value for key, value in state.items()}


def adapter_scales(model: nn.Module) -> str:
    """What LoRA adapters are multiplied with, which no state dict tells; empty for a model without adapters."""
    scales = {name: module.scaling for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return repr(scales) if scales else ""


def weights_digest(state: StateDict, beside: str = "") -> str:
    """Hex digest of names and values, and of what else the weights' effect depends on."""
    digest = hashlib.blake2b(beside.encode(), digest_size=16)
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
