"""Files of weights as training code leaves them: each is read as its writer meant it, or refused by name."""

from __future__ import annotations

import argparse
import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import retrac_scale as rs
from retrac_scale.task.checkpoints import absolute, load_checkpoint
from tests.conftest import tiny_unet
from tests.task.test_pipelines import stable_diffusion, unet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TRAINED = tiny_unet(1)


def same(model: nn.Module, expected: nn.Module, atol: float = 0.0) -> bool:
    found, wanted = model.state_dict(), expected.state_dict()
    return all(torch.allclose(found[key], wanted[key], rtol=0, atol=atol) for key in wanted)


def regionally_compiled(model: Any) -> nn.Module:
    model = copy.deepcopy(model)
    model.mid_block = torch.compile(model.mid_block)
    model.down_blocks[1] = checkpoint_wrapper(model.down_blocks[1])
    compiled: Any = torch.compile(model)
    return nn.DataParallel(compiled)


def lightning(model: nn.Module) -> dict[str, Any]:
    states = {f"model.{key}": value for key, value in model.state_dict().items()}
    states["logvar"] = torch.zeros(3)
    return {"epoch": 1, "state_dict": states, "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}]}


def averaged(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = EMAModel(model.parameters(), decay=0.5).state_dict()
    return state


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "wrappers at every depth": lambda model: regionally_compiled(model).state_dict(),
    "AveragedModel": lambda model: AveragedModel(nn.DataParallel(model)).state_dict(),
    "Lightning": lightning,
    "a plain loop": lambda model: {"model_state_dict": model.state_dict(), "optimizer_state_dict": {"state": {}}},
    "an EMA of diffusers": averaged,
    "half precision": lambda model: {"ema": {key: value.half() for key, value in model.state_dict().items()}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_in_what_training_code_wraps_them_in(tmp_path: Path, kind: str) -> None:
    torch.save(WRAPPED[kind](TRAINED), tmp_path / "file.pt")
    model = tiny_unet(0)
    load_checkpoint(model, "last", tmp_path / "file.pt")
    assert same(model, TRAINED, atol=1e-3 if kind == "half precision" else 0)


def test_a_wrapped_model_takes_plain_weights() -> None:
    model = regionally_compiled(tiny_unet(0))
    load_checkpoint(model, "last", TRAINED.state_dict())
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), TRAINED.parameters(), strict=True))


def test_a_file_that_holds_several_models_is_refused_until_one_is_said(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    torch.save({"model": tiny_unet(2).state_dict(), "ema": TRAINED.state_dict()}, file)
    model = tiny_unet(0)
    with pytest.raises(ValueError, match=r"'last' holds weights of the model under ema and model.*file#"):
        load_checkpoint(model, "last", file)
    load_checkpoint(model, "last", f"{file}#ema")
    assert same(model, TRAINED)
    with pytest.raises(ValueError, match="holds nothing under 'emma'"):
        load_checkpoint(model, "last", f"{file}#emma")


SAVED: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "sharded": {"max_shard_size": "20KB"},
    "sharded pickle": {"max_shard_size": "20KB", "safe_serialization": False},
    "pickle": {"safe_serialization": False},
    "fp16": {"variant": "fp16"},
    "sharded bf16": {"variant": "bf16", "max_shard_size": "20KB"},
    "fp16 pickle": {"variant": "fp16", "safe_serialization": False},
    "without EMA": {"variant": "non_ema"},
}


@pytest.mark.parametrize("kind", SAVED)
def test_every_form_that_diffusers_saves_a_model_in_is_read(tmp_path: Path, kind: str) -> None:
    TRAINED.save_pretrained(tmp_path / "unet", **SAVED[kind])  # type: ignore[operator]
    model = tiny_unet(0)
    load_checkpoint(model, "last", tmp_path)
    assert same(model, TRAINED)


def test_of_several_variants_one_must_be_said(tmp_path: Path) -> None:
    for variant in ("fp16", "non_ema"):
        TRAINED.save_pretrained(tmp_path, variant=variant)  # type: ignore[operator]
    with pytest.raises(ValueError, match="holds the variants fp16, non_ema"):
        load_checkpoint(tiny_unet(0), "last", tmp_path)
    load_checkpoint(tiny_unet(0), "last", tmp_path / "diffusion_pytorch_model.fp16.safetensors")


