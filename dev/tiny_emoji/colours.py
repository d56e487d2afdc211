"""The colour of a picture, by arithmetic: what the classifier of `classifiers/` learned to see in noise, and
how its guidance is judged."""
import math

import torch

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "grey")
HUES = (-30.0, 17.0, 40.0, 65.0, 165.0, 250.0, 330.0)
"""Where the hues of the first six begin and end, in degrees."""
PALE = 0.08


def colours(images):
    """The numbers of the colours [B] of images [B, 3, H, W] in -1..1.

    The hue of the mean of (R, G, B), as a vector around grey, over all pixels; grey, if they differ by less
    than PALE from their own grey in the mean. Brown is a dark orange.
    """
    rgb = images.clamp(-1, 1).float() / 2 + 0.5
    vivid = (rgb.amax(1) - rgb.amin(1)).mean((1, 2))
    red, green, blue = rgb.mean((2, 3)).unbind(1)
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))
    hue = (hue - HUES[0]) % 360 + HUES[0]
    found = torch.bucketize(hue, torch.tensor(HUES[1:-1], device=hue.device))
    return torch.where(vivid < PALE, len(COLOURS) - 1, found)
