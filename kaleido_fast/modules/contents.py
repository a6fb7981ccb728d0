"""Digests of modules, of TorchScript and of tensors and arrays."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kaleido_fast.modules.walk import UntoldError, Walk, hash_of

# Of a module: its mode (networks are sampled as in evaluation), hooks of gradients and state dictionaries, and hooks
# that are taken in order instead of under the numbers that a process gave them.
_NOT_OF_A_MODULE = {
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_compiled_call_impl",
}
_MANGLED = re.compile(rb"\.___torch_mangle_\d+")
_CLASS = re.compile(rb"^class ", re.MULTILINE)
_CONSTANT = re.compile(rb"^  \w+ : Final\[.*\n", re.MULTILINE)  # torch writes them in the order of a set


def tell_module(walk: Walk, module: nn.Module) -> bytes:
    """A module by its class, settings, parameters, buffers, modules inside and forward hooks."""
    if isinstance(module, torch.jit.ScriptModule):
        return _tell_script(module)
    if (type(module).__module__, type(module).__name__) == ("torch.export._unlift", "GuardsFn"):
        return hash_of("guards")  # checks shapes, computes nothing
    own, skipped = vars(module), set(_NOT_OF_A_MODULE)
    parts = [walk.of(type(module))]
    if isinstance(module, torch.fx.GraphModule):  # its code is text; the rest is how it was found
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        own, parts = tensors, [hash_of("graph", module.code.encode())]
    elif "_orig_mod" in module._modules and hasattr(module, "dynamo_ctx"):
        own, parts = {}, [hash_of("compiled")]
    for hook in module._forward_pre_hooks.values():  # these compute a weight again at each call
        if type(hook).__module__.startswith("torch.nn.utils."):
            skipped.add(str(getattr(hook, "_tensor_name", None) or getattr(hook, "name", "")))
    parts += [
        walk.named(module._parameters, set()),
        walk.named(module._buffers, set()),
        walk.mapping(module._modules),
        _tell_hooks(walk, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        _tell_hooks(walk, module._forward_hooks, module._forward_hooks_with_kwargs),
        walk.named(own, skipped),
    ]
    return hash_of("nn.Module", *parts)


def _tell_hooks(walk: Walk, hooks: Mapping[int, Any], with_kwargs: Mapping[int, bool]) -> bytes:
    return walk.all((hook, number in with_kwargs) for number, hook in hooks.items())


def _tell_script(module: torch.jit.ScriptModule) -> bytes:
    """A TorchScript module by the archive that it would be saved as, without the place of its source."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(module.save_to_buffer()))
    except RuntimeError as problem:
        raise UntoldError("TorchScript that cannot be saved") from problem
    classes: list[bytes] = []
    members: list[bytes] = []
    with archive:
        for name in archive.namelist():
            if "/code/" in name and name.endswith(".py"):
                # Which classes share a file, and a part of their names, depends on how many were compiled before.
                classes += _CLASS.split(_MANGLED.sub(b"", archive.read(name)))
            elif not name.endswith((".debug_pkl", "/serialization_id")):
                members.append(hash_of("member", name.encode(), _MANGLED.sub(b"", archive.read(name))))
    return hash_of("script", *sorted(map(_tell_script_class, filter(None, classes))), *members)


def _tell_script_class(text: bytes) -> bytes:
    return hash_of("class", _CONSTANT.sub(b"", text), *sorted(_CONSTANT.findall(text)))


def tell_tensor(walk: Walk, tensor: Tensor) -> bytes:
    """A tensor by its type, shape and bytes."""
    kind = type(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return hash_of("tensors", walk.of(kind), walk.of(context), *(walk.of(getattr(tensor, name)) for name in names))
    if nn.parameter.is_lazy(tensor):
        raise UntoldError("a parameter without values: run the module once")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        what = "quantized" if tensor.is_quantized else f"of layout {tensor.layout} on {tensor.device}"
        raise UntoldError(f"a tensor {what}, whose bytes cannot be read")
    plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
    held = plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    parts: list[bytes | memoryview] = [str(tensor.dtype).encode(), str(tuple(tensor.shape)).encode(), held.data]
    if kind not in (Tensor, nn.Parameter, nn.Buffer):
        parts.append(walk.of(kind))
    return hash_of("tensor", *parts)


def tell_array(walk: Walk, array: np.ndarray | np.generic) -> bytes:
    """An array by its type, shape and values."""
    shape, values = str(array.shape).encode(), np.ascontiguousarray(array)
    if values.dtype.hasobject:
        return hash_of("objects", shape, walk.all(values.ravel().tolist()))
    return hash_of("array", str(values.dtype.descr).encode(), shape, values.tobytes())


def tell_generator(walk: Walk, generator: torch.Generator) -> bytes:
    """A generator of random numbers by its state."""
    return hash_of("generator", walk.of(generator.get_state()))
