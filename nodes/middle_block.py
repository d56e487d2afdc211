"""What a U-Net's middle block said in its last call, for the conditional half of the batch."""
from __future__ import annotations

from typing import Any

from torch import Tensor

COND = 0  # in transformer_options["cond_or_uncond"]


class MiddleBlock:
    """Watches the middle block while it is entered. A forward hook sees the block; a wrapper of the model sees the order of
    the batch: ComfyUI calls it with all conds at once, or with one after the other."""

    def __init__(self, patcher: Any) -> None:
        self.network = patcher.model.diffusion_model
        block = getattr(self.network, "middle_block", None)
        self.last = block[-1] if block else None  # ComfyUI iterates over the container: a hook on itself would never be called
        self.seen: Tensor | None = None
        self.hooks: list[Any] = []

    @property
    def exists(self) -> bool:
        return self.last is not None

    def features(self) -> Tensor | None:
        """[B, C, H, W] of the last evaluation."""
        return self.seen

    def __enter__(self) -> MiddleBlock:
        if self.exists:
            self.hooks = [self.network.register_forward_pre_hook(self._order, with_kwargs=True),
                          self.last.register_forward_hook(self._look)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _order(self, module: Any, args: tuple, kwargs: dict) -> None:
        options = kwargs.get("transformer_options") or {}
        self.order = options.get("cond_or_uncond", [COND])

    def _look(self, module: Any, args: tuple, output: Tensor) -> None:
        if COND in self.order:
            self.seen = output.chunk(len(self.order))[self.order.index(COND)].detach()
