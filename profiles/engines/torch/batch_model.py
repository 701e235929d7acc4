"""A model over several rows at once: tokens at given positions in, logits out.

Runs any architecture through its transformers class, or through a leaner forward where one fits.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from profiles.engines.torch import llama_forward
from profiles.engines.torch.kv_cache import RowCache, TransformersCache, added_mask
from profiles.records.errors import ModelError
from profiles.timing.clock import Clock

MAX_PREFILL_BYTES = 2**30  # of copies, per model
_TOLERANCE = 2e-3  # of the largest logit, in float32; wrong masks or positions are off by far more

Forward = Callable[[torch.Tensor, RowCache, int], torch.Tensor]


class RowStepper(Protocol):
    """What decoding needs of a model."""

    @property
    def num_rows(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, reach: int, keep: int = 1, row: int | None = None
    ) -> torch.Tensor:
        """Logits (B, keep, V) after each of the last `keep` of `tokens` (B, width) at `positions` (B, width).

        `reach` is one more than the largest position; `row` is the only row to step, None for all.
        """
        ...

    def prefill(self, tokens: torch.Tensor, row: int) -> tuple[torch.Tensor, float]:
        """Logits (1, V) after `tokens` (1, width), with which the text of a row begins, and the seconds spared.

        These are what running the tokens took before, less what it took to copy their keys and values; below 0 where
        they were run, and copied for later.
        """
        ...


class _Prefill(NamedTuple):
    """Keys and values of a text, layer by layer, the logits after it, and the seconds that running it took."""

    cached: list[torch.Tensor]
    logits: torch.Tensor
    seconds: float

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.cached)


class RowModel:
    """A model with the cache of `num_rows` sequences of `capacity` tokens."""

    def __init__(self, model: PreTrainedModel, num_rows: int, capacity: int) -> None:
        self.num_rows = num_rows
        self.device = model.device
        self._cache = RowCache(num_rows, capacity, model.device)
        self._prefills: dict[tuple[int, ...], _Prefill] = {}  # of a single row, the least recently used first
        self._clock = Clock(str(model.device))
        self._is_warm = False
        self._forward: Forward = (
            llama_forward.LlamaForward(model, capacity)
            if llama_forward.fits(model)
            else _TransformersForward(model, self._cache)
        )
        if model.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every new shape, 0.4 s each

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, reach: int, keep: int = 1, row: int | None = None
    ) -> torch.Tensor:
        """See `RowStepper`."""
        self._cache.set_positions(positions, reach, row)
        return self._forward(tokens, self._cache, keep)

    def prefill(self, tokens: torch.Tensor, row: int) -> tuple[torch.Tensor, float]:
        """See `RowStepper`. Only a model of a single row keeps copies, up to a GiB, and not of its first prefill."""
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


class _TransformersForward:
    """Any architecture through its transformers class, with masks and positions made here."""

    def __init__(self, model: PreTrainedModel, cache: RowCache) -> None:
        self._model = model
        config = model.config.get_text_config(decoder=True)
        self._cache = TransformersCache(cache, config.num_hidden_layers)
        self._window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self._kinds = sorted(set(getattr(config, "layer_types", None) or ()))
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
        by_kind: dict[str, Callable[[], torch.Tensor]] = {
            "full_attention": cache.mask,
            "sliding_attention": lambda: cache.mask(window=self._window),
        }
        if not self._kinds:
            seen = {"all": cache.mask(window=self._window)}
        else:
            seen = {kind: by_kind[kind]() for kind in self._kinds}
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
