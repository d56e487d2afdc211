"""What a piece of PyTorch code does: operations, their memory, and how often it waits for a device."""
from __future__ import annotations

import weakref
from typing import Callable, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
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


class Work(NamedTuple):
    """What a piece of code asks of a device: kernels launched, and times that the host waits for it."""

    launches: int
    waits: int


READS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
"""What reads a tensor and never passes the dispatcher on the CPU."""
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh",
             "promote_types", "resize_", "set_"}


class Operators(TorchDispatchMode):
    """On the CPU: operators that compute something stand for kernels, reads of a number for waits."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.waits += 1
        elif not function.is_view and name not in NO_KERNEL:
            self.launches += 1
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.waits += function in READS
        return function(*args, **(kwargs or {}))


def work(run: Callable[[], object], device: str) -> Work:
    """Of one run, whose own end is not waited for."""
    if device != "cuda":
        with Reads() as reads, Operators() as operators:
            run()
        return Work(operators.launches, operators.waits + reads.waits)
    activities = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as seen:
        run()
    names = [event.name for event in seen.events()]
    return Work(sum("LaunchKernel" in name or name.startswith(("cudaMemcpyAsync", "cudaMemsetAsync"))
                    for name in names), sum("Synchronize" in name or name == "cudaMemcpy" for name in names))
