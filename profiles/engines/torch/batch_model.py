"""A model over several rows at once: tokens at given positions in, logits out, shapes fixed so that a GPU can replay.

Runs any architecture through its transformers class, or through a leaner forward where one fits.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from profiles.engines.torch import llama_forward
from profiles.engines.torch.attention import disable_cudnn, pack_heads
from profiles.engines.torch.kv_cache import RowCache, added_mask, transformers_cache
from profiles.records.draft_spec import MAX_LENGTH
from profiles.records.errors import ModelError
from profiles.timing.clock import Clock

SMALLEST_VIEW = 256  # slots
WIDEST_GRAPH = MAX_LENGTH + 1  # tokens a row: a round of the longest speculation length
MAX_PREFILL_BYTES = 2**30  # of copies, per model
_WARM_UPS = 3
_LOG = logging.getLogger(__name__)
_TOLERANCE = 2e-3  # of the largest logit, in float32; wrong masks or positions are off by far more

Forward = Callable[[torch.Tensor, RowCache, int], torch.Tensor]


class _Prefill(NamedTuple):
    """Keys and values of a text, layer by layer, the logits after it, and the seconds that running it took."""

    cached: list[torch.Tensor]
    logits: torch.Tensor
    seconds: float

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.cached)


class RowModel:
    """A model with the cache of `num_rows` sequences of `capacity` tokens; on a GPU, decoding steps are CUDA graphs."""

    def __init__(self, model: PreTrainedModel, num_rows: int, capacity: int) -> None:
        self.num_rows = num_rows
        self.device = model.device
        self.context_slots: int | None = None  # of the longest text to come, so that no other text changes a view
        self._cache = RowCache(num_rows, capacity, model.device)
        self._prefills: dict[tuple[int, ...], _Prefill] = {}  # of a single row, the least recently used first
        self._clock = Clock(str(model.device))
        self._is_warm = False
        self._forward: Forward = (
            llama_forward.LlamaForward(model, capacity)
            if llama_forward.fits(model)
            else _TransformersForward(model, self._cache)
        )
        devices = {parameter.device for parameter in model.parameters()}
        on_one_gpu = len(devices) == 1 and model.device.type == "cuda"
        self._graphs: dict[tuple[int, int, int], _Graph] | None = {} if on_one_gpu else None
        self._resources = _GraphResources(model.device) if on_one_gpu else None
        if model.device.type == "cuda":
            disable_cudnn()

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, reach: int, keep: int = 1, row: int | None = None
    ) -> torch.Tensor:
        """Logits (B, keep, V) after each of the last `keep` of `tokens` (B, width) at `positions` (B, width).

        `reach` is one more than the largest position; `row` is the only row to step, None for all. What a GPU returns
        is overwritten by the next step.
        """
        if self._graphs is None or row is not None or tokens.shape[1] > WIDEST_GRAPH:
            self._cache.set_positions(positions, reach, row)
            return self._forward(tokens, self._cache, keep)
        view = min(graph_view(reach), self.context_slots or self._cache.width)
        key = (tokens.shape[1], keep, view)
        if key not in self._graphs:
            assert self._resources is not None
            stream = torch.cuda.current_stream(self.device)
            try:
                step = functools.partial(self.step_in_view, view, keep)
                self._graphs[key] = _Graph(step, tokens, positions, self._resources)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a forward that waits for the device cannot be captured, but can be run
                _LOG.warning("steps run without CUDA graphs and are slower: %s", str(error).splitlines()[0][:200])
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
                self._graphs = None
                return self.step(tokens, positions, reach, keep)
        return self._graphs[key].replay(tokens, positions)

    def prefill(self, tokens: torch.Tensor, row: int) -> tuple[torch.Tensor, float]:
        """Logits (1, V) after `tokens` (1, width), with which the text of a row begins, and the seconds spared.

        These are what running the tokens took before, less what it took to copy their keys and values; below 0 where
        they were run, and copied for later. Only a model of a single row keeps copies, up to a GiB, and not of its
        first prefill.
        """
        began_s = self._clock.read()
        key = tuple(tokens[0].tolist())
        if (earlier := self._prefills.pop(key, None)) is not None:
            self._prefills[key] = earlier
            self._cache.restore_row(row, earlier.cached)
            return earlier.logits, earlier.seconds - (self._clock.read() - began_s)
        positions = torch.arange(len(key), device=self.device)[None]
        logits = self.step(tokens, positions, len(key), row=row)[:, 0].clone()
        ran_s = self._clock.read()
        if self.num_rows == 1 and self._is_warm:
            self._prefills[key] = _Prefill(self._cache.copy_row(row, len(key)), logits, ran_s - began_s)
            while sum(each.num_bytes for each in self._prefills.values()) > MAX_PREFILL_BYTES:
                self._prefills.pop(next(iter(self._prefills)))
        self._is_warm = True
        return logits, ran_s - self._clock.read()

    def step_in_view(self, view: int, keep: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A step of one shape for all texts of up to `view` tokens."""
        self._cache.set_positions(positions, view, exact=False)
        return self._forward(tokens, self._cache, keep)


