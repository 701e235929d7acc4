"""Counters of speculative decoding that servers publish under `/metrics`; vLLM and llama.cpp share their names.

vLLM's `num_drafts` counts rounds that proposed something.
"""

import math
from collections import Counter

from profiles.engines.serving.logs import one_line
from profiles.records.errors import EngineError

NAMES = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def read_counters(base_url: str, prefix: str, timeout_s: float = 10.0) -> Counter[str | int]:
    """The counters that a server publishes now. Raises EngineError: no such page, or as `counters_of`."""
    from profiles.engines.serving.http_load import fetch

    return counters_of(fetch(f"{base_url}/metrics", timeout_s), prefix)


def counters_of(text: str, prefix: str) -> Counter[str | int]:
    """The running totals in a page in Prometheus' text form, and under 0, 1 ... the tokens accepted at that position.

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
    totals: Counter[str | int] = Counter()
    for sample in samples:
        name = sample.name.removeprefix(f"{prefix}spec_decode_").removesuffix("_total")
        position = sample.labels.get("position", "")
        if name == "num_accepted_tokens_per_pos" and not position.isdecimal():
            raise EngineError(f"metrics have position {position!r}: a whole number is needed")
        key = int(position) if name == "num_accepted_tokens_per_pos" else name
        if (key in NAMES or isinstance(key, int)) and math.isfinite(sample.value):
            totals[key] += int(sample.value)
    return totals
