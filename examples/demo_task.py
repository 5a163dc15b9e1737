"""The demo's task: bug reports in prose to JSON, scored as Medical Knowledge from Extracts (MKFE) is in the paper.

No (module, error) pair and no (adjective, noun) pair of a test report is in any training report: a right answer is read
from the report, not remembered.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from typing import NamedTuple

Facts = dict[str, str]
Pair = tuple[str, str]


class Report(NamedTuple):
    """A bug report in prose and the facts that a reader finds in it."""

    prose: str
    facts: Facts

    @property
    def answer(self) -> str:
        """The facts as the model is to write them."""
        return json.dumps(self.facts)


class Score(NamedTuple):
    """The two metrics that the paper gives for MKFE, each the mean over the reports, in [0, 1]."""

    keys: float
    """Share of the true keys that the answer has."""
    values: float
    """Share of the true facts that the answer has with exactly the true value: a missing key is a wrong value."""


class Pools(NamedTuple):
    """The pairs of values that one split of the reports draws from."""

    failures: list[Pair]  # module, error
    inputs: list[Pair]  # adjective, noun


MODULES = "copy http locale parser queue select signal socket ssl string struct test thread time token xml"
METHODS = "add close get open read send set write"
ERRORS = "AttributeError ImportError IndexError KeyError OSError RuntimeError TypeError ValueError"
ADJECTIVES = "closed default empty invalid long old second short"
NOUNS = "buffer file header key line name path value"
PLATFORMS = "Android Cygwin Linux Solaris Unix Windows"

OPENINGS = (
    "The {module} module raises {error}.",
    "There is an error in {module}: {error}.",
    "We get {error} when using {module}.",
    "Importing {module} ends with {error}.",
)
SENTENCES = {
    "input": ("It happens with some {input}.", "The input has one {input}.", "Try it on any {input}."),
    "platform": ("It was found on {platform}.", "The system is {platform}.", "Only {platform} is affected."),
    "method": ("The call was to {method}.", "It is {method} that fails.", "This is seen in {method} only."),
}


def split_pairs(left: str, right: str, rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """All pairs, four fifths of them for training and one fifth for the test."""
    pairs = list(itertools.product(left.split(), right.split()))
    rng.shuffle(pairs)
    cut = len(pairs) // 5
    return pairs[cut:], pairs[:cut]


def write_report(pools: Pools, rng: random.Random) -> Report:
    """One report: its module and error, and one to three more facts in any order."""
    module, error = rng.choice(pools.failures)
    values = {
        "module": module,
        "error": error,
        "input": " ".join(rng.choice(pools.inputs)),
        "platform": rng.choice(PLATFORMS.split()),
        "method": rng.choice(METHODS.split()),
    }
    told = rng.sample(sorted(SENTENCES), rng.randint(1, len(SENTENCES)))
    sentences = [rng.choice(OPENINGS), *(rng.choice(SENTENCES[key]) for key in told)]
    facts = {key: value for key, value in values.items() if key in ("module", "error", *told)}
    return Report(" ".join(sentences).format(**values), facts)


def train_and_test(train: int, test: int, seed: int = 0) -> tuple[list[Report], list[Report]]:
    """The two splits of the task: as many reports as asked for, from disjoint pairs."""
    rng = random.Random(seed)
    failures = split_pairs(MODULES, ERRORS, rng)
    inputs = split_pairs(ADJECTIVES, NOUNS, rng)
    train_pools, test_pools = (Pools(*pairs) for pairs in zip(failures, inputs, strict=True))
    return [write_report(train_pools, rng) for _ in range(train)], [write_report(test_pools, rng) for _ in range(test)]


def read_facts(answer: str) -> Facts:
    """What an answer says: no facts at all where it is not a JSON object."""
    try:
        facts = json.loads(answer)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def score(answers: Sequence[str], truth: Sequence[Report]) -> Score:
    """How much of the truth the answers hold."""
    keys = values = 0.0
    for answer, report in zip(answers, truth, strict=True):
        found = read_facts(answer)
        keys += len(found.keys() & report.facts.keys()) / len(report.facts)
        values += sum(found.get(key) == value for key, value in report.facts.items()) / len(report.facts)
    return Score(keys / len(truth), values / len(truth))
