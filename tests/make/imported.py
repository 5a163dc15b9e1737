"""What programs that tests start import; read once, by the process that those of `launched` are copies of."""

import accelerate
import peft
import torch
import transformers
from transformers import Trainer

import peft_posthoc
import peft_posthoc.cli.main

__all__ = ["Trainer", "accelerate", "peft", "peft_posthoc", "torch", "transformers"]
torch.set_num_threads(1)
