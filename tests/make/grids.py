"""Weights rounded to a grid by hand, and checkpoints that say so: what is known of their error is known exactly."""

from peft_posthoc.checkpoints.memory import InMemory


def rounded(weight, *, bits=4, group=32):
    """A weight on a symmetric grid of one scale for each group of a row, and the grid's step at each value."""
    groups = weight.reshape(weight.shape[0], -1, group)
    most = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / most
    codes = (groups / scale).round().clamp(-most - 1, most)
    return (codes * scale).reshape(weight.shape), scale.expand_as(groups).reshape(weight.shape)


class OnGrid(InMemory):
    """Tensors in memory, all matrices rounded."""

    def __init__(self, tensors, *, label, **how):
        made = {
            name: rounded(tensor, **how) if tensor.ndim == 2 else (tensor, None) for name, tensor in tensors.items()
        }
        super().__init__({name: value for name, (value, _) in made.items()}, label=label)
        self._steps = {name: steps for name, (_, steps) in made.items()}

    def steps(self, name):
        return self._steps[name]

    def coded_as(self, name):
        return None if self._steps[name] is None else "a grid"
