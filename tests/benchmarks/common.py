"""What the benchmarks share: the family that ships, a few prompts of every domain, and the last line in JSON."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiles import builtin
from profiles.engines import workloads
from profiles.engines.bench import Bench, Question
from profiles.engines.torch import load
from profiles.records import draft_spec
from profiles.records.core import Prompt, Workload
from tuner.forecast.queues import spread_over_domains

DATA = Path(__file__).parent / "data"
DRAFTS = (*builtin.DRAFTS, "ngram")
LENGTHS = tuple(range(1, 9))


def family(num_prompts: int, max_new_tokens: int) -> tuple[Bench, Workload, tuple[Prompt, ...]]:
    """The engine with all drafts and composites, its workload, and `num_prompts` that ship, domain by domain."""
    specs = draft_spec.with_composites([draft_spec.parse_draft(text) for text in DRAFTS])
    bench = load.load(builtin.TARGET, specs, None, None)
    question = Question(lengths=LENGTHS, max_new_tokens=max_new_tokens)
    ((workload, prompts),), _ = workloads.workloads(bench, question, [builtin.ALL_PROMPTS])
    return bench, workload, spread_over_domains(prompts, num_prompts)


def finish(document: Mapping[str, Any]) -> None:
    """Prints the document as the last line, with what a reader needs to judge the figures."""
    machine = {"cores": os.cpu_count(), "load_average": [round(value, 2) for value in os.getloadavg()]}
    sys.stdout.write(json.dumps({**document, "machine": machine}, allow_nan=False) + "\n")
