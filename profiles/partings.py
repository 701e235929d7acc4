"""Whether greedy outputs of different setups are the target's own: decoding with a draft must lose nothing.

Compares tokens; runs no model.
"""

from collections.abc import Callable, Sequence

from profiles.errors import EngineError
from profiles.terms import Model, Setup, TargetTrace

NEAR_TIE = 1e-4  # greedy float32 outputs may part only where the two largest logits lie this close


def check_partings(
    target: Model, setups: Sequence[Setup], outputs: Sequence[Sequence[int]], traced: Callable[[], TargetTrace]
) -> None:
    """Greedy outputs of one prompt must equal the target's trace, but for near-ties; 16-bit types are left alone.

    The target is `traced` only where outputs differ. Raises EngineError when one parts where the target was sure:
    decoding would not be lossless.
    """
    if target.dtype != "float32" or all(output == outputs[0] for output in outputs):
        return
    trace = traced()
    for setup, output in zip(setups, outputs, strict=True):
        pairs = enumerate(zip(trace.token_ids, output, strict=False))
        place = next((index for index, (ours, theirs) in pairs if ours != theirs), None)
        if place is not None and trace.logit_gaps[place] > NEAR_TIE:
            raise EngineError(
                f"{setup.name} parted from plain decoding at token {place} of prompt {trace.prompt_digest} where the "
                f"two largest logits are {trace.logit_gaps[place]:.2g} apart; allowed are partings under {NEAR_TIE:g}"
            )
