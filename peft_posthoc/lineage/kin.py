"""Whether two models are kin, told from corners of weights that are read for something else."""

from __future__ import annotations

from torch import Tensor

from peft_posthoc.checkpoints.sample import FLAT, rounded_alike
from peft_posthoc.errors import MismatchError
from peft_posthoc.lineage.compared import cosine, on_grid
from peft_posthoc.text import asked

# Cosines of independent values are this many times their deviation at most; above what cosine that says nothing, as of
# few values; and how many values, of how many weights, make sure of it: embeddings and heads, which are read first, may
# be new in a fine-tune.
_CHANCE, _SAYS_NOTHING, _MANY, _WEIGHTS = 5.0, 0.25, 16_000, 8


class Kin:
    """What the corners of a base and a fine-tune have shown so far; no more than that is looked at."""

    def __init__(self, base: str, tuned: str, *, unrelated: bool) -> None:
        """Begin with nothing seen.

        Args:
            base: What messages call it.
            tuned: The same.
            unrelated: Take two models that have nothing in common.
        """
        self._base, self._tuned = base, tuned
        self._strange: list[int] | None = None if unrelated else []
        """Values of each weight with nothing in common; None once one has something."""
        self.seen = 0
        """Weights, of any shape."""
        self._weights, self._differ = 0, False
        self._copy: str | None = "copy"

    def see(self, base: Tensor | None, tuned: Tensor | None, *, coded: bool = False) -> None:
        """Look at a weight of both.

        Args:
            base: Before.
            tuned: After.
            coded: Whether one of them is decoded from codes: what that means is told elsewhere.

        Raises:
            MismatchError: All that was seen so far has nothing in common.
        """
        self.seen += 1
        if (self._strange is None and self._copy is None) or base is None or tuned is None:
            return
        if base.shape != tuned.shape or base.ndim != 2 or not (base.is_floating_point() and tuned.is_floating_point()):
            return
        before, after = (side[: FLAT[0], : FLAT[1]].cpu() for side in (base, tuned))
        self._weights += 1
        if self._strange is not None:
            self._are_strangers(before, after, self._strange)
        if self._copy is not None:
            self._differ = self._differ or not before.equal(after)
            if coded:
                self._copy = None
            elif not rounded_alike(after, before):
                self._copy = "quantised copy" if on_grid(after, before, None) else None

    def _are_strangers(self, before: Tensor, after: Tensor, strange: list[int]) -> None:
        x, y = before.double().flatten(), after.double().flatten()
        chance = _CHANCE / len(x) ** 0.5
        if chance > _SAYS_NOTHING or not (x.any() and y.any()):
            return
        if not abs(cosine(x, y)) <= chance:
            self._strange = None
            return
        strange.append(len(x))
        if sum(strange) >= _MANY and len(strange) >= _WEIGHTS:
            raise MismatchError(
                f"`{self._tuned}` is no fine-tune of `{self._base}`: the first {len(strange)} weights that were read "
                "have nothing in common. Give the model that it was made from (`phlora whose` tells which of several "
                f"is), or go on all the same with `{asked('unrelated', True)}`."
            )

    @property
    def doubt(self) -> str | None:
        """A question, where every weight that was seen is the base's but for rounding."""
        if self._copy is None or not self._differ:
            return None
        return (
            f"Is `{self._tuned}` a fine-tune of `{self._base}`? It looks like a {self._copy}: the corners of all "
            f"{self._weights} matrices that were read differ by rounding alone."
        )
