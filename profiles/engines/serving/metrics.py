"""Counters of speculative decoding that servers publish under `/metrics`; vLLM and llama.cpp share their names.

vLLM's `num_drafts` counts rounds that proposed something.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Self

from profiles.engines.serving.logs import one_line
from profiles.records.errors import EngineError

VLLM, LLAMA_CPP = "vllm:", "llamacpp:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Running totals of a server: rounds that drafted, tokens drafted, tokens accepted, and those by position."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()

    def __sub__(self, earlier: Self) -> "Counters":
        """What the server counted since `earlier`."""
        before = earlier.accepted_by_position
        padded = before + (0,) * (len(self.accepted_by_position) - len(before))
        return Counters(
            num_drafts=self.num_drafts - earlier.num_drafts,
            num_draft_tokens=self.num_draft_tokens - earlier.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens - earlier.num_accepted_tokens,
            accepted_by_position=tuple(now - then for now, then in zip(self.accepted_by_position, padded, strict=True)),
        )


def read_counters(base_url: str, prefix: str, timeout_s: float = 10.0) -> Counters:
    """The counters that a server publishes now. Raises EngineError: no such page, or as `counters_of`."""
    from profiles.engines.serving.http_load import fetch

    return counters_of(fetch(f"{base_url}/metrics", timeout_s), prefix)


def counters_of(text: str, prefix: str) -> Counters:
    """The counters in a page in Prometheus' text form; 0 where the server has counted nothing yet.

    `prefix`: `vllm:` or `llamacpp:`. Values of several engines behind one server are added. Raises EngineError: no such
    page, or nothing with that prefix in it.
    """
    from prometheus_client.parser import text_string_to_metric_families

    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise EngineError(f"metrics cannot be read: {one_line(str(error)) or type(error).__name__}") from error
    if not any(sample.name.startswith(prefix) for sample in samples):
        raise EngineError(f"metrics have nothing that starts with {prefix!r}: were they switched on?")
    totals: Counter[str] = Counter()
    by_position: Counter[int] = Counter()
    for sample in samples:
        name = sample.name.removeprefix(f"{prefix}spec_decode_").removesuffix("_total")
        if name == sample.name or not math.isfinite(sample.value):
            continue
        if name == "num_accepted_tokens_per_pos":
            position = sample.labels.get("position", "")
            if not position.isdecimal():
                raise EngineError(f"metrics have position {position!r}: a whole number is needed")
            by_position[int(position)] += int(sample.value)
        else:
            totals[name] += int(sample.value)
    return Counters(
        num_drafts=totals["num_drafts"],
        num_draft_tokens=totals["num_draft_tokens"],
        num_accepted_tokens=totals["num_accepted_tokens"],
        accepted_by_position=tuple(by_position[position] for position in range(max(by_position, default=-1) + 1)),
    )
