"""A model with the key/value cache of one sequence: ingest tokens, get logits, take tokens back.

The only module that touches the cache classes of transformers, whose `crop` changed meaning in 5.23 (a negative
count removes that many tokens in every version from 5.17 on). Knows nothing of drafts or rounds.
"""

import torch
from transformers import DynamicCache, PreTrainedModel


class CachedModel:
    """`length` tokens of one sequence are ingested; `step` adds some, `rollback` takes the last ones away."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache()
        self.length = 0

    def step(self, token_ids: list[int], keep: int) -> torch.Tensor:
        """Ingests `token_ids`; logits (keep, vocabulary) after each of the last `keep` of them."""
        tokens = torch.tensor([token_ids], device=self._model.device)
        output = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=keep)
        self.length += len(token_ids)
        logits: torch.Tensor = output.logits[0, -keep:]
        return logits

    def rollback(self, length: int) -> None:
        """Forgets all but the first `length` ingested tokens; no-op when there are no more than that."""
        if length < self.length:
            self._cache.crop(length - self.length)
            self.length = length
