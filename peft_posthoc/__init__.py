"""Post-hoc LoRA extraction (PHLoRA, arXiv 2509.10971): two checkpoints in, a portable adapter and its account out.

The public names stand in `__init__.pyi`. Each is imported when it is first asked for: PyTorch takes a second, PEFT
several.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
