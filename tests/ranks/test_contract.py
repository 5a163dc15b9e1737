"""The same laws for every rank rule, on spectra of which more and more is known."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_posthoc.linalg.noise import Noise, white
from peft_posthoc.linalg.spectrum import Spectrum, in_advance
from peft_posthoc.ranks import rules, weighting
from peft_posthoc.ranks.budget import budget
from peft_posthoc.ranks.rules import above_noise, fixed, keep_energy, keep_error, limited, several
from peft_posthoc.ranks.spelling import flags, parse, spell

RULES = [
    fixed(1),
    fixed(5),
    fixed(10**6),
    keep_energy(0.5),
    keep_energy(1.0),
    keep_error(0.0),
    keep_error(0.3),
    above_noise(),
    limited(keep_energy(0.9), most=4),
    limited(above_noise(), least=3),
    limited(fixed(5), multiple=4),
    limited(keep_error(0.1), most=16, least=2, multiple=8),
    several((("low", fixed(2)), ("high", fixed(7)))),
    several((("rank", fixed(2)), ("energy", keep_energy(0.9)))),
]
# What a command line leaves as text.
TEXTS = ("rank", "energy", "error", "budget", "weighting")
sides = st.integers(1, 12)


@st.composite
def spectra(draw):
    """All of a spectrum: any values, equal ones and zeros too, and noise that was measured or not."""
    m, n = draw(sides), draw(sides)
    values = draw(st.lists(st.sampled_from([0.0, 1e-6, 0.1, 1.0, 1.0, 3.0]), min_size=min(m, n), max_size=min(m, n)))
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    noise = Noise(draw(st.sampled_from([0.0, 0.01, 1.0])), white(m, n)) if draw(st.booleans()) else None
    return Spectrum(s, float(s.square().sum()), (m, n), noise)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@given(spectrum=spectra())
def test_a_rank_lies_between_one_and_the_smaller_side(rule, spectrum):
    for known in range(len(spectrum.s) + 1):
        rank = rule(spectrum._replace(s=spectrum.s[:known]))
        assert isinstance(rank, int)
        assert 1 <= rank <= min(spectrum.shape)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@given(spectrum=spectra())
def test_an_answer_within_what_is_known_stays_and_who_asks_for_more_keeps_at_least_what_is_known(rule, spectrum):
    wanted = rule(spectrum)
    for known in range(len(spectrum.s) + 1):
        rank = rule(spectrum._replace(s=spectrum.s[:known]))
        assert rank == wanted if rank <= known else wanted >= known


@pytest.mark.parametrize("rule", RULES, ids=repr)
@given(spectrum=spectra())
def test_a_rank_that_is_known_in_advance_is_what_it_takes_of_any_spectrum(rule, spectrum):
    known = in_advance(rule)
    if known is not None:
        assert rule(spectrum) == min(known, *spectrum.shape)


def test_only_ranks_that_look_at_no_spectrum_are_known_in_advance():
    assert [rule for rule in RULES if in_advance(rule) is not None] == [
        *RULES[:3],
        limited(fixed(5), multiple=4),
        several((("low", fixed(2)), ("high", fixed(7)))),
    ]


BUDGETS = [budget("64MB"), budget("2%", most=64, least=4), budget(params=1000, weighting=None, multiple=8)]


@pytest.mark.parametrize("rule", [*RULES, *BUDGETS], ids=repr)
def test_a_rule_is_what_it_prints(rule):
    read = eval(repr(rule), {**vars(rules), **vars(weighting), "budget": budget})
    assert read == rule
    assert hash(read) == hash(rule)


@pytest.mark.parametrize("rule", [rule for rule in [*RULES, *BUDGETS] if not isinstance(rule, several)], ids=repr)
def test_a_rule_is_what_is_read_of_its_words(rule):
    assert parse(json.loads(json.dumps(spell(rule)))) == rule
    words = dict(zip(flags(rule)[::2], flags(rule)[1::2], strict=True))
    named = {option.removeprefix("--").replace("-", "_"): word for option, word in words.items()}
    assert parse({name: word if name in TEXTS else int(word) for name, word in named.items()}) == rule
