"""The names and shapes of guided-diffusion's classifier (EncoderUNetModel with attention pooling), by its
published hyperparameters."""
from typing import Collection, Sequence


def layout(size: int, classes: int, width: int = 128, mults: Sequence[float] = (1, 1, 2, 3, 4),
           blocks: int = 2, attention: Collection[int] = (32, 16, 8), channels: int = 3, scales: bool = True,
           halving: str = "residual") -> dict[str, tuple[int, ...]]:
    """attention: at which sizes of the image; scales: use_scale_shift_norm; halving "residual" is
    resblock_updown, "convolution" is not."""
    shapes = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def residual(name: str, before: int, after: int) -> None:
        layer(f"{name}.in_layers.0", before)
        layer(f"{name}.in_layers.2", after, before, 3, 3)
        layer(f"{name}.emb_layers.1", (1 + scales) * after, 4 * width)
        layer(f"{name}.out_layers.0", after)
        layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{name}.skip_connection", after, before, 1, 1)

    def attends(name: str, here: int) -> None:
        layer(f"{name}.norm", here)
        layer(f"{name}.qkv", 3 * here, here, 1)
        layer(f"{name}.proj_out", here, here, 1)

    layer("time_embed.0", 4 * width, width)
    layer("time_embed.2", 4 * width, 4 * width)
    here, k = int(mults[0] * width), 1
    layer("input_blocks.0.0", here, channels, 3, 3)
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            residual(f"input_blocks.{k}.0", here, here := int(mult * width))
            if size in attention:
                attends(f"input_blocks.{k}.1", here)
            k += 1
        if level < len(mults) - 1:
            if halving == "residual":
                residual(f"input_blocks.{k}.0", here, here)
            else:
                layer(f"input_blocks.{k}.0.op", here, here, 3, 3)
            size, k = size // 2, k + 1
    residual("middle_block.0", here, here)
    attends("middle_block.1", here)
    residual("middle_block.2", here, here)
    layer("out.0", here)
    shapes["out.2.positional_embedding"] = (here, size**2 + 1)
    layer("out.2.qkv_proj", 3 * here, here, 1)
    layer("out.2.c_proj", classes, here, 1)
    return shapes
