"""What code and adapters are known by in a store's fingerprint: what they compute stands in no state dict."""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import sysconfig
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from retrac_scale.task.denoisers import is_a

INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
"""Code below these folders is known by its name; all other, which its author may change, by its source."""


def known_by(function: Any, *, without: Sequence[Any] = ()) -> str:
    """A callable's qualified name and, unless it is installed, a digest of its source and of the values it holds.

    Those are its defaults, what it closes over, the attributes of a callable object, and the functions, classes,
    models, numbers and strings that it names. Comments and line breaks do not count.

    Args:
        function: a function, method, `functools.partial`, class, or an object that can be called.
        without: values that are told elsewhere, such as the model.
    """
    name = str(_plain(function).__qualname__)
    if is_installed(function) and not isinstance(function, (partial, MethodType)):
        return name
    digest = hashlib.blake2b(digest_size=8)
    for piece in _pieces(function, [*without]):
        digest.update(piece.encode() + b"\0")
    return f"{name} {digest.hexdigest()}"


def code_known(thing: Any, *, without: Sequence[Any] = ()) -> dict[str, str]:
    """{name: digest} of a callable, empty for one that is installed, whose name is told elsewhere."""
    if thing is None or is_installed(thing):
        return {}
    name, _, digest = known_by(thing, without=without).partition(" ")
    return {name: digest}


def code_of(model: nn.Module) -> dict[str, str]:
    """Classes, patched forwards, processors and hooks of a model's modules that are not installed: name -> digest.

    A hook that returns something is told by its source alone: what hooks hold is, as a rule, what they have seen.
    """
    found: dict[str, set[str]] = {}
    every = [*model.modules()]
    kinds = dict.fromkeys(type(module) for module in every)
    held = [value for module in every for value in vars(module).values() if callable(value)]
    for value in [*kinds, *held]:
        if not isinstance(value, (nn.Module, Tensor)):
            for name, digest in code_known(value, without=every).items():
                found.setdefault(name, set()).add(digest)
    for hook in [h for module in every for h in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]:
        function = _plain(hook)
        if not is_installed(hook) and _returns(function):
            found.setdefault(f"hook {function.__qualname__}", set()).add(_bytes(_source(function).encode()))
    return {name: " ".join(sorted(digests)) for name, digests in found.items()}


def adapters_of(model: nn.Module) -> dict[str, str]:
    """PEFT's adapters that are active: name -> in how many layers, and a digest of which; merged ones likewise.

    What LoRA's are multiplied with stands in the digest of a checkpoint; that of others stands here.
    """
    layers: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if is_a(module, "peft", "BaseTunerLayer", "AuxiliaryTrainingWrapper"):
            layer: Any = module
            active = [] if layer.disable_adapters else [str(name) for name in layer.active_adapters]
            scales: Any = {} if hasattr(layer, "lora_A") else getattr(layer, "scaling", {})
            for name in active:
                layers.setdefault(name, []).append(f"{path} {scales.get(name)}")
            for name in layer.merged_adapters:
                layers.setdefault(f"merged {name}", []).append(path)
    return {
        name: f"{len(paths)} layers {hashlib.blake2b(repr(sorted(paths)).encode(), digest_size=8).hexdigest()}"
        for name, paths in sorted(layers.items())
    }


def _plain(thing: Any) -> Any:
    """The function within methods and partials, or the class of an object."""
    while isinstance(thing, (partial, MethodType)):
        thing = thing.func if isinstance(thing, partial) else thing.__func__
    return thing if isinstance(thing, (type, FunctionType, BuiltinFunctionType)) else type(thing)


def is_installed(thing: Any) -> bool:
    """Whether a function or class, or an object's class, is of Python, of an installed package, or of this one."""
    plain = _plain(thing)
    module = str(plain.__module__)
    if isinstance(plain, BuiltinFunctionType) or module.partition(".")[0] in ("builtins", __name__.partition(".")[0]):
        return True
    try:
        return inspect.getfile(plain).startswith(INSTALLED)
    except (TypeError, OSError):  # compiled, or of a notebook
        return module != "__main__"


