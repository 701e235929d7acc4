"""GPUs emulated on a CPU: runs the CUDA path, graphs and all, and refuses what CUDA refuses.

    with EmulatedGpu(cudnn_first=True) as gpu:
        model = loader.load(path, dtype="float32", device="cuda:1").model
        ...
    gpu.syncs, gpu.captures, gpu.kernels

A `CudaTensor` says that it is on `cuda:N`; its values are in a CPU tensor. Every ATen call on one is checked and then
computed on the CPU. What is seen: tensors on two devices; waits of the host, by kind and line of the product; what a
capture forbids; captures on another device than the model's; replays that read freed memory; outputs that are read
before a replay, because a capture computes nothing (they are poisoned); the memory layouts of the attention kernels.
What is not: speed, races, the allocator's pools, the kernels' rounding, and wrong beliefs about CUDA.
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
from typing import Any, NamedTuple, Self
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

PRODUCT = ("/profiles/", "/tests/emulated_faults")  # where a wait is looked for
WAITS = {"nonzero", "masked_select", "_unique2", "unique_dim", "_local_scalar_dense", "equal", "is_nonzero", "bincount"}
RANDOM = {"multinomial", "randperm", "bernoulli", "normal", "rand"}
HALF = (torch.float16, torch.bfloat16)
KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
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


class _Address(NamedTuple):
    """Where a captured call finds a tensor: memory that it does not keep."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, host: torch.Tensor) -> "_Address":
        storage = StorageWeakRef(host.untyped_storage())
        return cls(storage, host.dtype, host.storage_offset(), tuple(host.shape), host.stride())

    def read(self) -> torch.Tensor:
        if self.storage.expired():
            raise RuntimeError("illegal memory access: a replay reads memory that was freed after the capture")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`: captures calls on one device, replays them on the same addresses."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.has_failed = False
        self._calls: list[tuple[Callable[..., Any], Any, Any, list[_Address]]] = []
        self._pool: dict[int, torch.UntypedStorage] = {}  # allocated in the capture, kept as long as the graph
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def save(self, written: list[torch.Tensor]) -> None:
        """Notes what a write in the capture would change: nothing runs yet."""
        for storage in (host.untyped_storage() for host in written):
            if storage._cdata not in self._pool and storage._cdata not in self._before:
                self._before[storage._cdata] = storage, storage.clone()

    def add(self, func: Callable[..., Any], args: Any, kwargs: Any, made: list[torch.Tensor]) -> None:
        self._pool |= {host.untyped_storage()._cdata: host.untyped_storage() for host in made}
        addresses = _mapped(_address, args), _mapped(_address, kwargs)
        self._calls.append((func, *addresses, [_Address.of(host) for host in made]))

    def finish(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        for storage in self._pool.values():
            storage.fill_(0xFF)
        self._before = {}
        if not self._calls:
            warnings.warn("The CUDA Graph is empty", stacklevel=3)

    def replay(self) -> None:
        _active[-1].launches += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for func, args, kwargs, made in self._calls:
                output = func(*_mapped(_read, args), **_mapped(_read, kwargs))
                for address, result in zip(made, filter(_is_tensor, _leaves(output)), strict=bool(made)):
                    address.read().copy_(result)


class Stream:
    """Stands in for `torch.cuda.Stream`; work is done at once."""

    def __init__(self, device: Any = None) -> None:
        self.device = _active[-1].indexed("cuda" if device is None else device)

    def wait_stream(self, other: "Stream") -> None: ...
    def synchronize(self) -> None: ...


class Attention(NamedTuple):
    """A call of SDPA: the kernel, the shapes of queries and keys (B, heads, tokens, size), whether it had a mask."""

    kernel: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    is_masked: bool


class EmulatedGpu:
    """Inside its `with` block torch has GPUs.

    Args:
        cudnn_first: Whether SDPA prefers cuDNN, as torch's CUDA 13 wheels do on Hopper.

    Attributes:
        syncs: Waits of the host by (kind, `file.py:line` of the product).
        kernels: Calls that would launch a kernel, outside of replays.
        captures, launches: Graphs captured, and replayed; `streams`: those that were captured on.
        attention: Calls of SDPA by kernel and shapes; cuDNN builds a plan for each of its own.
    """

    def __init__(self, *, num_gpus: int = 2, cudnn_first: bool = False) -> None:
        self.num_gpus, self.cudnn_first = num_gpus, cudnn_first
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.attention: Counter[Attention] = Counter()
        self.kernels = self.captures = self.launches = self.emptied = 0
        self.streams: list[Stream] = []
        self.current = 0
        self.capture: Graph | None = None
        self._sync_mode, self._has_warned = 0, False
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
        if self.capture is not None:
            self.capture.has_failed = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind})")
        if self._sync_mode == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({kind})")
        frame: Any = sys._getframe()
        while frame is not None and not any(part in frame.f_code.co_filename for part in PRODUCT):
            frame = frame.f_back
        path, line = (frame.f_code.co_filename, frame.f_lineno) if frame else ("elsewhere", 0)
        self.syncs[kind, f"{Path(path).name}:{line}"] += 1
        if self._sync_mode == 1:
            warnings.warn_explicit(f"called a synchronizing CUDA operation ({kind})", UserWarning, path, line)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Checks one ATen call as CUDA would, computes it on the CPU, and records it in a capture."""
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
        if name == "_fused_sdp_choice":
            return KERNELS[self.kernel(*args[:2], kwargs.get("attn_mask", args[3] if len(args) > 3 else None))].value
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
            if self.capture is not None or not is_free:
                self.wait("device to host" if to_host else "host to device")
        has_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or has_mask:
            self.wait(f"{name} with a mask" if has_mask else name)
        if self.capture is not None and name in RANDOM:
            self.capture.has_failed = True
            raise RuntimeError(f"{name} needs a generator that is registered with the capture")

    def _compute(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        to_host = device.type == "cpu"
        writes, is_view = _aliases(func) if isinstance(func, torch._ops.OpOverload) else ([], False)
        graph = self.capture if self.capture is not None and self.capture.device == device else None
        written = [arg for arg, is_written in zip(args, writes, strict=False) if is_written]
        if graph is not None:
            graph.save([arg.host for arg in written if isinstance(arg, CudaTensor)])
        self.kernels += not is_view
        output = func(*_mapped(_values, args), **_mapped(_values, kwargs))
        made = [] if written or is_view or to_host else list(filter(_is_tensor, _leaves(output)))
        if graph is not None and not is_view and not to_host:
            graph.add(func, args, kwargs, made)
        if written:
            return written[0]
        if to_host:
            return output
        return _mapped(lambda leaf: CudaTensor(leaf, device) if _is_tensor(leaf) else leaf, output)

    def attend(self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Any:  # fmt: skip
        """SDPA, its output in memory as the kernel that CUDA would choose leaves it."""
        chosen = self.kernel(query, key, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
        self.attention[Attention(chosen, tuple(query.shape), tuple(key.shape), attn_mask is not None)] += 1

        def compute(query: Any, key: Any, value: Any, attn_mask: Any) -> torch.Tensor:
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            if chosen in ("efficient", "flash"):  # (batch, width, heads, size) in memory
                return mixed.transpose(1, 2).contiguous().transpose(1, 2)
            return torch.empty_like(query, memory_format=torch.preserve_format).copy_(mixed)

        compute.__name__ = "attention"
        return self.run(compute, (query, key, value, attn_mask), {})

    def kernel(self, query: Any, key: Any, mask: Any, *, is_causal: bool = False, enable_gqa: bool = False) -> str:
        """What torch's sdp_utils.cpp chooses (2.11 to 2.13)."""
        is_half, size = query.dtype in HALF, query.shape[-1]
        may_use_cudnn = self.cudnn_first and torch.backends.cuda.cudnn_sdp_enabled()
        if is_half and may_use_cudnn and size % 8 == 0 and size <= 128 and key.shape[2] > 1:
            return "cudnn"
        if is_half and mask is None and not (is_causal and query.shape[2] != key.shape[2]):
            return "flash"
        is_grouped = enable_gqa and query.shape[1] != key.shape[1]
        return "math" if is_grouped or size % (8 if is_half else 4) else "efficient"

    @contextlib.contextmanager
    def _on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream.device.index
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def _capturing(self, graph: Graph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
        stream = stream or Stream()
        self.captures += 1
        self.streams.append(stream)
        with self._on_stream(stream):
            graph.device, self.capture = stream.device, graph
            try:
                yield
            finally:
                self.capture = None
                if graph.has_failed:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                graph.finish()

    def _stand_ins(self) -> dict[str, Any]:
        properties = SimpleNamespace(name="an emulated GPU", major=9, minor=0, total_memory=2**37, uuid="")
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: self.num_gpus,
            "current_device": lambda: self.current,
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: (9, 0),
            "mem_get_info": lambda device=None: (2**36, 2**37),
            "synchronize": lambda device=None: None,
            "empty_cache": self._empty_cache,
            "get_sync_debug_mode": lambda: self._sync_mode,
            "set_sync_debug_mode": self._set_sync_mode,
            "graph_pool_handle": lambda: (0, 1),
            "set_stream": lambda stream: None,
            "current_stream": Stream,
            "stream": self._on_stream,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": self._capturing,
            "_lazy_init": lambda: None,
        }

    def _empty_cache(self) -> None:
        self.emptied += 1

    def _set_sync_mode(self, mode: int | str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        self._sync_mode = {"default": 0, "warn": 1, "error": 2}[mode] if isinstance(mode, str) else mode


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


def _address(leaf: Any) -> Any:
    return _Address.of(leaf.host) if isinstance(leaf, CudaTensor) else leaf


def _read(leaf: Any) -> Any:
    return leaf.read() if isinstance(leaf, _Address) else leaf


def _values(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, CudaTensor) else leaf


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


@functools.cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@functools.cache
def _aliases(func: Any) -> tuple[list[bool], bool]:
    """Which arguments a call writes to, and whether it only makes views."""
    writes = [bool(entry.alias_info and entry.alias_info.is_write) for entry in func._schema.arguments]
    return writes, any(entry.alias_info for entry in func._schema.returns) and not any(writes)


def _lend_device_guard() -> None:
    """A torch built without CUDA has no guard for its devices: that of `meta`, which does nothing, stands in."""
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[1] or guards[14]  # c10::DeviceType CUDA and Meta
