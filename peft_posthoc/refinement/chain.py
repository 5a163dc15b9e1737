"""A causal language model as a chain: what comes before its blocks, the blocks one by one, what comes after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_posthoc.errors import PosthocError, one_line
from peft_posthoc.running.empty import Weights
from peft_posthoc.running.live import Live
from peft_posthoc.texts.sequences import Batch


class Call(NamedTuple):
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states that it reads."""
        found: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def on(self, hidden: Tensor) -> Call:
        """The same on other hidden states."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": hidden})


class _Enough(Exception):
    """The rest of a model need not run."""


class _Apart(Exception):
    """A block does not read what the one before it gave."""


class Chain:
    """A causal language model, run a stretch at a time.

    Which arguments each block gets, and what happens before and after them, is the model's own code: it runs with
    blocks that pass on what they are given.

    Args:
        model: transformers', or PEFT's around it.
        device: Where it computes.
        weights: What is read while it is needed, of a model without weights.

    Raises:
        PosthocError: It has no list of blocks.
    """

    def __init__(self, model: Any, device: torch.device, weights: Weights | None = None) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.blocks = blocks_of(self.model)
        self._device, self._weights = device, weights
        self._tuples = False
        """Whether a block's hidden states are the first of several things that it gives."""

    def held(self, index: int) -> AbstractContextManager[object]:
        """Keep the weights of a block in memory; those of what comes before the first for -1, and behind the last."""
        if self._weights is None:
            return nullcontext()
        ends = {-1: self.model.get_input_embeddings(), len(self.blocks): self.model.get_output_embeddings()}
        return self._weights.held(ends[index] if index in ends else self.blocks[index])

    def rest_held(self) -> AbstractContextManager[object]:
        """Keep the weights of all else in memory: norms, tables of positions."""
        if self._weights is None:
            return nullcontext()
        but = [self.blocks, self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        return self._weights.held(self.model, but=but)

    @property
    def width(self) -> int:
        """Features of an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def enter(self, batch: Batch) -> Tensor:
        """The hidden states that the first block reads."""
        return self._with_ids(batch)[0].hidden

    def check(self, batch: Batch) -> None:
        """See that the model is a chain.

        Raises:
            PosthocError: Its blocks do not run one after the other, or read something of the tokens but hidden states.
        """
        for call, again in zip(self._with_ids(batch), self._without_ids(batch), strict=True):
            if not _alike((call.args[1:], call.kwargs), (again.args[1:], again.kwargs), call.hidden, again.hidden):
                raise PosthocError(
                    f"The blocks of {type(self.model).__name__} read more of the tokens than hidden states; `distil` "
                    "refines it as a whole."
                )

    def through(self, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        """The hidden states behind a block, of those before it."""
        call = self._without_ids(batch)[index].on(hidden)
        given = self.blocks[index](*call.args, **call.kwargs)
        self._tuples = isinstance(given, tuple)
        found: Tensor = given[0] if self._tuples else given
        return found

    def leave(self, hidden: Tensor) -> Tensor:
        """The logits of tokens, of their hidden states behind the last block: `tokens x vocabulary`."""
        last = hidden[None]

        def passing(index: int, call: Call) -> Tensor:
            return last if index == len(self.blocks) - 1 else call.hidden

        with self._in_place(passing):
            logits: Tensor = self.model(inputs_embeds=self._nothing(1, len(hidden)), use_cache=False).logits
        return logits[0]

    def _with_ids(self, batch: Batch) -> list[Call]:
        return self._calls(input_ids=batch.ids.to(self._device), attention_mask=batch.mask.to(self._device))

    def _without_ids(self, batch: Batch) -> list[Call]:
        """What each block is called with, but for hidden states: the embeddings are not asked."""
        nothing = self._nothing(*batch.ids.shape)
        return self._calls(inputs_embeds=nothing, attention_mask=batch.mask.to(self._device))

    def _nothing(self, *shape: int) -> Tensor:
        """What the embeddings may have given."""
        weight = self.model.get_input_embeddings().weight
        return torch.zeros(*shape, self.width, dtype=weight.dtype, device=self._device)

    def _calls(self, **inputs: Tensor) -> list[Call]:
        odd: Exception | None = None
        for tuples in (self._tuples, not self._tuples):
            self._tuples, calls = tuples, list[Call]()

            def passing(index: int, call: Call, calls: list[Call] = calls) -> Tensor:
                if index != len(calls) or (calls and call.hidden is not calls[-1].hidden):
                    raise _Apart
                calls.append(call)
                if len(calls) == len(self.blocks):
                    raise _Enough
                return call.hidden

            try:
                with suppress(_Enough, _Apart), self._in_place(passing):
                    self.model(**inputs, use_cache=False)
            except (TypeError, ValueError) as error:  # As where a model takes several things from a block.
                odd = error
            if len(calls) == len(self.blocks):
                return calls
        why = "" if odd is None else f" ({one_line(odd)})"
        raise PosthocError(
            f"The blocks of {type(self.model).__name__} do not run one after the other{why}; `distil` refines it as a "
            "whole."
        ) from odd

    @contextmanager
    def _in_place(self, passing: Callable[[int, Call], Tensor]) -> Iterator[None]:
        """The model with something else in place of each block."""

        def forward(index: int) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                hidden = passing(index, Call(args, kwargs))
                return (hidden,) if self._tuples else hidden

            return run

        for index, block in enumerate(self.blocks):
            block.forward = forward(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def chains_of(live: Live) -> tuple[Chain, Chain]:
    """Both models, to run a stretch at a time.

    Raises:
        PosthocError: One is no chain, or they have other stretches.
    """
    mine, theirs = live.weights
    where = live.tuned.device if theirs is None else live.device
    chains = Chain(live.adapted, live.device, mine), Chain(live.tuned, where, theirs)
    base, tuned = (f"{len(chain.blocks)} blocks of {chain.width} features" for chain in chains)
    if base != tuned:
        raise PosthocError(
            f"The base has {base}, and the tuned model {tuned}; `distil`, which compares logits alone, refines it."
        )
    return chains


@torch.no_grad()
def check_chains(live: Live) -> None:
    """See on a few tokens that both models can be run a stretch at a time.

    Raises:
        PosthocError: One cannot.
    """
    ids = torch.arange(min(live.vocabulary, 8))[None]
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids))
    for chain in chains_of(live):
        with chain.rest_held(), chain.held(-1):
            chain.check(batch)


def blocks_of(model: Any) -> nn.ModuleList:
    """The list of a language model's blocks: as many as its configuration says.

    Raises:
        PosthocError: There is none.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = model.get_decoder() or model
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise PosthocError(f"{type(model).__name__} has no list of {count} blocks; `distil` refines it as a whole.")


def _alike(one: Any, other: Any, hidden: Tensor, again: Tensor) -> bool:
    """Whether two blocks are called with the same, but for hidden states."""
    if one is hidden:
        return other is again
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key], hidden, again) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(_alike(a, b, hidden, again) for a, b in zip(one, other, strict=True))
    return True
