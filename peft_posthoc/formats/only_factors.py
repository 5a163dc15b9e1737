"""What readers of factors alone would pass over is refused."""

from __future__ import annotations

from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.errors import AdapterError
from peft_posthoc.text import asked


def only_factors(deltas: AdapterOnModel, who: str, *, convolutions: bool = False, biases: bool = False) -> None:
    """See that nothing but factors is in the file.

    Args:
        deltas: The adapter.
        who: The program that is to read it.
        convolutions: Whether it reads those of convolutions.
        biases: Whether it reads sums for the biases of modules with factors.

    Raises:
        AdapterError: There is something else, which that program does not read.
    """
    label = deltas.folder.label
    if deltas.whole:
        name = next(iter(deltas.whole))
        raise AdapterError(f"`{label}` holds `{name}` whole, which {who} does not read. Use `{asked('to', 'merged')}`.")
    if deltas.added:
        raise AdapterError(
            f"`{label}` adds to `{next(iter(deltas.added))}` by no factors, which {who} does not read. Use "
            f"`{asked('to', 'merged')}`."
        )
    if deltas.biases and not biases:
        raise AdapterError(
            f"`{label}` adds to the bias of `{deltas.biases[0]}` (`lora_bias`), which {who} does not read. Use "
            f"`{asked('to', 'merged')}`."
        )
    kernels = [name for name in deltas.names if deltas.slots[name].kind.kernel]
    if kernels and not convolutions:
        raise AdapterError(
            f"`{label}` has factors for the convolution `{kernels[0]}`, which {who} does not read. Use "
            f"`{asked('to', 'merged')}`."
        )
