"""The demo's task: drug notes in prose to JSON, with a score, after Medical Knowledge from Extracts (MKFE).

Every note is made up: names from syllables, the other facts from short lists. The test notes hold only names and only
(adjective, noun) pairs that no training note holds, so a right answer is read from the note, not remembered.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Facts = dict[str, str]


class Note(NamedTuple):
    """A note in prose and the facts a reader finds in it."""

    prose: str
    facts: Facts

    @property
    def answer(self) -> str:
        """The facts as the model is to write them."""
        return json.dumps(self.facts)


class Score(NamedTuple):
    """The two metrics that the paper gives for MKFE, each the mean over the notes, in [0, 1]."""

    keys: float
    """Share of the true keys that the answer has."""
    values: float
    """Share of the true facts that the answer has with exactly the true value: a missing key is a wrong value."""


class Pools(NamedTuple):
    """The values that one split of the notes draws from."""

    drugs: list[str]
    illnesses: list[str]
    effects: list[str]


NAME_PARTS = (
    ("Al", "Be", "Ca", "Do", "El", "Fa", "Go", "Im", "Lu", "Mo", "Ni", "Or", "Pa", "Ri", "Sa", "To", "Vo", "Za"),
    ("bra", "cy", "do", "fe", "li", "lo", "mi", "na", "pri", "ra", "ro", "si", "ta", "ti", "ve", "xo"),
    ("bin", "cor", "dine", "fen", "lol", "mab", "nib", "pam", "pril", "stat", "tide", "vir", "zole", "zine"),
)
ILLNESS = (
    ("acute", "chronic", "early", "late", "mild", "rare", "severe", "viral"),
    ("anemia", "asthma", "cancer", "fever", "gout", "infection", "migraine", "pain", "stroke", "ulcer"),
)
EFFECT = (
    ("brief", "cold", "dry", "heavy", "light", "slow", "strong", "weak"),
    ("breath", "cough", "eyes", "hands", "mouth", "pulse", "sleep", "skin", "sweat", "voice"),
)
UNITS = ("mg", "ml", "units")
ROUTES = ("mouth", "injection", "inhaler", "skin patch", "eye drops")

OPENINGS = (
    "{drug} is used for {treats}.",
    "Patients with {treats} were given {drug}.",
    "In a trial of {treats}, {drug} worked best.",
    "For {treats}, doctors choose {drug}.",
)
SENTENCES = {
    "dose": ("The dose is {dose} a day.", "Adults take {dose} at night.", "Start with {dose}."),
    "route": ("It is given by {route}.", "The route is by {route}.", "One takes it by {route}."),
    "effect": ("It may cause {effect}.", "Some report {effect}.", "A side effect is {effect}."),
}


def split_pools(rng: random.Random, test_share: float = 0.2) -> tuple[Pools, Pools]:
    """Two disjoint sets of values, for the training notes and for the test notes."""
    train, test = [], []
    for parts, separator in ((NAME_PARTS, ""), (ILLNESS, " "), (EFFECT, " ")):
        values = [separator.join(choice) for choice in itertools.product(*parts)]
        rng.shuffle(values)
        cut = int(test_share * len(values))
        test.append(values[:cut])
        train.append(values[cut:])
    return Pools(*train), Pools(*test)


def write_note(pools: Pools, rng: random.Random) -> Note:
    """One note: its drug and illness, and one to three more facts in any order."""
    values = {
        "drug": rng.choice(pools.drugs),
        "treats": rng.choice(pools.illnesses),
        "dose": f"{5 * rng.randint(1, 199)} {rng.choice(UNITS)}",
        "route": rng.choice(ROUTES),
        "effect": rng.choice(pools.effects),
    }
    told = rng.sample(sorted(SENTENCES), rng.randint(1, len(SENTENCES)))
    sentences = [rng.choice(OPENINGS), *(rng.choice(SENTENCES[key]) for key in told)]
    facts = {key: value for key, value in values.items() if key in ("drug", "treats", *told)}
    return Note(" ".join(sentences).format(**values), facts)


def notes(pools: Pools, seed: int) -> Iterator[Note]:
    """Notes without end, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield write_note(pools, rng)


def train_and_test(train: int, test: int, seed: int = 0) -> tuple[list[Note], list[Note]]:
    """The two splits of the task: as many notes as asked for, with no shared name, illness or side effect."""
    train_pools, test_pools = split_pools(random.Random(seed))
    return (
        list(itertools.islice(notes(train_pools, seed + 1), train)),
        list(itertools.islice(notes(test_pools, seed + 2), test)),
    )


def read_facts(answer: str) -> Facts:
    """What an answer says: no facts at all where it is not a JSON object."""
    try:
        facts = json.loads(answer)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def score(answers: Sequence[str], truth: Sequence[Note]) -> Score:
    """How much of the truth the answers hold."""
    keys = values = 0.0
    for answer, note in zip(answers, truth, strict=True):
        found = read_facts(answer)
        keys += len(found.keys() & note.facts.keys()) / len(note.facts)
        values += sum(found.get(key) == value for key, value in note.facts.items()) / len(note.facts)
    return Score(keys / len(truth), values / len(truth))
