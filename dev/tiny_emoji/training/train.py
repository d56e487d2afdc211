"""Train a tiny emoji checkpoint on the CPU, or on a GPU with --device cuda (not tried).

    python train.py data --comfyui ../../../.dev/ComfyUI --out my_emoji.safetensors --seconds 3900

The network is ComfyUI's own UNetModel on 32 x 32 RGB pictures, with the betas of Stable Diffusion. It learns

    eps(x_t, t, words),    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,

from a loss of mean |eps_net - eps|^2 weighted by (1 + sigma_t^2)^w, sigma_t^2 = (1 - abar_t) / abar_t, w =
0.7: more weight on noisy pictures, where the whole figure is decided. One caption in ten is empty, for
guidance.
"""
import argparse
import copy
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import autocast

STEPS = 1000
# is a colour understood on a shape not seen with it?
HELD_OUT = {"purple-heart", "green-circle", "orange-square"}
SMALL_SHAPES = {"heart", "circle", "square"}
SMALL_CATEGORIES = {"Smileys & Emotion", "Food & Drink"}
SMALL_NAMES = {
    "panda", "pig-face", "frog", "fox", "bear", "penguin", "cat-face", "sun", "star", "crescent-moon",
    "sunflower", "tulip", "fire", "droplet", "evergreen-tree", "cactus"
}
CATEGORY_WORDS = {
    "Animals & Nature": "nature", "Smileys & Emotion": "smiley", "Food & Drink": "food",
    "Travel & Places": "travel", "Symbols": "symbol", "Activities": "activity", "Objects": "object"
}
UNET = dict(image_size=32, num_res_blocks=[1, 1, 1], channel_mult=[1, 2, 3], transformer_depth=[0, 0, 1],
            transformer_depth_output=[0, 0, 0, 0, 1,
                                      1], transformer_depth_middle=1, use_spatial_transformer=True,
            use_linear_in_transformer=False, num_heads=-1, legacy=False, use_checkpoint=False)


