"""Put the repository root (for `samplers`) and this folder (for `problems`) on the path, after everything else.

After, because ComfyUI has a top-level module `nodes` too: tests that run ComfyUI do so in a process of its own.
"""
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other
