"""What a U-Net's middle block said in its last call, for the conditional half of the batch."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COND = 0  # in transformer_options["cond_or_uncond"]


class MiddleBlock:
    """Watches the middle block while it is entered. A forward hook sees the block; another the order of the
    batch: ComfyUI calls the model with all conds at once, one after the other, or each on its own device."""

    def __init__(self, patcher: Any) -> None:
        copies = [patcher, *patcher.get_additional_models_with_key("multigpu")]
        self.networks = [copy.model.diffusion_model for copy in copies]
        self.seen: Tensor | None = None
        self.parts: list[Tensor] = []
        self.hooks: list[Any] = []

    @property
    def exists(self) -> bool:
        return bool(getattr(self.networks[0], "middle_block", None))

    def features(self) -> Tensor | None:
        """[B, C, H, W] of the last evaluation, in however many calls it was made."""
        return torch.cat(self.parts) if self.parts else self.seen

    def begin(self) -> None:
        """An evaluation begins that is made in several calls."""
        self.parts = []

    def keep(self, count: int) -> None:
        """A call was made, of which the first `count` images belong to the evaluation."""
        if self.seen is not None:
            self.parts.append(self.seen[:count].to(self.parts[0].device if self.parts else self.seen.device))

    def __enter__(self) -> MiddleBlock:
        if self.exists:
            self.hooks = [hook for network in self.networks for hook in self._watch(network)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _watch(self, network: torch.nn.Module) -> list[Any]:
        """The hooks on one copy of the model; copies may be called at the same time."""
        order = [COND]

        def called(module: Any, args: tuple, kwargs: dict) -> None:
            order[:] = (kwargs.get("transformer_options") or {}).get("cond_or_uncond", [COND])

        def look(module: Any, args: tuple, output: Tensor) -> None:
            if COND in order:
                self.seen = output.chunk(len(order))[order.index(COND)].detach()

        last = network.middle_block[-1]  # ComfyUI iterates over the container: a hook on that is never called
        return [network.register_forward_pre_hook(called, with_kwargs=True), last.register_forward_hook(look)]