def test_a_pipeline_that_has_only_half_precision_is_read_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stable_diffusion(tmp_path / "whole")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    task = rs.DiffusionTask.from_pretrained(tmp_path / "half")
    assert {value.dtype for value in task.model.parameters()} == {torch.float32}
    assert same(task.model, pipeline.unet.float())


OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def as_of_old(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for new, old in OLD_NAMES.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    return state


def test_attention_by_its_older_names_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    TRAINED.save_pretrained(tmp_path)  # type: ignore[operator]
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = as_of_old(load_file(file))
    assert old.keys() != TRAINED.state_dict().keys()
    save_file(old, file, metadata={"format": "pt"})
    assert same(UNet2DModel.from_pretrained(tmp_path), TRAINED)
    for checkpoint in (tmp_path, {f"module.{key}": value for key, value in old.items()}):
        model = tiny_unet(0)
        load_checkpoint(model, "last", checkpoint)
        assert same(model, TRAINED)


@pytest.mark.parametrize("folder", ["", "unet"])
def test_a_name_on_the_hub_is_read_by_the_models_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    snapshot = tmp_path / "models--acme--tiny/snapshots/0123456789abcdef0123456789abcdef01234567"
    TRAINED.save_pretrained(snapshot / folder, variant="fp16" if folder else None)  # type: ignore[operator]
    (tmp_path / "models--acme--tiny/refs").mkdir()
    (tmp_path / "models--acme--tiny/refs/main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tiny_unet(0)
    load_checkpoint(model, "last", "acme/tiny")
    assert same(model, TRAINED)
    with pytest.raises(ValueError, match="'last': there is no file acme/other, and no UNet2DModel of that name"):
        load_checkpoint(model, "last", "acme/other")


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        if tied:
            self.second.weight = self.first.weight


def test_tied_weights_may_be_saved_once_and_must_agree(tmp_path: Path) -> None:
    model, state = Tied(), Tied().state_dict()
    once = {key: value for key, value in state.items() if key != "first.weight"}
    save_file(once, tmp_path / "model.safetensors")
    load_checkpoint(model, "last", tmp_path)
    assert torch.equal(model.first.weight, state["second.weight"])
    with pytest.raises(ValueError, match=r"first\.weight and second\.weight differ, which are one in the model"):
        load_checkpoint(model, "last", Tied(tied=False).state_dict())
    with pytest.raises(ValueError, match=r"it lacks first\.weight"):
        load_checkpoint(Tied(tied=False), "last", once)


def test_what_misfits_is_named() -> None:
    model = Tied(tied=False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    faults: dict[str, dict[str, Tensor]] = {
        r"'last' .* it lacks second\.bias;": {key: value for key, value in state.items() if key != "second.bias"},
        r"it has an unknown logvar;": {**state, "logvar": torch.zeros(3)},
        r"first\.weight is \(2, 3\) instead of \(3, 3\)": {**state, "first.weight": torch.zeros(2, 3)},
        r"first\.weight is torch\.int8 instead of torch\.float32": {**state, "first.weight": torch.zeros(3, 3).char()},
        r"first\.bias is torch\.complex64 instead of": {**state, "first.bias": torch.zeros(3) * 1j},
        r"it lacks first\.weight and 3 more": {"epoch": torch.tensor(1)},
    }
    for message, checkpoint in faults.items():
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, "last", checkpoint)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_configuration_of_another_model_with_the_same_shapes_is_refused(tmp_path: Path) -> None:
    other: Any = tiny_unet(1)
    other.register_to_config(attention_head_dim=4)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="says attention_head_dim = 4, the model has 8"):
        load_checkpoint(tiny_unet(0), "last", tmp_path)


class Ran(Exception):
    """Code out of a pickle ran."""


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise tests.task.test_checkpoints.Ran",)


def test_a_pickle_that_is_more_than_weights_is_refused_in_a_sentence_and_not_run(tmp_path: Path) -> None:
    state = TRAINED.state_dict()
    for found, content in {
        "argparse.Namespace": {"model": state, "args": argparse.Namespace(lr=1)},
        "UNet2DModel": TRAINED,
        "exec": {"model": state, "extra": Bomb()},
    }.items():
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(
            ValueError, match=rf"'last': .*file\.pt holds more than plain weights \(\S*{found}\)"
        ) as told:
            load_checkpoint(tiny_unet(0), "last", tmp_path / "file.pt")
        assert "\n" not in str(told.value)
    (tmp_path / "file.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"save the weights alone"):
        load_checkpoint(tiny_unet(0), "last", tmp_path / "file.pt")


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
def test_files_that_are_cut_off_or_of_another_kind_are_named(tmp_path: Path, name: str) -> None:
    for content in (b"", b"not weights at all"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"'last': .*{name} is (no whole|a pickle)"):
            load_checkpoint(tiny_unet(0), "last", tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a list in place of a state dict"):
        load_checkpoint(tiny_unet(0), "last", tmp_path / "list.pt")


def test_a_text_encoder_that_was_trained_too_is_not_left_out_in_silence(tmp_path: Path) -> None:
    TRAINED.save_pretrained(tmp_path / "checkpoint-1/unet")  # type: ignore[operator]
    (tmp_path / "checkpoint-1/text_encoder").mkdir()
    with pytest.raises(ValueError, match="'checkpoint-1' has weights of a text encoder too"):
        rs.find_checkpoints(tmp_path)
    load_checkpoint(tiny_unet(0), "last", tmp_path / "checkpoint-1/unet")


def test_paths_of_checkpoints_are_absolute_and_names_on_the_hub_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/one.pt").touch()
    state = TRAINED.state_dict()
    given: dict[str, Any] = {"a": Path("run/one.pt"), "b": "run/one.pt#ema", "c": "acme/tiny", "d": state, "e": "~/x"}
    found = absolute(given)
    assert found["a"] == str(tmp_path / "run/one.pt")
    assert found["b"] == str(tmp_path / "run/one.pt#ema")
    assert found["c"] == "acme/tiny"
    assert found["d"] is state
    assert found["e"] == os.path.expanduser("~/x")


def adapted(config: Any, seed: int = 0) -> Any:
    """A U-Net with adapters of random weights."""
    torch.manual_seed(0)
    model = unet()
    model.requires_grad_(False)
    model.add_adapter(config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    return model.eval()


def answer(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 8, 8, generator=generator)
    with torch.no_grad():
        found: Tensor = model(noisy, torch.tensor([3]), text, return_dict=False)[0]
    return found


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline around the U-Net of `adapted`."""
    folder = tmp_path_factory.mktemp("pipeline")
    stable_diffusion(folder)
    torch.manual_seed(0)
    unet().save_pretrained(folder / "unet")
    return folder


def as_kohya(model: Any, alpha: str = "lora_alpha") -> dict[str, Tensor]:
    """The adapters of a model as kohya's and LyCORIS' trainers write them."""
    modules, written = dict(model.named_modules()), {}
    for key, value in get_peft_model_state_dict(model).items():
        place = next(part for part in (".lora_", ".hada_", ".lokr_") if part in key)
        module, _, rest = key.partition(place)
        base = f"lora_unet_{module.replace('.', '_')}"
        rest = {"A.weight": "down.weight", "B.weight": "up.weight"}.get(rest, rest)
        written[f"{base}{place}{rest}"] = value.contiguous()
        written[f"{base}.alpha"] = torch.tensor(float(getattr(modules[module], alpha)["default"]))
    return written


def loads_the_same(pipeline: Path, file: Path, expected: Any) -> None:
    """As the pipeline's adapters, and as a checkpoint of a model that has such adapters."""
    task = rs.DiffusionTask.from_pretrained(pipeline, lora=file)
    torch.testing.assert_close(answer(task.model), answer(expected), rtol=1e-5, atol=1e-5)
    trained = {name for name, value in task.model.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in expected.named_parameters() if value.requires_grad}
    for value in task.model.parameters():
        if value.requires_grad:
            value.data.zero_()
    task.load("last", file)
    torch.testing.assert_close(answer(task.model), answer(expected), rtol=1e-5, atol=1e-5)


LORA = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS)
UNEVEN = LoraConfig(
    r=4, lora_alpha=4, target_modules=[*TARGETS, "conv1", "proj_in"], alpha_pattern={"attn1.to_q": 1, "to_out.0": 8}
)
LOHA = LoHaConfig(r=2, alpha=6, target_modules=TARGETS)
LOKR = LoKrConfig(r=1, alpha=3, target_modules=TARGETS, decompose_factor=2)
PEFT = {
    "LoRA": LORA,
    "uneven": UNEVEN,
    "DoRA": LoraConfig(r=2, use_dora=True, target_modules=TARGETS),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS),
    "with a bias": LoraConfig(r=2, lora_bias=True, target_modules=TARGETS),
    "with whole modules": LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["conv_out"]),
    "LoHa": LOHA,
    "LoKr": LOKR,
    "OFT": OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", PEFT)
def test_folders_that_peft_writes_are_read_whatever_their_kind(pipeline: Path, tmp_path: Path, kind: str) -> None:
    model = adapted(PEFT[kind])
    torch.manual_seed(0)
    whole = get_peft_model(unet(), copy.deepcopy(PEFT[kind]))
    values = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in whole.named_parameters():
        if value.requires_grad:
            value.data.copy_(values[name.removeprefix("base_model.model.")])
    whole.save_pretrained(tmp_path)
    loads_the_same(pipeline, tmp_path, model)
    again = PeftModel.from_pretrained(copy.deepcopy(whole).unload(), tmp_path, is_trainable=True).eval()
    load_checkpoint(again, "last", tmp_path)
    torch.testing.assert_close(answer(again), answer(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["kohya", "uneven", "LoHa", "LoKr"])
def test_adapters_of_kohya_and_lycoris_are_read_with_their_own_alpha(pipeline: Path, tmp_path: Path, kind: str) -> None:
    model = adapted({"kohya": LORA, "uneven": UNEVEN, "LoHa": LOHA, "LoKr": LOKR}[kind])
    written = as_kohya(model, "alpha" if kind.startswith("Lo") else "lora_alpha")
    save_file(written, tmp_path / "any name.safetensors")
    loads_the_same(pipeline, tmp_path / "any name.safetensors", model)


def diffusers_file(model: Any, folder: Path, told: bool) -> Path:
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    metadata = {"unet_lora_adapter_metadata": model.peft_config["default"].to_dict()} if told else {}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def test_a_checkpoint_whose_file_tells_another_scale_than_the_models_is_refused(tmp_path: Path) -> None:
    trained = adapted(LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS), seed=1)
    told = diffusers_file(trained, tmp_path / "told", True)
    task = rs.DiffusionTask(adapted(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)), DDPMScheduler())
    with pytest.raises(ValueError, match=r"attn1\.to_q is scaled by 4 instead of 1;.*lora=file"):
        task.load("last", told)
    own = rs.DiffusionTask(adapted(LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS)), DDPMScheduler())
    for file in (told, diffusers_file(trained, tmp_path / "untold", False)):
        own.load("last", file)
        torch.testing.assert_close(answer(own.model), answer(trained))