class Pictures:
    """Endless batches of augmented pictures and their captions as word numbers."""

    def __init__(self, folder: Path, everything: bool, tokens: int, device: str):
        images = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2)
        self.rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        self.canvas = F.pad(images, (4, 4, 4, 4), value=255).to(device)  # white, for room to shift
        self.seen = [i for i, row in enumerate(self.rows)
                     if row["name"] not in HELD_OUT and (everything or in_small_set(row))]
        words = {word for row in self.rows for word in row["words"]} | {row["style"] for row in self.rows}
        self.vocabulary = ["<pad>", "<unk>"] + sorted(words | set(CATEGORY_WORDS.values()))
        self.numbers = {word: number for number, word in enumerate(self.vocabulary)}
        self.tokens = tokens
        self.device = device

    def batch(self, size: int):
        chosen = random.choices(self.seen, k=size)
        captions = [[self.numbers[word] for word in caption(self.rows[i])][:self.tokens] for i in chosen]
        numbers = torch.tensor([known + [0] * (self.tokens - len(known)) for known in captions],
                               device=self.device)
        return self.augmented(self.canvas[chosen].float() / 127.5 - 1), numbers

    def augmented(self, canvas):
        """The 64 x 64 middle of the canvas scaled by 0.93..1.06, shifted by up to 5 %, flipped; at 32 x
        32."""
        size = len(canvas)
        scale = torch.empty(size).uniform_(0.93, 1.06) * 64 / 72
        flip = torch.where(torch.rand(size) < 0.5, -1.0, 1.0)
        placement = torch.zeros(size, 2, 3)
        placement[:, 0, 0] = scale * flip
        placement[:, 1, 1] = scale
        placement[:, :, 2] = torch.empty(size, 2).uniform_(-0.05, 0.05)
        grid = F.affine_grid(placement.to(self.device), (size, 3, 64, 64), align_corners=False)
        moved = F.grid_sample(canvas, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return F.avg_pool2d(moved, 2)


def in_small_set(row: dict) -> bool:
    """Whether the shipped checkpoint was trained on this picture (if it was not held out)."""
    return (row["name"].split("-")[-1] in SMALL_SHAPES or row["category"] in SMALL_CATEGORIES
            or row["name"] in SMALL_NAMES)


def caption(row: dict) -> list[str]:
    """Words for a picture: mostly its name, sometimes its style and category, now and then nothing."""
    if random.random() < 0.1:
        return []
    words = list(row["words"]) if random.random() < 0.85 else []
    if random.random() < 0.5:
        words.append(row["style"])
    if (random.random() < 0.35 or not words) and row["category"]:
        words.append(CATEGORY_WORDS[row["category"]])
    return words


def import_tiny_emoji(comfyui: Path, device: str):
    """ComfyUI's UNetModel and the modules of the custom node; ComfyUI reads its options while it is
    imported."""
    sys.path[:0] = [str(comfyui), str(Path(__file__).resolve().parents[2])]
    from comfy.cli_args import args
    args.cpu = device == "cpu"
    args.use_pytorch_cross_attention = True  # another default attention cannot be trained
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from tiny_emoji import network, text
    return comfy.ops, UNetModel, network, text


def untrained(ops, UNetModel, network, text, vocabulary: int, **other):
    """A U-Net and a text encoder with PyTorch's usual initial weights, which ComfyUI's layers skip."""
    config = dict(UNET, in_channels=network.IMAGE_CHANNELS, out_channels=network.IMAGE_CHANNELS,
                  model_channels=network.MODEL_CHANNELS, context_dim=network.CONTEXT_DIM,
                  num_head_channels=network.HEAD_CHANNELS) | other
    unet = UNetModel(**copy.deepcopy(config), dtype=torch.float32,
                     operations=network.narrow(ops.disable_weight_init))
    words = text.WordEncoder(vocabulary, dtype=torch.float32)
    for module in [*unet.modules(), *words.modules()]:
        for layer in (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm,
                      torch.nn.Embedding):
            if isinstance(module, layer):
                layer.reset_parameters(module)
    for name, module in unet.named_modules():  # every residual branch, and the output, start at zero
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
    return unet, words, config


def train(unet, words, pictures: Pictures, seconds: float, batch: int, rate: float, exponent: float,
          half: bool = True):
    """Train for `seconds`, the network in bfloat16 if `half`; the parameters are left at their running
    average. Returns the number of steps."""
    device = pictures.device
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, STEPS, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0).float().to(device)
    weight = abar ** -exponent  # 1 + sigma^2 = 1 / abar
    weight = weight / weight.mean()
    parameters = [part for part in (*unet.parameters(), *words.parameters()) if part.requires_grad]
    average = [parameter.detach().clone() for parameter in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    start = time.monotonic()
    step = 0
    errors = []
    while (elapsed := time.monotonic() - start) < seconds:
        cosine = 0.5 * (1 + math.cos(math.pi * elapsed / seconds))
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * cosine)

        x0, numbers = pictures.batch(batch)
        t = ((torch.arange(batch) + torch.rand(batch)) / batch * STEPS).long().clamp(max=STEPS - 1).to(device)
        eps = torch.randn_like(x0)
        a = abar[t].view(-1, 1, 1, 1)
        with autocast(device, dtype=torch.bfloat16, enabled=half):
            predicted = unet(a.sqrt() * x0 + (1 - a).sqrt() * eps, t.float(), context=words(numbers))
        error = (predicted.float() - eps).square().mean((1, 2, 3))

        optimiser.zero_grad(set_to_none=True)
        (error * weight[t]).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.998, (1 + step) / (10 + step)))
        errors.append(error.mean().item())
        if step % 50 == 0:
            print(f"step {step}, {elapsed:.0f} s, {step * batch / elapsed:.0f} pictures/s, "
                  f"eps-MSE {np.mean(errors[-50:]):.4f}", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return step


def checkpoint(unet, words, vocabulary: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of a Stable Diffusion checkpoint, in half precision, with the vocabulary as one of them."""
    tensors = {"model.diffusion_model." + name: value for name, value in unet.state_dict().items()}
    tensors.update({"cond_stage_model." + name: value for name, value in words.state_dict().items()})
    tensors = {name: value.half().contiguous().cpu() for name, value in tensors.items()}
    tensors["cond_stage_model.vocab"] = torch.tensor(list("\n".join(vocabulary).encode()), dtype=torch.uint8)
    tensors["first_stage_model.pixel_space_vae"] = torch.tensor(1.0)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that make_set.py wrote")
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3900)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.2e-3, help="the highest learning rate")
    parser.add_argument("--exponent", type=float, default=0.7, help="w of the loss")
    parser.add_argument(
        "--everything", action="store_true",
        help="learn all the pictures, not only the shapes, faces, food and few more of the file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    random.seed(0)

    ops, UNetModel, network, text = import_tiny_emoji(arguments.comfyui, arguments.device)
    pictures = Pictures(arguments.data, arguments.everything, network.TOKENS, arguments.device)
    unet, words, config = untrained(ops, UNetModel, network, text, len(pictures.vocabulary))
    unet.to(arguments.device)
    words.to(arguments.device)
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters, {len(pictures.seen)} pictures",
          flush=True)
    steps = train(unet, words, pictures, arguments.seconds, arguments.batch, arguments.rate,
                  arguments.exponent)
    save_file(checkpoint(unet, words, pictures.vocabulary), arguments.out,
              metadata={"pictures": "renders of noto-emoji (Apache-2.0) and fluentui-emoji (MIT)",
                        "unet_config": json.dumps(config), "samples": str(steps * arguments.batch)})
    print(f"{arguments.out}: {steps} steps, {steps * arguments.batch} samples")


if __name__ == "__main__":
    main()
