"""Adapters in a model: which weights are theirs, what scales them, and how files of them are read, by PEFT's names."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.task.weights import Weights

ADVICE = "give the model the adapters first (from_pretrained(..., lora=file))"
_MARK = re.compile(r"[._](?:lora|lokr|hada)[._]|^lora_")
_MODULE = re.compile(r"\.(?:lora|lokr|hada)_\w+(?:\.\w+)?$")
_COMPONENT = re.compile(r"(?:unet|transformer|controlnet)\.")
_KOHYA = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}


@dataclass(frozen=True)
class Adapters:
    """What a file of adapters holds.

    Attributes:
        tensors: by the names that PEFT gives them in files.
        config: PEFT's entries, None where the file does not tell them.
        scales: {module: what its adapter is multiplied with}, where the file tells them one by one, as kohya's do.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    scales: dict[str, float]

    def scale(self, module: str, rank: int) -> float | None:
        """What a module's adapter is multiplied with; None where the file does not tell it."""
        from peft.utils.other import get_pattern_key

        if module in self.scales or self.config is None:
            return self.scales.get(module)
        alpha = self.config.get("lora_alpha", self.config.get("alpha"))
        if alpha is None:
            return None
        pattern = self.config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(pattern.keys(), module), alpha)
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def look_like_adapters(keys: Iterable[str]) -> bool:
    """Whether names are those of adapters, of whatever trainer."""
    return any(_MARK.search(key) for key in keys)


def are_adapters(weights: Weights) -> bool:
    """Whether weights are those of adapters, by their names or by what their file says."""
    return look_like_adapters(weights.tensors) or _config(weights.file) is not None


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that carry adapters, with their names."""
    if not any(hasattr(module, "base_layer") for module in model.modules()):  # PEFT takes seconds to import
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def switches(model: nn.Module) -> list[Any]:
    """What PEFT has put into a model and can switch off, modules trained as wholes among it; nothing that is merged."""
    own = (module for module in model.modules() if getattr(module, "_disable_adapters", None) is False)
    return [module for module in own if not getattr(module, "merged", False)]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model with its adapters left out; whether their weights have gradients stays as it is."""
    found = switches(model)
    for module in found:
        module._disable_adapters = True  # PEFT's own switch would also freeze the weights
    try:
        yield
    finally:
        for module in found:
            module._disable_adapters = False


def adapter_name(model: nn.Module) -> str | None:
    """The adapter that is active in a model, None for a model without.

    Raises:
        ValueError: several are active, so that it cannot be told which one a file is for.
    """
    active = sorted({name for _, layer in layers(model) for name in layer.active_adapters})
    if len(active) > 1:
        raise ValueError(f"the model has adapters {', '.join(active)} active; make one active, which the file is for.")
    return active[0] if active and hasattr(model, "peft_config") else None


def adapter_keys(model: Any, own: Mapping[str, Tensor]) -> dict[str, str]:
    """{name in a file: name in the model's own state dict} of the weights of the active adapter."""
    name = adapter_name(model)
    if name is None:
        return {}
    from peft.utils import get_peft_model_state_dict

    keys = {id(value): key for key, value in own.items()}
    kept = get_peft_model_state_dict(model, own, adapter_name=name, save_embedding_layers=False)
    return {_plain(key): keys[id(value)] for key, value in kept.items()}


def scale_faults(model: Any, adapters: Adapters) -> list[str]:
    """Where a file of adapters tells another scale than the model's active adapter has; in words."""
    name, faults = adapter_name(model), []
    for place, layer in layers(model):
        alpha = {**getattr(layer, "alpha", {}), **getattr(layer, "lora_alpha", {})}.get(name)
        if alpha is None or name not in layer.r:
            continue
        rank, plain = layer.r[name], _plain(f"{place}.").removesuffix(".")
        root = getattr(model.peft_config[name], "use_rslora", False)
        own, told = alpha / (math.sqrt(rank) if root else rank), adapters.scale(plain, rank)
        if told is not None and not math.isclose(own, told, rel_tol=1e-6):
            faults.append(f"the adapter of {plain} is scaled by {told:g} instead of {own:g}")
    return faults


