"""Train the nano emoji, a checkpoint for tests, on pictures that the tiny emoji makes.

    python nano.py --comfyui ../../../.dev/ComfyUI --out ../checkpoints/nano_emoji.safetensors --seconds 900

A U-Net of 72,000 parameters instead of 2.5 million: an evaluation takes a quarter of the time. Its text
encoder is the tiny emoji's own.
"""
import argparse
import json
import random
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train

TEACHER = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny_emoji.safetensors"
PROMPTS = ("red heart", "panda", "strawberry", "doughnut", "ghost", "pizza", "green heart", "sun", "tulip",
           "crying face", "penguin", "hamburger", "cactus", "tomato", "clown face", "evergreen tree")
STEPS, GUIDANCE = 12, 3.0  # of a picture
UNET = dict(num_res_blocks=[1, 1], channel_mult=[1, 1], transformer_depth=[0, 1],
            transformer_depth_output=[0, 0, 0, 0], transformer_depth_middle=-1)


class Pictures:
    """Endless batches of the teacher's pictures, flipped or not, and their captions as word numbers."""

    device = "cpu"

    def __init__(self, images: torch.Tensor, numbers: torch.Tensor):
        """images [prompts, each, 3, 32, 32] in -1 .. 1, numbers [prompts, TOKENS]."""
        self.images, self.numbers = images, numbers

    def batch(self, size: int):
        prompt, each = (torch.randint(count, (size,)) for count in self.images.shape[:2])
        images = self.images[prompt, each]
        images = torch.where(torch.rand(size, 1, 1, 1) < 0.5, images, images.flip(-1))
        said = torch.rand(size, 1) >= 0.1  # one caption in ten is empty, for guidance
        return images, self.numbers[prompt] * said


def drawn(each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's pictures [prompts, each, 3, 32, 32], and their captions' numbers."""
    import comfy.sample
    import comfy.sd
    import comfy.supported_models
    from tiny_emoji.family import TinyEmoji

    comfy.supported_models.models.append(TinyEmoji)
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(TEACHER), output_vae=False, output_clip=True)
    cond = {words: clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("", *PROMPTS)}
    numbers = [[number for number, _ in clip.tokenize(words)["words"][0]] for words in PROMPTS]
    latent, images = torch.zeros(each, 3, 32, 32), []
    for seed, words in enumerate(PROMPTS):
        noise = comfy.sample.prepare_noise(latent, seed)
        with torch.inference_mode():
            made = comfy.sample.sample(model, noise, STEPS, GUIDANCE, "dpmpp_2m", "karras", cond[words],
                                       cond[""], latent, disable_pbar=True)
        images.append(made.clamp(-1, 1))
        print(f"{each} pictures of {words}", flush=True)
    return torch.stack(images), torch.tensor(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=16, help="of each prompt")
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)

    ops, UNetModel, network, text = train.import_tiny_emoji(arguments.comfyui, "cpu")
    images, numbers = (part.clone() for part in drawn(arguments.pictures))
    vocabulary = bytes(load_file(TEACHER)["cond_stage_model.vocab"].tolist()).decode().split("\n")
    unet, words, config = train.untrained(ops, UNetModel, network, text, len(vocabulary), **UNET,
                                           model_channels=network.NANO_CHANNELS,
                                           num_head_channels=network.NANO_CHANNELS)
    prefix = "cond_stage_model."
    words.load_state_dict({name.removeprefix(prefix): value for name, value in load_file(TEACHER).items()
                           if name.startswith(prefix) and not name.endswith("vocab")})
    words.requires_grad_(False)
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters", flush=True)
    steps = train.train(unet, words, Pictures(images, numbers), arguments.seconds, arguments.batch,
                        arguments.rate, 0.7, half=False)
    with safe_open(TEACHER, "pt") as teacher:
        licence = teacher.metadata()["licence"]
    save_file(train.checkpoint(unet, words, vocabulary), arguments.out,
              metadata={"pictures": "made by tiny_emoji.safetensors", "licence": licence,
                        "unet_config": json.dumps(config), "samples": str(steps * arguments.batch)})
    print(f"{arguments.out}: {steps} steps, {steps * arguments.batch} samples")


if __name__ == "__main__":
    main()
