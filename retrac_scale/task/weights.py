"""Files of weights as training code leaves them, read as plain tensors by name."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

StateDict = Mapping[str, Tensor]
Checkpoint = StateDict | str | os.PathLike[str] | Callable[[], StateDict]

COMPONENTS = ("unet", "transformer", "controlnet")
VARIANTS = (None, "fp16", "bf16")
"""What diffusers puts between the name of a file of weights and its suffix, in the order in which the hub is asked."""
_MODEL = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>\w+))?\.(?:safetensors|bin)"
    r"(?:\.index(?:\.(?P<late>\w+))?\.json)?"
)
_ADAPTER = re.compile(r"(?:pytorch_lora_weights|adapter_model)\.(?:safetensors|bin)")
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin")
"""What PEFT and diffusers call files of adapters on the hub."""


@dataclass(frozen=True)
class Weights:
    """Tensors by name, nested dicts under dotted names, and the file that they came from; None for those in memory."""

    tensors: dict[str, Tensor]
    file: Path | None = None


def read_weights(model: nn.Module, name: str, checkpoint: Checkpoint) -> Weights:
    """The tensors of a checkpoint.

    Args:
        model: that they are for; its class reads what stands on the hub, and chooses among the parts of a pipeline.
        name: of the checkpoint, for messages.
        checkpoint: a state dict, a callable that returns it, a file, a folder, a name on the hub; `file#name` takes
            one of several state dicts that a file holds, as in run.pt#ema.

    Raises:
        ValueError: there is no such file, or it is none of weights.
    """
    if isinstance(checkpoint, Mapping):
        return Weights(dict(_flat("", checkpoint)))
    if callable(checkpoint):
        return Weights(dict(_flat("", checkpoint())))
    place, part = os.fspath(checkpoint), ""
    if not Path(place).expanduser().exists():
        place, _, part = place.partition("#")
    path = Path(place).expanduser()
    if path.is_dir():
        path = weight_file(name, path, model=model)
    elif (repo := repository(place)) is not None and hasattr(type(model), "from_pretrained"):
        return _from_hub(model, name, repo)
    if not path.exists():
        raise ValueError(f"checkpoint {name!r}: there is no file {path}.")
    tensors = _read(name, path)
    if part:
        tensors = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        if not tensors:
            raise ValueError(f"checkpoint {name!r}: {path} holds nothing under {part!r}.")
    return Weights(tensors, path)


def repository(place: str | os.PathLike[str]) -> str | None:
    """The name of a repository on the hub, None for what stands here or cannot be one."""
    text = os.fspath(place)
    return text if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not Path(text).exists() else None


def weight_file(name: str, folder: Path, *, ema: bool = False, model: nn.Module | None = None) -> Path:
    """The file of weights in a checkpoint's folder, or in that of its denoiser within; of adapters where it has one.

    Raises:
        ValueError: there is none, there are several, or it is split among processes.
    """
    found = None if ema else _file_in(name, folder)
    if found is not None:
        if (folder / "text_encoder").is_dir():
            raise ValueError(_text_encoder(name))
        return found
    wanted = [f"{part}_ema" for part in COMPONENTS] if ema else COMPONENTS
    parts = [one for one in sorted(folder.iterdir()) if one.name in wanted or _is_of(one, model, ema)]
    files = {one: file for one in parts if one.is_dir() and (file := _file_in(name, one)) is not None}
    files = {one: file for one, file in files.items() if _is_of(one, model, ema)} or files
    if len(files) > 1:
        raise ValueError(
            f"checkpoint {name!r}: {folder} holds weights in {', '.join(one.name for one in files)}; give the folder "
            "of the one that is meant."
        )
    if files:
        # a pipeline has a text encoder anyway; beside the weights of a step it is one that was trained with them
        if (folder / "text_encoder").is_dir() and not (folder / "model_index.json").exists():
            raise ValueError(_text_encoder(name))
        return next(iter(files.values()))
    if any(folder.glob("pytorch_model_fsdp*")) or (folder / "pytorch_model").is_dir():
        raise ValueError(
            f"checkpoint {name!r}: the weights in {folder} are split among processes; join them first, with "
            "`accelerate merge-weights` (FSDP) or zero_to_fp32.py (DeepSpeed)."
        )
    raise ValueError(
        f"checkpoint {name!r}: the folder {folder} holds no weights"
        + (f" in {' or '.join(wanted)}." if ema else f", nor does {' or '.join(COMPONENTS)} in it.")
        + " Files of weights are called as diffusers, accelerate and PEFT call them; give the path of any other."
    )


def _file_in(name: str, folder: Path) -> Path | None:
    files = _files(folder)
    if adapters := [one for one in files if _ADAPTER.fullmatch(one.name)]:
        return min(adapters, key=lambda one: one.suffix != ".safetensors")
    by_variant: dict[str, list[Path]] = {}
    for file in files:
        if match := _MODEL.fullmatch(file.name):
            by_variant.setdefault(match["variant"] or match["late"] or "", []).append(file)
    if len(by_variant) > 1 and "" not in by_variant:
        raise ValueError(
            f"checkpoint {name!r}: {folder} holds the variants {', '.join(by_variant)} of its weights; give the file "
            "of the one that is meant."
        )
    some = by_variant.get("") or next(iter(by_variant.values()), [])
    return min(some, key=lambda one: ".safetensors" not in one.name, default=None)


def _is_of(folder: Path, model: nn.Module | None, ema: bool) -> bool:
    """Whether a folder's configuration is of a model's class."""
    config = folder / "config.json"
    if model is None or not config.is_file() or folder.name.endswith("_ema") != ema:
        return False
    return bool(json.loads(config.read_text()).get("_class_name") == type(model).__name__)


def with_variant(read: Callable[..., Any], place: str | os.PathLike[str], **options: Any) -> Any:
    """What a `from_pretrained` of diffusers makes of a folder or hub name, told the variant of weights that it has.

    Raises:
        ValueError: a folder lacks the weights without variant, and has several.
        OSError: the reader cannot read it.
    """
    options = {**frugal(), **options}
    if Path(place).is_dir():
        return read(place, variant=_only_variant(Path(place)), **options)
    first = None
    for variant in VARIANTS:
        try:
            return read(place, variant=variant, **options)
        except (OSError, ValueError) as error:
            first = first or error
    raise OSError(str(first)) from first


def frugal() -> dict[str, bool]:
    """How diffusers is told to spare memory where accelerate is installed, and to say nothing where it is not."""
    from diffusers.utils import is_accelerate_available

    return {"low_cpu_mem_usage": is_accelerate_available()}


def _only_variant(folder: Path) -> str | None:
    """The variant that a model's or pipeline's folder has weights of, where it lacks those without one; else None."""
    found: set[str] = set()
    for part in (folder, *sorted(folder.iterdir())):
        matches = [match for one in _files(part) if (match := _MODEL.fullmatch(one.name)) is not None]
        variants = {match["variant"] or match["late"] or "" for match in matches}
        found |= variants if "" not in variants else set()
    if len(found) > 1:
        raise ValueError(f"{folder} holds only the variants {', '.join(sorted(found))} of its weights; keep one.")
    return next(iter(found), None)


def _files(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_file()) if folder.is_dir() else []


def _read(name: str, path: Path) -> dict[str, Tensor]:
    if path.name.endswith(".json"):
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {key: value for shard in shards for key, value in _read(name, path.parent / shard).items()}
    if not path.exists():
        raise ValueError(f"checkpoint {name!r}: {path} is missing, which its index names.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"checkpoint {name!r}: {path} is no whole safetensors file: {error}.") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        raise ValueError(
            f"checkpoint {name!r}: {path} "
            + (f"holds more than plain weights ({code[1]}), which" if code else "is a pickle that")
            + " would have to be executed to be read; save the weights alone, torch.save(model.state_dict(), file)."
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        said = next(iter(str(error).splitlines()), "it is empty")
        raise ValueError(f"checkpoint {name!r}: {path} is no whole file of weights: {said}") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"checkpoint {name!r}: {path} holds a {type(state).__name__} in place of a state dict.")
    return dict(_flat("", state))


def _flat(prefix: str, state: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _from_hub(model: Any, name: str, repo: str) -> Weights:
    """The weights of a repository on the hub, by the model's own class; or the adapters in one."""
    kind, said = type(model), ""
    for folder in (None, *COMPONENTS):
        try:
            kind.load_config(repo, subfolder=folder)
        except OSError as error:
            said = said or str(error).splitlines()[0]
            continue
        found, info = with_variant(kind.from_pretrained, repo, subfolder=folder, output_loading_info=True)
        if faults := [str(key) for what in info.values() for key in what]:
            raise ValueError(f"checkpoint {name!r}: {repo} does not fit a {kind.__name__}: {faults[0]}.")
        return Weights(dict(found.state_dict()))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    for file in ADAPTER_FILES:
        with contextlib.suppress(OSError, HfHubHTTPError):
            path = Path(hf_hub_download(repo, file))
            with contextlib.suppress(OSError, HfHubHTTPError):
                hf_hub_download(repo, "adapter_config.json")
            return Weights(_read(name, path), path)
    raise ValueError(f"checkpoint {name!r}: there is no file {repo}, and no {kind.__name__} of that name: {said}")


def _text_encoder(name: str) -> str:
    return (
        f"checkpoint {name!r} has weights of a text encoder too, and a task has one text encoder for all checkpoints; "
        "compute the prompt embeddings with it, and give the denoiser's weights alone."
    )


def refuse_text_encoders(name: str, keys: Mapping[str, Any]) -> None:
    """ValueError where weights are a text encoder's."""
    if any(re.match(r"(text_encoder|lora_te\d?_)", key) for key in keys):
        raise ValueError(_text_encoder(name))
