"""A key/value cache of fixed shape with one length per row: tokens are written where their positions say.

Nothing is ever moved or cut: a token that was taken back is overwritten by the next one at its position, and until
then hidden by the mask, because a query sees only positions up to its own. The only module that touches the cache
classes of transformers (5.x).
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from profiles.models.footprint import SLOTS_STEP


class RowCache:
    """Keys and values of `num_rows` sequences, `capacity` tokens each, allocated once.

    `set_positions` says where the tokens of the next forward go; every layer then calls `write`. A position below 0,
    padding at the left end of a short row, goes to a slot of its own that nobody sees.
    """

    def __init__(self, num_rows: int, capacity: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self.width = -(-(capacity + 1) // SLOTS_STEP) * SLOTS_STEP  # slots of a row; the last one takes padding
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._key_positions = torch.arange(self.width, device=device)
        self._row_starts = torch.arange(num_rows, device=device)[:, None] * self.width
        self._slots = self._row_starts
        self._rows = slice(0, num_rows)
        self.view = 0
        self.needs_mask = True
        self.is_prompt = False
        self.query_positions = self._row_starts

    def set_positions(self, positions: torch.Tensor, view: int, row: int | None = None, *, exact: bool = True) -> None:
        """Tokens at `positions` (B, width) come next, of all rows or of one; `view` slots of a row are seen.

        `exact`: `view` ends with the last of the positions, so that a single token may see all of it.
        """
        self._rows = slice(0, self.num_rows) if row is None else slice(row, row + 1)
        slots = torch.where(positions < 0, self.width - 1, positions)
        self._slots = (slots + self._row_starts[self._rows]).flatten()
        self.query_positions = positions.clamp_min(0)
        self.view = view
        self.needs_mask = not exact or positions.shape != (1, 1)
        self.is_prompt = exact and row is not None and positions.shape[1] == view  # a text from its first token on

    def mask(self, window: int | None = None) -> torch.Tensor:
        """(B, 1, width, view) bool: the slots each query sees, of the last `window` ones."""
        queries, keys = self.query_positions[:, None, :, None], self._key_positions[: self.view]
        seen = keys <= queries
        if window is not None:
            seen = seen & (keys > queries - window)
        return seen

    def copy_row(self, row: int, length: int) -> list[torch.Tensor]:
        """The keys and values of the first `length` tokens of a row, layer by layer."""
        return [part[row, :length].clone() for part in self._parts()]

    def restore_row(self, row: int, copied: list[torch.Tensor]) -> None:
        """Puts back what `copy_row` returned, into a row of the same model."""
        for part, values in zip(self._parts(), copied, strict=True):
            part[row, : len(values)].copy_(values)

    def _parts(self) -> list[torch.Tensor]:
        stores = [store[layer] for layer in sorted(self._keys) for store in (self._keys, self._values)]
        return [store.view(self.num_rows, self.width, *store.shape[1:]) for store in stores]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (B, width, heads, head size) of a layer; returns all in view as (B, view, heads, head size)."""
        if layer not in self._keys:
            for store, new in ((self._keys, keys), (self._values, values)):
                store[layer] = new.new_zeros((self.num_rows * self.width, *new.shape[2:]))
        return self._put(self._keys[layer], keys), self._put(self._values[layer], values)

    def _put(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        store.index_copy_(0, self._slots, new.flatten(0, 1))
        return store.view(self.num_rows, self.width, *store.shape[1:])[self._rows, : self.view]


def added_mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to attention scores; every query sees its own slot, so no row of it is all minus infinity."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def transformers_cache(rows: RowCache, num_layers: int) -> Cache:
    """A `RowCache` as transformers' models take it."""
    return Cache(layers=[_Layer(rows, number) for number in range(num_layers)])


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of it; masks and positions are always given, so the sizes it reports are not used."""

    is_compileable = True
    is_sliding = False

    def __init__(self, rows: RowCache, number: int) -> None:
        super().__init__()
        self._rows = rows
        self._number = number
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Rows are allocated by their first write."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (B, heads, width, head size); returns all in view in that order."""
        keys, values = self._rows.write(self._number, key_states.transpose(1, 2), value_states.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self._rows.view, 0

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._rows.capacity

    get_max_cache_shape = get_max_length
