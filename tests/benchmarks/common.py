"""What the benchmarks share: models and prompts that ship, runs beside their forecasts, and the last line in JSON."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
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


Loads = list[tuple[Workload, tuple[Prompt, ...]]]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's text as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def load_family(
    drafts: Sequence[str], *, composites: bool = False, device: str | None = None, **question: Any
) -> tuple[Bench, Loads]:
    """The target that ships with drafts by their names, and the workloads of a `Question` on the prompts that ship."""
    specs = [draft_spec.parse_draft(text) for text in drafts]
    bench = load.load(builtin.TARGET, draft_spec.with_composites(specs) if composites else specs, None, device)
    loads, _ = workloads.workloads(bench, Question(**question), [builtin.ALL_PROMPTS])
    return bench, loads


def family(num_prompts: int, max_new_tokens: int) -> tuple[Bench, Workload, tuple[Prompt, ...]]:
    """The engine with all drafts and composites, its workload, and `num_prompts` that ship, domain by domain."""
    bench, loads = load_family(DRAFTS, composites=True, lengths=LENGTHS, max_new_tokens=max_new_tokens)
    ((workload, prompts),) = loads
    return bench, workload, spread_over_domains(prompts, num_prompts)


def finish(document: Mapping[str, Any]) -> None:
    """Prints the document as the last line, with what a reader needs to judge the figures."""
    machine = {"cores": os.cpu_count(), "load_average": [round(value, 2) for value in os.getloadavg()]}
    sys.stdout.write(json.dumps({**document, "machine": machine}, allow_nan=False) + "\n")
