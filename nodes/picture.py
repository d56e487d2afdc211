"""Curves drawn with Pillow, which ComfyUI has, as an IMAGE."""
from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..samplers import Amed, Statistics

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


def training(trained: Amed, width: int = 480, height: int = 300) -> Tensor:
    """r, c, a of every step above, and the error after every step below, untrained and trained, [1, H, W, 3]."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    rows = trained.table[np.isfinite(trained.lam[:-1]) & np.isfinite(trained.lam[1:])]
    losses = trained.about.get("losses", {})
    which = "held out" if "held out" in losses.get("trained", {}) else "training"
    errors = {name: np.array(losses[name][which]) for name in ("untrained", "table", "trained") if name in losses}
    steps = np.arange(len(rows))
    left, right = 56, width - 16

    def panel(top: int, bottom: int, lines: dict[str, np.ndarray], colours: dict[str, tuple], log: bool) -> None:
        values = np.concatenate([np.log10(line) if log else line for line in lines.values()])
        low, high = float(values.min()), float(values.max())
        pad = max(0.06 * (high - low), 0.02)
        low, high = low - pad, high + pad
        y = lambda v: bottom - ((np.log10(v) if log else v) - low) / (high - low) * (bottom - top)
        x = lambda i: (left + right) / 2 if len(rows) == 1 else left + 12 + i / (len(rows) - 1) * (right - left - 24)
        for value in np.linspace(low, high, 4):
            at = bottom - (value - low) / (high - low) * (bottom - top)
            draw.line([(left, at), (right, at)], (225, 225, 225))
            draw.text((6, at - 8), f"{10**value if log else value:.2g}", (90, 90, 90), font)
        for k, (name, line) in enumerate(lines.items()):
            points = [(float(x(i)), float(y(v))) for i, v in enumerate(line)]
            draw.line(points, colours[name], 2)
            for px, py in points:
                draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colours[name])
            draw.text((left + 8 + 92 * k, top - 18), name, colours[name], font)

    blue, red, green, grey = (31, 119, 180), (214, 39, 40), (44, 160, 44), (130, 130, 130)
    split = 0.5 if errors else 1.0
    panel(24, int(height * split) - 14, {"r": rows[:, 0], "c": rows[:, 1], "a": rows[:, 2]},
          {"r": blue, "c": red, "a": green}, False)
    if errors:
        draw.text((right - 120, int(height * split) - 6), f"error, {which}", (90, 90, 90), font)
        panel(int(height * split) + 12, height - 26, errors, {"untrained": grey, "table": green, "trained": blue}, True)
    for i in steps:
        x = (left + right) / 2 if len(rows) == 1 else left + 12 + i / (len(rows) - 1) * (right - left - 24)
        draw.text((x - 4, height - 20), str(i + 1), (90, 90, 90), font)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]
