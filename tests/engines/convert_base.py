"""llama.cpp's own converter of a model without a tokenizer: `python convert_base.py MODEL OUT`.

Runs with llama.cpp's `conversion` package and `gguf-py` on the path.
"""

import sys
from pathlib import Path

import gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # ty: llama.cpp's
from conversion.base import TextModel


def _no_vocabulary(self: TextModel) -> None:
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


folder, out = Path(sys.argv[1]), Path(sys.argv[2])
hparams = ModelBase.load_hparams(folder, False)
model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
model_class.set_vocab = _no_vocabulary
model_class(folder, gguf.LlamaFileType.ALL_F32, out).write()
