"""Random trees of all that models are made of each other by: no parent is wrong, and most are told."""

import random

import pytest

from peft_posthoc import whose
from tests.make import trees


class Tree:
    """Models by name; by name, those that each was made from, and those that hold the same values."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.models, self.parents = {"root": trees.model(seed)}, {"root": []}
        for at in range(8):
            self.grow(f"{at}", 1000 * seed + at + 1)

    def grow(self, name, seed):
        parents = self.random.sample(list(self.models), min(2, len(self.models)))
        of, how = self.models[parents[0]], self.random.choice(["tune", "tune", "lora", "merge", "int8", "again"])
        if how == "merge" and len(parents) == 2:
            made = {n: (of[n] + self.models[parents[1]][n].to(of[n])) / 2 for n in of}
        else:
            parents = parents[:1]
            made = {
                "tune": lambda: trees.tune(of, seed, self.random.choice([0.004, 0.01, 0.03])),
                "lora": lambda: trees.lora(of, seed, self.random.choice([2, 8, 16])),
                "int8": lambda: trees.int8({n: w.float() for n, w in of.items()}),
            }.get(how, lambda: {n: w.bfloat16() for n, w in of.items()})()
        self.models[name], self.parents[name] = made, parents

    def same(self, name):
        """It, and those that are it but for the type: int8 of int8, or what was saved again."""
        one = self.models[name]
        return {
            other
            for other, two in self.models.items()
            if all((w.bfloat16() == two[n].bfloat16()).float().mean() > 0.98 for n, w in one.items())
        }

    def above(self, name):
        return {name} | {up for parent in self.parents[name] for up in self.above(parent)}

    def others(self, name):
        """All that did not come from it."""
        found = [one for one in self.models if name not in self.above(one)]
        return self.random.sample(found, len(found))


@pytest.mark.parametrize("seed", range(20))
def test_no_parent_is_wrong_and_most_are_told(seed):
    tree, told = Tree(seed), 0
    for name in list(tree.models)[1:]:
        names = tree.others(name)
        found = whose(tree.models[name], [*(tree.models[one] for one in names), trees.model(10_000 + seed)])
        *rows, stranger = found.candidates
        assert stranger.kind == "unrelated"
        right = tree.same(name).union(*map(tree.same, tree.parents[name]))
        if found.base is not None:
            (base,) = (one for one, row in zip(names, rows, strict=True) if row.kind == found.reason)
            assert base in right, [(one, tree.parents[one], row.kind) for one, row in zip(names, rows, strict=True)]
            told += 1
    assert told
