"""The records that every layer shares: models, drafts, setups, prompts, workloads, environments.

Records are frozen and validate on creation; they hold raw counts and times, never rates. Units are the last word of a
name. Standard library only: serving code imports this.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, get_args

from profiles.records.errors import require

DraftKind = Literal["model", "ngram", "early_exit", "composite", "native"]
DRAFT_KINDS: tuple[DraftKind, ...] = get_args(DraftKind)
VLLM_METHODS = ("eagle", "eagle3", "mtp", "dflash", "dspark", "suffix")  # native drafts written without `native:`
DTYPES = ("float32", "bfloat16", "float16")
CATCH_UP_WIDTHS = (2, 4, 8, 16, 32, 64)  # of a draft model's first step of a round; wider ones are several of the last
LOOKUP_LENGTH = 8  # the most tokens that the look-up of a composite drafts where the model drafts in every round (vLLM)
GREEDY_BELOW = 1e-5  # temperatures below are 0, as in vLLM: a quotient of logits by them overflows
DECODING_VERSION = 1  # raised when the torch engine would emit or accept other tokens for the same workload


def digest_of(value: object) -> str:
    """Hex SHA-256 (32 digits) of the canonical JSON of `value`: the same value gives the same digest anywhere."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def native_name(method: str, model: str | None) -> str:
    """How a native draft is written: `eagle3:PATH`, `mtp`; `native:METHOD+PATH` where vLLM has no such method."""
    if method.partition(",")[0] in VLLM_METHODS:
        return method if model is None else f"{method}:{model}"
    return f"native:{method}" if model is None else f"native:{method}+{model}"