def graph_view(reach: int) -> int:
    """Slots that a captured step sees: 256, 512, 1,024 ..., so that a time depends on the text and on few shapes."""
    return max(SMALLEST_VIEW, 1 << (reach - 1).bit_length())


class _GraphResources:
    """What the graphs of one model share: a stream on its device, a memory pool and the buffer of their logits."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self._buffer = torch.empty(0, device=device)

    def output_like(self, logits: torch.Tensor) -> torch.Tensor:
        """A view of the buffer in the shape of `logits`; a larger one replaces it when needed."""
        if self._buffer.numel() < logits.numel() or self._buffer.dtype != logits.dtype:
            self._buffer = torch.empty(logits.numel(), dtype=logits.dtype, device=logits.device)
        return self._buffer[: logits.numel()].view(logits.shape)


class _Graph:
    """A step captured once and replayed on its own inputs (torch.cuda.CUDAGraph).

    What a replay returns is overwritten by the next replay of any graph of the model. The capture is on the model's
    own device, whichever is the current one.
    """

    def __init__(
        self,
        step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        resources: _GraphResources,
    ) -> None:
        self._tokens, self._positions = tokens.clone(), positions.clone()
        current, stream = torch.cuda.current_stream(tokens.device), resources.stream
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # allocations and libraries settle before anything is captured
            for _ in range(_WARM_UPS - 1):
                step(self._tokens, self._positions)
            with _no_host_syncs():
                self._logits = resources.output_like(step(self._tokens, self._positions))
        current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=resources.pool, stream=stream):
            self._logits.copy_(step(self._tokens, self._positions))

    def replay(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._tokens.copy_(tokens)
        self._positions.copy_(positions)
        self._graph.replay()
        return self._logits


@contextlib.contextmanager
def _no_host_syncs() -> Iterator[None]:
    """Raises RuntimeError where the host waits for the device: refused here, a failing capture would corrupt state."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class _TransformersForward:
    """Any architecture through its transformers class, with masks and positions made here."""

    def __init__(self, model: PreTrainedModel, cache: RowCache) -> None:
        self._model = model
        config = model.config.get_text_config(decoder=True)
        self._cache = transformers_cache(cache, config.num_hidden_layers)
        if model.device.type == "cuda":
            pack_heads(model)
        self._window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self._kinds = sorted(set(getattr(config, "layer_types", None) or ("all",)))
        self._adds_mask = model.config._attn_implementation == "eager"

    def __call__(self, tokens: torch.Tensor, cache: RowCache, keep: int) -> torch.Tensor:
        output = self._model(
            tokens,
            past_key_values=self._cache,
            attention_mask=self._masks(cache),
            position_ids=cache.query_positions,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits[:, -keep:]
        return logits

    def _masks(self, cache: RowCache) -> torch.Tensor | dict[str, torch.Tensor]:
        windows = {"all": self._window, "full_attention": None, "sliding_attention": self._window}
        seen = {kind: cache.mask(window=windows[kind]) for kind in self._kinds}
        if self._adds_mask:
            seen = {kind: added_mask(mask, self._model.dtype) for kind, mask in seen.items()}
        return seen if len(seen) > 1 else next(iter(seen.values()))


def check_rows(model: PreTrainedModel, name: str) -> None:
    """Refuses an architecture that cannot be stepped in rows of unequal length; a few tiny forwards show it.

    Raises ModelError: its logits differ from those of its own plain forward.
    """
    try:
        with torch.inference_mode():
            reference, in_rows = _logits_both_ways(model)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(f"model {name!r}: {type(model).__name__} cannot be decoded in rows: {reason}") from error
    difference = float((in_rows - reference).abs().max() / reference.abs().max())
    allowed = _TOLERANCE if model.dtype == torch.float32 else 0.1
    if not difference <= allowed and bool(torch.isfinite(reference).all()):
        raise ModelError(
            f"model {name!r}: {type(model).__name__} in rows of unequal length gives other logits than alone (off by "
            f"{difference:.2g} of the largest, allowed is {allowed:g}), so it cannot be decoded here"
        )


def _logits_both_ways(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Last logits (2, V) of two short texts by the model's own forward, and stepped together in rows."""
    device, vocabulary = model.device, model.get_input_embeddings().num_embeddings
    texts = [[(7 * index + 3) % vocabulary for index in range(length)] for length in (5, 9)]
    rows = RowModel(model, len(texts), capacity=16)
    reference = torch.stack(
        [model(torch.tensor([text], device=device), use_cache=False).logits[0, -1] for text in texts]
    )
    for number, text in enumerate(texts):
        prompt = torch.tensor([text[:-2]], device=device)
        rows.step(prompt, torch.arange(len(text) - 2, device=device)[None], len(text) - 2, row=number)
    positions = torch.tensor([[len(text) - 2, len(text) - 1] for text in texts], device=device)
    last = torch.tensor([text[-2:] for text in texts], device=device)
    in_rows = rows.step(last, positions, max(map(len, texts)))[:, 0]
    return reference.float(), in_rows.float()