def _pieces(value: Any, seen: list[Any]) -> Iterator[str]:
    """Texts that two callables, or values that they hold, share when they are the same."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        yield repr(value)
        return
    if not isinstance(value, tuple):
        if _among(value, seen):
            yield "known"
            return
        seen.append(value)
    if isinstance(value, (Tensor, np.ndarray)):
        yield _array_piece(value)
    elif isinstance(value, nn.Module):
        known = [one for other in seen[:-1] if isinstance(other, nn.Module) for one in other.parameters(recurse=False)]
        own = {name: one for name, one in value.state_dict(keep_vars=True).items() if not _among(one, known)}
        yield from _pieces({"weights": own, "code": code_of(value), "adapters": adapters_of(value)}, seen)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield repr(key)
            yield from _pieces(one, seen)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _pieces(one, seen)
    elif isinstance(value, (set, frozenset)):
        yield repr(sorted(" ".join(_pieces(one, [*seen])) for one in value))
    else:
        yield from _object_pieces(value, seen)


def _array_piece(value: Tensor | npt.NDArray[Any]) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {_bytes(np.ascontiguousarray(value).tobytes())}"
    value = value.detach().cpu().resolve_conj().contiguous()
    return f"{value.dtype} {tuple(value.shape)} {_bytes(value.view(-1).view(torch.uint8).numpy().tobytes())}"


def _object_pieces(value: Any, seen: list[Any]) -> Iterator[str]:
    """Of a callable, a class, or an object of one."""
    if isinstance(value, partial):
        yield from _pieces((value.func, value.args, value.keywords), seen)
    elif isinstance(value, MethodType):
        yield from _pieces((value.__func__, value.__self__), seen)
    elif isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        yield from _code_pieces(value, seen)
    else:
        yield from _code_pieces(type(value), seen)
        if hasattr(value, "__dict__"):
            yield from _pieces(vars(value), seen)
        elif " at 0x" not in repr(value):
            yield repr(value)


def _code_pieces(value: Any, seen: list[Any]) -> Iterator[str]:
    """Of a function or class: its name where it is installed, else its source and what that holds or names."""
    yield value.__qualname__
    if is_installed(value):
        return
    yield _source(value)
    if isinstance(value, type):
        yield from (piece for base in value.__bases__ for piece in _code_pieces(base, seen))
        functions = [one for one in map(inspect.unwrap, vars(value).values()) if isinstance(one, FunctionType)]
    else:
        functions = [value]
    for function in functions:
        yield from _pieces((function.__defaults__, function.__kwdefaults__), seen)
        for cell in function.__closure__ or ():
            yield from _pieces(_content(cell), seen)
        for name in _names(function.__code__):
            held = function.__globals__.get(name)
            if isinstance(held, (bool, int, float, str, tuple, type, FunctionType, partial, Tensor, nn.Module)):
                yield from _pieces(held, seen)


def _source(value: type | FunctionType) -> str:
    """Its source without comments; bytecode of lambdas, several of which may share a line, and where no source is."""
    if value.__name__ != "<lambda>":
        try:
            return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(value))))
        except (OSError, TypeError, SyntaxError):
            pass
    if isinstance(value, FunctionType):
        return _bytecode(value.__code__)
    return "".join(_bytecode(one.__code__) for one in vars(value).values() if isinstance(one, FunctionType))


def _returns(value: type | FunctionType) -> bool:
    """Whether a function can return anything; a hook that cannot only looks on."""
    try:
        tree = ast.parse(_source(value))
    except (SyntaxError, ValueError):  # bytecode
        return True
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return any(one is not None and not (isinstance(one, ast.Constant) and one.value is None) for one in returned)


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(one) if isinstance(one, CodeType) else " ".join(_pieces(one, [])) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _names(code: CodeType) -> Iterator[str]:
    """Global names that a function and those within it look up, in their order."""
    yield from dict.fromkeys(str(one.argval) for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL")
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _names(one)


def _among(value: Any, others: Sequence[Any]) -> bool:
    return any(value is other for other in others)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled: a function that names itself
        return None


def _bytes(value: bytes) -> str:
    return hashlib.blake2b(value, digest_size=8).hexdigest()