def all_finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval; `low <= estimate <= high`."""

    estimate: float
    low: float
    high: float

    def __post_init__(self) -> None:
        require(all_finite((self.estimate, self.low, self.high)), f"interval {self} is not finite")
        require(self.low <= self.estimate <= self.high, f"interval {self} is not in order")

    def __format__(self, spec: str) -> str:
        """`1.60 [1.55, 1.65]`; `spec` is that of the three numbers."""
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True, kw_only=True)
class Model:
    """Weights as they are run: `digest` covers the weight and config files, `dtype` the float type in memory."""

    name: str
    revision: str | None = None
    dtype: str
    digest: str
    num_params: int
    vocab_size: int | None = None  # rows of the embedding, padding included
    stored_type: str | None = None  # of a GGUF, as llama.cpp names it: Q4_K_M

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"dtype {self.dtype!r}: allowed are {', '.join(DTYPES)}")
        require(self.num_params > 0, f"model {self.name!r} has {self.num_params} parameters")

    @property
    def weights_type(self) -> str:
        """The type of the weights as people know it: a GGUF's own, else the float type."""
        return self.stored_type or self.dtype

    @cached_property
    def run_digest(self) -> str:
        """Identity of the model as it is run: weights and float type; a target's component digest."""
        return digest_of([self.digest, self.dtype])


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What proposes tokens; exactly the parameters of its kind are set. A `native` draft may have a model."""

    kind: DraftKind
    model: Model | None = None
    max_match: int | None = None
    min_match: int | None = None
    num_layers: int | None = None
    method: str | None = None  # of a native draft, alone or in a composite: as a serving engine names it

    def __post_init__(self) -> None:
        require(self.kind in DRAFT_KINDS, f"draft kind {self.kind!r}: allowed are {', '.join(DRAFT_KINDS)}")
        has_model, has_match = self.kind in ("model", "composite"), self.kind in ("ngram", "composite")
        is_native = self.kind == "native" or (self.kind == "composite" and self.method is not None)
        require(is_native or has_model == (self.model is not None), f"draft kind {self.kind!r} and its model disagree")
        require(is_native == bool(self.method), "only native drafts have a method")
        require((self.kind == "early_exit") == (self.num_layers is not None), "only early-exit drafts have layers")
        low, high = self.min_match, self.max_match
        if has_match:
            is_good = low is not None and high is not None and 1 <= low <= high
            require(is_good, f"ngram matches max={high},min={low}: allowed are 1 <= min <= max")
        else:
            require(low is None and high is None, f"draft kind {self.kind!r} has no n-gram matches")
        require(
            self.num_layers is None or self.num_layers >= 1,
            f"early-exit layers {self.num_layers}: at least 1 is needed",
        )

    @property
    def name(self) -> str:
        """The spelling the command line takes: a model's name, `eagle:PATH`, `ngram:max=4,min=2` or a `+` of two."""
        if self.kind == "composite":
            return "+".join(component.name for component in self.components)
        if self.method is not None:
            return native_name(self.method, None if self.model is None else self.model.name)
        if self.model is not None:
            return self.model.name
        if self.kind == "ngram":
            return f"ngram:max={self.max_match},min={self.min_match}"
        return f"early-exit:{self.num_layers}"

    @cached_property
    def digest(self) -> str:
        """Identity of what it proposes (for early exit: together with the target's digest)."""
        if self.kind == "composite":
            return digest_of([self.kind, *(component.digest for component in self.components)])
        if self.kind == "native":
            return digest_of([self.kind, self.method, None if self.model is None else self.model.run_digest])
        if self.model is not None:
            return digest_of([self.kind, self.model.digest, self.model.dtype])
        return digest_of([self.kind, self.max_match, self.min_match, self.num_layers])

    @property
    def components(self) -> tuple["Draft", ...]:
        """What is traced and timed on its own: of a composite its look-up and its model, else the draft itself."""
        if self.kind != "composite":
            return (self,)
        ngram = Draft(kind="ngram", max_match=self.max_match, min_match=self.min_match)
        return ngram, Draft(kind="model" if self.method is None else "native", model=self.model, method=self.method)

    @property
    def looks_up(self) -> bool:
        """Whether every round searches the text on the host."""
        return self.kind in ("ngram", "composite")

    @property
    def has_weights(self) -> bool:
        """Whether it needs weights of its own in memory."""
        return self.model is not None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A way to decode: `length` drafted tokens per round, 0 exactly when there is no draft (plain decoding).

    `stop_below`: a round stops drafting before a proposal whose largest draft probability is under it.
    """

    draft: Draft | None = None
    length: int = 0
    stop_below: float | None = None

    def __post_init__(self) -> None:
        good_length = self.length >= 1 if self.draft else self.length == 0
        require(good_length, f"speculation length {self.length}: 0 without a draft, at least 1 with one are allowed")
        good_stop = self.stop_below is None or (self.draft is not None and 0.0 < self.stop_below < 1.0)
        require(good_stop, f"stop_below {self.stop_below}: allowed are fractions between 0 and 1, with a draft")

    @property
    def name(self) -> str:
        """`plain`, or the draft and its length: `draft-code k=4`."""
        stop = "" if self.stop_below is None else f" stop<{self.stop_below:g}"
        return f"{self.draft.name} k={self.length}{stop}" if self.draft else "plain"

    @cached_property
    def digest(self) -> str:
        return digest_of([self.draft.digest if self.draft else None, self.length, self.stop_below])


PLAIN = Setup()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt as the target reads it: token ids after the chat template and after cutting."""

    domain: str
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        require(len(self.token_ids) > 0, f"a prompt of domain {self.domain!r} is empty")

    @cached_property
    def digest(self) -> str:
        """Identity of the tokens; the domain is a label and not part of it."""
        return digest_of(list(self.token_ids))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How text is decoded: the anchor (batch, context) and everything that shapes the target's output.

    `context_length` bounds prompt plus output tokens of a sequence. `seed` matters only when sampling.
    """

    batch_size: int = 1
    context_length: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    end_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch size {self.batch_size}: at least 1 is needed")
        require(self.max_new_tokens >= 2, f"max-new-tokens {self.max_new_tokens}: at least 2 are needed")
        beside = f"leaves no tokens for a prompt beside {self.max_new_tokens} new tokens"
        require(self.context_length > self.max_new_tokens, f"context {self.context_length} {beside}")
        require(0.0 <= self.temperature <= 10.0, f"temperature {self.temperature}: allowed are 0 (greedy) to 10")
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        require(0.0 < self.top_p <= 1.0, f"top-p {self.top_p}: allowed are fractions above 0, up to 1")
        require(self.top_k >= 0, f"top-k {self.top_k}: allowed are 0 (off) and up")

    @cached_property
    def sampling_digest(self) -> str:
        """Identity of the sampling distribution and its random numbers: all that acceptance depends on beside prompt
        and models.
        """
        rule, sampling = "greedy equality", [0.0]
        if self.temperature > 0.0:
            rule, sampling = "rejection sampling", [self.temperature, self.top_p, self.top_k, self.seed]
        return digest_of([DECODING_VERSION, rule, sampling, self.max_new_tokens, sorted(self.end_token_ids)])

    @cached_property
    def timing_digest(self) -> str:
        """Identity of a timed run beside prompt and setup: sampling and the batch."""
        return digest_of([self.sampling_digest, self.batch_size])


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine and the software that times are true for.

    `compute_capability` (`9.0`) and `memory_bandwidth_bytes_s` follow from the device: None where they are not known.
    `engine_options`: how a serving engine was started, as far as no other field says it and times depend on it; on a
    GPU the attention kernel of the torch engine.
    """

    device: str
    device_count: int
    memory_bytes: int
    driver: str | None
    cuda: str | None
    threads: int
    torch: str
    engine: str
    engine_version: str
    compute_capability: str | None = None
    memory_bandwidth_bytes_s: int | None = None
    engine_options: str | None = None

    @cached_property
    def digest(self) -> str:
        """Identity of machine and software; later fields count only where set, so that old evidence matches."""
        values = asdict(self)
        for trait in ("compute_capability", "memory_bandwidth_bytes_s"):  # they follow from the device
            del values[trait]
        if self.engine_options is None:
            del values["engine_options"]
        return digest_of(values)
