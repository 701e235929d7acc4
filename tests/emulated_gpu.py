"""GPUs emulated on a CPU: runs the CUDA path and refuses what CUDA refuses.

    with EmulatedGpu() as gpu:
        model = loader.load(path, dtype="float32", device="cuda:1").model
        ...
    gpu.syncs

A `CudaTensor` says that it is on `cuda:N`; its values are in a CPU tensor. Every ATen call on one is checked and then
computed on the CPU. What is seen: tensors on two devices; waits of the host, by kind and line of the product; the
memory layout of what attention returns. What is not: speed, races, the kernels' rounding, and wrong beliefs about CUDA.
"""

import contextlib
import ctypes
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCT = ("/profiles/", "/tests/emulated_faults")  # where a wait is looked for
WAITS = {"nonzero", "masked_select", "_unique2", "unique_dim", "_local_scalar_dense", "equal", "is_nonzero", "bincount"}
_active: "list[EmulatedGpu]" = []


class CudaTensor(torch.Tensor):
    """A tensor on an emulated GPU; `host` holds its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor, device: torch.device) -> "CudaTensor":
        with torch.inference_mode(False):  # or it could be no view of a weight
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
                device=device,
            )  # fmt: skip
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _active[-1].run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"CudaTensor({self.host!r}, {self.device})"


class EmulatedGpu:
    """Inside its `with` block torch has two GPUs.

    Attributes:
        syncs: Waits of the host by (kind, `file.py:line` of the product).
    """

    def __init__(self) -> None:
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.current = 0
        self._sync_mode = False
        self._stack = contextlib.ExitStack()
        self._dispatch, self._functions = _Dispatch(self), _Functions(self)

    def __enter__(self) -> Self:
        _lend_device_guard()
        for name, stand_in in self._stand_ins().items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        self._stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pinned))
        self._stack.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
        torch.backends.cuda.enable_cudnn_sdp(True)
        lifts = torch._C._only_lift_cpu_tensors()
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        torch._C._set_only_lift_cpu_tensors(True)
        # a parameter that is moved here is another object
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        _active.append(self)
        self._stack.callback(_active.remove, self)
        self._stack.enter_context(self._functions)
        self._stack.enter_context(self._dispatch)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def indexed(self, device: Any) -> torch.device:
        device = torch.device(device)
        return torch.device("cuda", self.current) if device.type == "cuda" and device.index is None else device

    def wait(self, kind: str) -> None:
        """The host waits for the device."""
        frame: Any = sys._getframe()
        while frame is not None and not any(part in frame.f_code.co_filename for part in PRODUCT):
            frame = frame.f_back
        path, line = (frame.f_code.co_filename, frame.f_lineno) if frame else ("elsewhere", 0)
        self.syncs[kind, f"{Path(path).name}:{line}"] += 1
        if self._sync_mode:
            warnings.warn_explicit(f"called a synchronizing CUDA operation ({kind})", UserWarning, path, line)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Checks one ATen call as CUDA would and computes it on the CPU."""
        leaves = list(_leaves((args, kwargs)))
        on_gpu = [leaf for leaf in leaves if isinstance(leaf, CudaTensor)]
        target = None if kwargs.get("device") is None else self.indexed(kwargs["device"])
        if not on_gpu and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload) and _is_composite(func):  # inference mode hands these on whole
            with self._dispatch:
                return func.decompose(*args, **kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]
        on_host = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, CudaTensor)]
        self._check(name, args, kwargs, on_gpu, on_host, target)
        if name == "_local_scalar_dense":
            return on_gpu[0].host.item()
        if name == "copy_" and not isinstance(args[0], CudaTensor):
            return args[0].copy_(args[1].host)
        device = on_gpu[0].device if target is None else target
        return self._compute(func, args, kwargs if target is None else {**kwargs, "device": "cpu"}, device)

    def _check(self, name: str, args: Any, kwargs: Any, on_gpu: list[Any], on_host: list[Any], target: Any) -> None:
        copies = name in ("copy_", "_to_copy")
        devices = {str(tensor.device) for tensor in (*on_gpu, *(host for host in on_host if host.dim() > 0))}
        if len(devices) > 1 and not copies:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device: {', '.join(sorted(devices))}")
        if copies and (on_host or (target is not None and target.type == "cpu")):
            to_host = not isinstance(args[0], CudaTensor) if name == "copy_" else bool(on_gpu)
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            is_free = non_blocking and not to_host and all(getattr(host, "is_lent", False) for host in on_host)
            if not is_free:
                self.wait("device to host" if to_host else "host to device")
        has_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or has_mask:
            self.wait(f"{name} with a mask" if has_mask else name)

    def _compute(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        to_host = device.type == "cpu"
        writes = _writes(func) if isinstance(func, torch._ops.OpOverload) else []
        written = [arg for arg, is_written in zip(args, writes, strict=False) if is_written]
        output = func(*_mapped(_values, args), **_mapped(_values, kwargs))
        if written:
            return written[0]
        if to_host:
            return output
        return _mapped(lambda leaf: CudaTensor(leaf, device) if _is_tensor(leaf) else leaf, output)

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """SDPA, its output (batch, width, heads, size) in memory, as CUDA's flash and efficient kernels leave it."""

        def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
            mixed = functional.scaled_dot_product_attention(*args, **kwargs)
            return mixed.transpose(1, 2).contiguous().transpose(1, 2)

        return self.run(attention, args, kwargs)

    def _stand_ins(self) -> dict[str, Any]:
        properties = SimpleNamespace(name="an emulated GPU", major=9, minor=0, total_memory=2**37, uuid="")
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 2,
            "current_device": lambda: self.current,
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: (9, 0),
            "mem_get_info": lambda device=None: (2**36, 2**37),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "set_sync_debug_mode": self._set_sync_mode,
            "_lazy_init": lambda: None,
        }

    def _set_sync_mode(self, mode: str) -> None:
        self._sync_mode = mode == "warn"


class _Dispatch(TorchDispatchMode):
    """Takes calls without a tensor on a GPU too, such as those that make one."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._gpu.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What a torch built without CUDA decides before any ATen call: kernels of attention, the current device."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(map(self._numbered, args))
        kwargs = {name: self._numbered(value) for name, value in kwargs.items()}
        if args and isinstance(args[0], CudaTensor):
            if func is functional.scaled_dot_product_attention:
                return self._gpu.attend(*args, **kwargs)
            if func is torch.Tensor.tolist:
                self._gpu.wait("tolist")
                return args[0].host.tolist()
        if kwargs.pop("pin_memory", False):
            return _pinned(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _numbered(self, value: Any) -> Any:
        return self._gpu.indexed(value) if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.is_lent = True  # type: ignore[attr-defined]
    return tensor


def _leaves(tree: Any) -> Iterator[Any]:
    """As torch's pytree, for the plain containers of a call; it is called for every operation."""
    if type(tree) in (list, tuple, dict):
        for branch in tree.values() if type(tree) is dict else tree:
            yield from _leaves(branch)
    else:
        yield tree


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(change, branch) for branch in tree)
    if type(tree) is dict:
        return {name: _mapped(change, branch) for name, branch in tree.items()}
    return change(tree)


def _values(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, CudaTensor) else leaf


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


@functools.cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@functools.cache
def _writes(func: Any) -> list[bool]:
    """Which arguments a call writes to."""
    return [bool(entry.alias_info and entry.alias_info.is_write) for entry in func._schema.arguments]


def _lend_device_guard() -> None:
    """A torch built without CUDA has no guard for its devices: that of `meta`, which does nothing, stands in."""
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[1] or guards[14]  # c10::DeviceType CUDA and Meta
