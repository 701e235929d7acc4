"""Spaces of setups: which there are, and how they are searched by forecasts."""

from dataclasses import replace

import pytest

from profiles.records.core import Draft, Setup
from profiles.records.errors import InputError
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, TARGET, FakeEngine, prompts
from tuner.forecast.evidence import gather
from tuner.forecast.forecaster import Forecaster
from tuner.search.space import Space, SpaceForecaster, point_setup, search_space

BOTH = Draft(kind="composite", model=DRAFT_A.model, max_match=4, min_match=2)
SPACE = Space(drafts=(DRAFT_A, NGRAM, BOTH), max_length=16)


def test_a_space_has_every_setup_once() -> None:
    setups = SPACE.setups()
    windows, stops = len(SPACE.windows), len(SPACE.stops)
    assert len(setups) == len(set(setups)) == 16 * (stops + windows + stops * windows)


def test_forecasts_of_a_space_are_those_of_the_forecaster_and_take_other_windows() -> None:
    evidence = gather(FakeEngine(), GREEDY, prompts(6), (1, 2, 4))
    forecaster = Forecaster(evidence, GREEDY, TARGET.run_digest)
    priced = SpaceForecaster(evidence, GREEDY, forecaster, 4)
    for setup in (Setup(draft=DRAFT_A, length=4), Setup(draft=DRAFT_A, length=2)):
        expected = forecaster.forecast(setup, evidence.prompts).speedup.estimate
        assert priced.speedup(setup, evidence.prompts) == pytest.approx(expected, rel=1e-6)
    assert priced.speedup(point_setup(NGRAM, 4, (3, 1), None), evidence.prompts) > 0.0


def test_a_space_is_searched_on_half_of_the_prompts_and_estimated_on_the_other() -> None:
    """Longer lengths are gathered while the best is the longest; an engine that times whole rounds is refused."""
    engine = FakeEngine(keep=0.97)
    rows = search_space(engine, GREEDY, prompts(8), (1, 2, 4), (None,))
    assert len(rows) == 20
    assert [row.speedup.estimate for row in rows] == sorted((row.speedup.estimate for row in rows), reverse=True)
    assert max(row.setup.length for row in rows) > 4
    with pytest.raises(InputError, match="batch 1"):
        search_space(engine, replace(GREEDY, batch_size=2), prompts(8), (1, 2), (None,))
    engine.capabilities = replace(engine.capabilities, times="rounds")
    with pytest.raises(InputError, match="only the torch engine"):
        search_space(engine, GREEDY, prompts(8), (1, 2), (None,))
