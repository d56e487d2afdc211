"""The numbers that make a U-Net a tiny emoji; the loader and the trainer share them."""
import torch

IMAGE_CHANNELS = 3     # red, green, blue in -1..1: the U-Net works on pixels
MODEL_CHANNELS = 32
HEAD_CHANNELS = 32
NANO_CHANNELS = 16     # of the nano emoji, and of its heads
CONTEXT_DIM = 128      # length of a word's vector
TOKENS = 8             # words the network was trained to see at once
GROUP_CHANNELS = 8     # channels a GroupNorm group has


def narrow_groups(network: torch.nn.Module) -> None:
    """Give every GroupNorm of `network` groups of GROUP_CHANNELS channels.

    ComfyUI's UNetModel always has 32 groups. With 32 channels that is one channel a group, which takes the
    mean of every channel away: the network could not tell a red picture from a blue one.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = module.num_channels // GROUP_CHANNELS


def narrow(operations: type) -> type:
    """ComfyUI's `operations` with such groups from the start: a network of theirs may have less than 32
    channels."""
    class Narrow(operations):
        class GroupNorm(operations.GroupNorm):
            def __init__(self, num_groups: int, num_channels: int, **how) -> None:
                super().__init__(num_channels // GROUP_CHANNELS, num_channels, **how)

    return Narrow