def test_adapters_beside_the_whole_model_of_a_step_are_taken(pipeline: Path, tmp_path: Path) -> None:
    """What accelerate's save_state and the training script's own hook leave in one folder."""
    model = adapted(LORA, seed=1)
    folder = tmp_path / "checkpoint-1"
    file = diffusers_file(model, folder, True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    assert rs.find_checkpoints(tmp_path) == {"checkpoint-1": file}
    loads_the_same(pipeline, folder, model)
    task = rs.DiffusionTask.from_pretrained(pipeline, lora=folder)
    assert task.load("adapters", folder) == task.load("whole", folder / "model.safetensors")


def test_what_adapters_cannot_be_loaded_into_is_named(tmp_path: Path) -> None:
    file = diffusers_file(adapted(LORA), tmp_path, True)
    two = adapted(LORA)
    two.add_adapter(LoraConfig(r=2, target_modules=TARGETS), adapter_name="other")
    two.set_adapters(["default", "other"])
    with pytest.raises(ValueError, match="adapters default, other active"):
        load_checkpoint(two, "last", file)
    with pytest.raises(ValueError, match=r"give the model the adapters first"):
        load_checkpoint(unet(), "last", file)
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight is \(2, 8\) instead of \(4, 8\)"):
        load_checkpoint(adapted(LoraConfig(r=4, target_modules=TARGETS)), "last", file)
    with pytest.raises(ValueError, match=r"it has an unknown \S+to_(k|v|out)\S*lora"):
        load_checkpoint(adapted(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"])), "last", file)


def test_which_adapter_is_active_is_part_of_what_the_weights_do() -> None:
    model = adapted(LORA)
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), adapter_name="other")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    digests = []
    for active in (["default"], ["other"], ["default", "other"]):
        model.set_adapters(active)
        digests.append(load_checkpoint(model, "last", state))
    model.disable_adapters()
    digests.append(load_checkpoint(model, "last", state))
    assert len(set(digests)) == 4
