"""What a piece of PyTorch code does: its operations on large tensors, and the memory they need at most."""
from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Trace(TorchDispatchMode):
    """Counts, over tensors of at least `least` elements on `device`: operations that read one; bytes alive.

    Memory is what the traced code has made and still holds; views and in-place results are nothing new.
    """

    def __init__(self, least: int = 0, device: str = "cpu") -> None:
        super().__init__()
        self.least, self.device = least, device
        self.operations = self.alive = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        seen = [a for a in (*args, *(kwargs or {}).values()) if self._counts(a)]
        for part in args:
            seen += [a for a in part if self._counts(a)] if isinstance(part, (list, tuple)) else []
        made = [r for r in (result if isinstance(result, (list, tuple)) else [result]) if self._counts(r)]
        self.operations += bool(seen)
        for tensor in made:
            if all(tensor.untyped_storage()._cdata != a.untyped_storage()._cdata for a in seen):
                size = tensor.numel() * tensor.element_size()
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(tensor, self._gone, size)
        return result

    def _counts(self, value: object) -> bool:
        large = isinstance(value, torch.Tensor) and value.numel() >= self.least
        return large and value.device.type == self.device

    def _gone(self, size: int) -> None:
        self.alive -= size