def read_adapters(model: nn.Module, weights: Weights, loader: Any = None) -> Adapters:
    """The adapters in a file, by PEFT's names.

    Args:
        model: that they are for.
        weights: as they stand in the file.
        loader: the class of the model's pipeline, by which diffusers knows the names of other trainers.

    Raises:
        ValueError: they are in a form that neither diffusers nor PEFT reads.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    tensors: dict[str, Tensor] = dict(weights.tensors)
    scales: dict[str, float] = {}
    if any(key.startswith("lora_") for key in tensors):
        tensors, scales = _of_kohya(model, tensors, loader)
    elif any("lora_down" in key or key.startswith("diffusion_model.") for key in tensors):
        tensors = _loader_for(model, loader).lora_state_dict(tensors)
        tensors = tensors[0] if isinstance(tensors, tuple) else tensors
    if any(".lora." in key or "_lora." in key for key in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    return Adapters({_plain(key): value for key, value in tensors.items()}, _config(weights.file), scales)


def inject(model: Any, adapters: Adapters, file: Path) -> None:
    """Give a model adapters of the shapes and scales of a file's, which are loaded into them afterwards.

    Raises:
        ValueError: neither the file nor the shapes in it tell PEFT's configuration.
    """
    import peft

    if file.name.startswith("adapter_model.") and adapters.config is not None:
        model.add_adapter(peft.PeftConfig.from_pretrained(str(file.parent)))
    elif adapters.config is not None:
        model.add_adapter(peft.PeftConfig.from_peft_type(**{"peft_type": "LORA", **adapters.config}))
    elif any(".lokr_" in key for key in adapters.tensors):
        # diffusers finds the factors of the Kronecker products
        prefixed = {f"unet.{key}": value for key, value in adapters.tensors.items()}
        model.load_lora_adapter(prefixed, prefix="unet", adapter_name="default")
        for name, layer in layers(model):
            layer.alpha["default"] = adapters.scales.get(name, 1.0) * layer.r["default"]
            layer.set_scale("default", 1.0)
    else:
        model.add_adapter(_configuration(adapters))


def _configuration(adapters: Adapters) -> Any:
    """PEFT's configuration as the shapes tell it; alpha is the rank where the file does not tell a scale."""
    import peft

    ranks = {
        _MODULE.sub("", key): value.shape[0] if ".hada_" in key else value.shape[1]
        for key, value in adapters.tensors.items()
        if key.endswith((".lora_B.weight", ".hada_w1_b"))
    }
    if not ranks:
        raise ValueError("the file tells neither kind nor rank of its adapters; keep PEFT's adapter_config.json by it.")
    alphas = {module: adapters.scales.get(module, 1.0) * rank for module, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    common: dict[str, Any] = {
        "r": rank,
        "target_modules": list(ranks),
        "rank_pattern": {f"^{re.escape(key)}": value for key, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(key)}": value for key, value in alphas.items() if value != alpha},
    }
    if any(".hada_" in key for key in adapters.tensors):
        tucker = any(".hada_t" in key for key in adapters.tensors)
        return peft.LoHaConfig(alpha=alpha, use_effective_conv2d=tucker, **common)
    dora = any(".lora_magnitude_vector" in key for key in adapters.tensors)
    bias = any(key.endswith(".lora_B.bias") for key in adapters.tensors)
    return peft.LoraConfig(lora_alpha=alpha, use_dora=dora, lora_bias=bias, **common)


def adapter_scales(model: nn.Module) -> str:
    """What adapters are multiplied with, which no state dict tells; empty for a model without adapters."""
    found = list(layers(model))
    scales = {name: layer.scaling for name, layer in found if hasattr(layer, "scaling")}
    if not scales:
        return ""
    names = {name for scaling in scales.values() for name in scaling}
    off = [name for name, layer in found if layer.disable_adapters or layer.merged]
    active = [(name, layer.active_adapters) for name, layer in found] if len(names) > 1 else []
    return repr(scales) + (repr((active, off)) if active or off else "")


def _plain(key: str) -> str:
    return _COMPONENT.sub("", key.removeprefix("base_model.model."), count=1) if key else key


def _of_kohya(
    model: nn.Module, tensors: Mapping[str, Tensor], loader: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors and scales of lora_unet_down_blocks_0_..._to_q.lora_down.weight and the like, of kohya and LyCORIS.

    diffusers knows which module each name stands for, but of LoRA alone: it is asked about a LoRA of each module.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    probes = {key.partition(".")[0]: torch.zeros(1, 1) for key in tensors if key.startswith("lora_")}
    asked = {f"{base}.lora_down.weight": probe for base, probe in probes.items()}
    asked |= {f"{base}.lora_up.weight": torch.zeros(1, 1) for base in probes}
    answered = _loader_for(model, loader).lora_state_dict(asked, unet_config=getattr(model, "config", None))
    answered = convert_unet_state_dict_to_peft(answered[0] if isinstance(answered, tuple) else answered)
    modules = {id(value): _plain(key).removesuffix(".lora_A.weight") for key, value in answered.items()}
    renamed: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for key, value in tensors.items():
        base, _, rest = key.partition(".")
        module = modules.get(id(probes.get(base)), base)
        if rest == "alpha":
            scales[module] = _scale(tensors, base, float(value))
        else:
            renamed[f"{module}.{_KOHYA.get(rest, rest)}"] = value
    return renamed, scales


def _scale(tensors: Mapping[str, Tensor], base: str, alpha: float) -> float:
    """alpha over the rank; 1 where LoKr's factors are whole matrices, as in LyCORIS."""
    for factor in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if f"{base}.{factor}" in tensors:
            return alpha / tensors[f"{base}.{factor}"].shape[0]
    return 1.0


def _loader_for(model: nn.Module, loader: Any) -> Any:
    if loader is not None and hasattr(loader, "lora_state_dict"):
        return loader
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    if isinstance(model, UNet2DConditionModel):
        return StableDiffusionXLLoraLoaderMixin
    raise ValueError(
        f"the adapters have names of kohya's trainer, which diffusers reads by the pipeline of a "
        f"{type(model).__name__}; build the task with from_pretrained."
    )


def _config(file: Path | None) -> dict[str, Any] | None:
    """What a file says of its adapters, in its metadata or in PEFT's adapter_config.json beside it."""
    if file is None:
        return None
    beside = file.parent / "adapter_config.json"
    if file.name.startswith("adapter_model.") and beside.exists():
        told: dict[str, Any] = json.loads(beside.read_text())
        return told
    if file.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        found = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    told = {key.rpartition(".")[2]: value for key, value in found.items() if not key.startswith("text_encoder")}
    return told or None
