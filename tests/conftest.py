"""Put this folder (`problems`), the repository root (`samplers`) and dev/ (`measure`) on the path, after everything else.

After, because ComfyUI has a top-level module `nodes` too: tests that run ComfyUI do so in a process of its own.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT), str(ROOT / "dev")]
torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other
