"""What only a GPU does, emulated on a CPU: kernels' memory layouts, the streams and devices of captures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from profiles.engines.torch import batch_model
from profiles.engines.torch.batch_model import RowModel
from profiles.models import loader


class EmulatedCuda:
    """Stands in for the parts of `torch.cuda` that a capture uses; a capture runs its step once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.streams: list[EmulatedStream] = []
        self.capture_streams: list[object] = []
        self.sync_modes = [0]
        for name, stand_in in (
            ("Stream", self._stream),
            ("current_stream", lambda device=None: EmulatedStream(device)),
            ("set_stream", lambda stream: None),
            ("stream", self._within),
            ("graph", self._capture),
            ("CUDAGraph", EmulatedGraph),
            ("graph_pool_handle", lambda: (0, 1)),
            ("get_sync_debug_mode", lambda: self.sync_modes[-1]),
            ("set_sync_debug_mode", self.sync_modes.append),
        ):
            patch.setattr(torch.cuda, name, stand_in)

    def _stream(self, device: torch.device) -> "EmulatedStream":
        self.streams.append(EmulatedStream(device))
        return self.streams[-1]

    @contextmanager
    def _within(self, stream: "EmulatedStream") -> Iterator[None]:
        yield

    @contextmanager
    def _capture(self, graph: "EmulatedGraph", pool: object = None, stream: object = None) -> Iterator[None]:
        self.capture_streams.append(stream)
        yield


class EmulatedStream:
    def __init__(self, device: object) -> None:
        self.device = device

    def wait_stream(self, other: "EmulatedStream") -> None:
        """Emulated work is done at once."""


class EmulatedGraph:
    def replay(self) -> None:
        """What was captured is returned again."""


def graphed(model: Any, patch: pytest.MonkeyPatch) -> tuple[RowModel, EmulatedCuda]:
    """A model that captures its steps as on a GPU."""
    emulated = EmulatedCuda(patch)
    rows = RowModel(model, 2, 64)
    rows._graphs, rows._resources = {}, batch_model._GraphResources(model.device)
    return rows, emulated


@contextmanager
def efficient_attention(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention whose output lies in memory as (batch, width, heads, size): the memory-efficient kernel's layout."""
    compute: Callable[..., torch.Tensor] = functional.scaled_dot_product_attention

    def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return compute(*tensors, **options).transpose(1, 2).contiguous().transpose(1, 2)

    with patch.context() as inside:
        inside.setattr(functional, "scaled_dot_product_attention", attend)
        yield


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("width", [1, 5])
def test_emulated_attention_kernels_may_lay_out_their_output(
    tiny_folders: dict[str, Path], architecture: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped heads give the same logits whatever the kernel's strides."""
    model = loader.load(str(tiny_folders[architecture]), dtype="float32", device="cpu").model
    tokens = torch.arange(2 * width).view(2, width) + 20
    positions = torch.arange(width).expand(2, -1)
    with torch.inference_mode():
        expected = RowModel(model, 2, 64).step(tokens, positions, width, keep=width)
        with efficient_attention(monkeypatch):
            logits = RowModel(model, 2, 64).step(tokens, positions, width, keep=width)
    torch.testing.assert_close(logits, expected)


def test_emulated_captures_share_one_stream_of_the_models_device(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture on the current device's stream would record nothing of a model elsewhere."""
    model = loader.load(str(tiny_folders["llama"]), dtype="float32", device="cpu").model
    rows, emulated = graphed(model, monkeypatch)
    with torch.inference_mode():
        for width in (3, 1, 2):
            rows.step(torch.zeros(2, width, dtype=torch.long), torch.arange(width).expand(2, -1), width, keep=width)
    assert [stream.device for stream in emulated.streams] == [model.device]
    assert emulated.capture_streams == emulated.streams * 3


def test_emulated_graphs_keep_one_buffer_of_logits(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the widest step, others keep no memory of their own."""
    model = loader.load(str(tiny_folders["llama"]), dtype="float32", device="cpu").model
    rows, _ = graphed(model, monkeypatch)
    with torch.inference_mode():
        outputs = [
            rows.step(torch.zeros(2, width, dtype=torch.long), torch.arange(width).expand(2, -1), width, keep=width)
            for width in (5, 3, 1)
        ]
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == 1


def test_emulated_host_syncs_are_refused_before_a_capture(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a model is stepped without graphs, which is logged; the debug mode is as before."""
    model = loader.load(str(tiny_folders["llama"]), dtype="float32", device="cpu").model
    rows, emulated = graphed(model, monkeypatch)
    forward = rows._forward

    def waits(*arguments: Any) -> torch.Tensor:
        if emulated.sync_modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return forward(*arguments)

    rows._forward = waits
    with torch.inference_mode():
        logits = rows.step(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long), 1)
    assert logits.shape == (2, 1, 300)
    assert emulated.capture_streams == []
    assert emulated.sync_modes[-1] == 0
    assert "without CUDA graphs" in caplog.text
