"""Train the classifier of colours in noise of dev/tiny_emoji/classifiers, on one core.

    python train_classifier.py data --out emoji_colours.safetensors --steps 900

It learns log p(colour of x_0 | x_t, t) of the pictures that the checkpoint learned (x_t as in train.py, all
timesteps alike), with the colours of ../colours.py: cross-entropy, AdamW. The network is guided-diffusion's,
16 channels wide. A run that was cut short goes on from what is kept beside the file; --seconds ends it early.
"""
import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[2])]
from colours import COLOURS, colours  # noqa: E402
from layout import layout  # noqa: E402
from samplers.classifier import Classifier  # noqa: E402
from train import STEPS, Pictures  # noqa: E402

GROUPS, HEAD = 4, 8
SIZES = dict(size=32, classes=len(COLOURS), width=16, mults=(0.5, 1, 1.5), blocks=1, attention=(8,))
LEVELS = (0, 200, 400, 600, 800)  # timesteps at which it is tested


def untrained() -> Classifier:
    """With PyTorch's usual weights; the last layer of every branch, as in guided-diffusion, is 0."""
    made = Classifier(layout(**SIZES), GROUPS, HEAD, COLOURS)
    with torch.no_grad():
        made.out[2].positional_embedding.normal_(0, made.out[2].positional_embedding.shape[0] ** -0.5)
        for name, parameter in made.named_parameters():
            if "out_layers.3" in name or "proj_out" in name:
                parameter.zero_()
    return made


def noisy(pictures: Pictures, size: int, abar: torch.Tensor, t: torch.Tensor):
    """x_t, t, and the colour of x_0."""
    x0, _ = pictures.batch(size)
    a = abar[t].view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * torch.randn_like(x0), t.float(), colours(x0)


def right(network: Classifier, pictures: Pictures, abar: torch.Tensor) -> str:
    """What share of 512 pictures it tells right, at some timesteps."""
    told = []
    with torch.inference_mode():
        for level in LEVELS:
            x, times, wanted = noisy(pictures, 512, abar, torch.full((512,), level))
            told.append(f"{(network(x, times).argmax(1) == wanted).float().mean():.2f} at {level}")
    return ", ".join(told)


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that make_set.py wrote")
    parser.add_argument("--out", type=Path, default=HERE.parent / "classifiers" / "emoji_colours.safetensors")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--seconds", type=float, default=280, help="of this call")
    return parser.parse_args()


def main() -> None:
    arguments = asked()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)

    pictures = Pictures(arguments.data, False, 8, "cpu")
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, STEPS, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0).float()
    network, kept = untrained(), arguments.out.with_suffix(".part")
    average = {name: value.clone() for name, value in network.state_dict().items()}
    optimiser = torch.optim.AdamW(network.parameters(), lr=arguments.rate, weight_decay=0.02)
    done, start = 0, time.monotonic()
    if kept.exists():
        state = torch.load(kept)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        average, done = state["average"], state["done"]
        torch.manual_seed(done)
        random.seed(done)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, arguments.rate, arguments.steps, pct_start=0.1,
                                                   last_epoch=done - 1 if done else -1)
    while done < arguments.steps and time.monotonic() - start < arguments.seconds:
        t = ((torch.arange(arguments.batch) + torch.rand(arguments.batch)) / arguments.batch * STEPS).long()
        x, times, wanted = noisy(pictures, arguments.batch, abar, t)
        loss = F.nll_loss(network(x, times), wanted)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        done += 1
        for name, value in network.state_dict().items():
            average[name].lerp_(value, 1 - min(0.998, (1 + done) / (10 + done)))
        if done % 100 == 0:
            print(f"step {done}, {time.monotonic() - start:.0f} s, loss {loss.item():.3f}", flush=True)
    torch.save({"network": network.state_dict(), "optimiser": optimiser.state_dict(), "average": average,
                "done": done}, kept)
    network.load_state_dict(average)
    print("right:", right(network, pictures, abar))
    save_file({name: value.half().contiguous() for name, value in average.items()}, arguments.out,
              metadata={"groups": str(GROUPS), "head_channels": str(HEAD), "classes": json.dumps(COLOURS),
                        "pictures": "renders of noto-emoji (Apache-2.0) and fluentui-emoji (MIT)",
                        "samples": str(done * arguments.batch)})
    print(f"{arguments.out}: {done} steps, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
