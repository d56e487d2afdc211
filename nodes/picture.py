"""Curves drawn with Pillow, which ComfyUI has, as an IMAGE."""
from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..samplers import Statistics

COLOURS = {"l": (31, 119, 180), "s": (214, 39, 40), "b": (44, 160, 44), "gamma": (148, 103, 189)}


def curves(statistics: Statistics, width: int = 480, height: int = 300) -> Tensor:
    """l, s, b and gamma over lambda, [1, H, W, 3]; of several channels, each a thin line."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    left, right, top, bottom = 48, width - 16, 34, height - 34
    lam = statistics.lam
    lines = {name: curve.reshape(len(lam), -1)[:, :8] for name, curve in statistics.curves().items()}
    low, high = np.percentile(np.concatenate([line.ravel() for line in lines.values()]), [1, 99])
    low, high = (low, high) if high - low > 1e-6 else (low - 1.0, high + 1.0)

    def at(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
        return list(zip(left + (x - lam[0]) / (lam[-1] - lam[0]) * (right - left),
                        bottom - (np.clip(y, low, high) - low) / (high - low) * (bottom - top)))

    for value in np.linspace(low, high, 5):
        [(_, y), _] = at(lam[[0, -1]], np.array([value, value]))
        draw.line([(left, y), (right, y)], (225, 225, 225))
        draw.text((6, y - 8), f"{value:.2g}", (90, 90, 90), font)
    for value in np.linspace(lam[0], lam[-1], 6):
        [(x, _)] = at(np.array([value]), np.array([low]))
        draw.text((x - 12, bottom + 6), f"{value:.1f}", (90, 90, 90), font)
    draw.text((right - 70, bottom + 20 - 6), "lambda", (90, 90, 90), font)
    for name, line in lines.items():
        for channel in line.T:
            draw.line(at(lam, channel), COLOURS[name], 2)
    for i, name in enumerate(lines):
        draw.text((left + 70 * i, 10), name, COLOURS[name], font)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]
