"""Curves, plots and contact sheets drawn with Pillow, which ComfyUI has."""
from __future__ import annotations

import math
from itertools import cycle
from typing import Mapping, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..samplers import Amed, Statistics, fit_multistep
from ..samplers.schedule import Level

COLOURS = {"l": (31, 119, 180), "s": (214, 39, 40), "b": (44, 160, 44), "s_alone": (148, 103, 189),
           "damping": (200, 130, 0)}
EXPECTED = (3, 4, 5, 6, 8, 10, 12, 15, 20)
"""Evaluations for which the error to expect is drawn."""


def of(found: Statistics | Amed) -> Tensor:
    """The picture of a calibration, [1, H, W, 3]."""
    return (curves if isinstance(found, Statistics) else training)(found)


def curves(statistics: Statistics, width: int = 480, height: int = 300) -> Tensor:
    """l, s, b, s_alone and damping over lambda, [1, H, W, 3]; below, where they serve it, Fitted's error.

    Of several channels each is a thin line.
    """
    expected = {} if statistics.root is None else {n: fit_multistep(statistics, n).error for n in EXPECTED}
    image = Image.new("RGB", (width, height + 220 if expected else height), "white")
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

    for value in ticks(low, high):
        [(_, y), _] = at(lam[[0, -1]], np.array([value, value]))
        draw.line([(left, y), (right, y)], (225, 225, 225))
        draw.text((left - 8, y), f"{value:g}", (90, 90, 90), font, anchor="rm")
    for value in ticks(lam[0], lam[-1], 8):
        [(x, _)] = at(np.array([value]), np.array([low]))
        draw.text((x, bottom + 8), f"{value:g}", (90, 90, 90), font, anchor="mt")
    draw.text((right, 10), "lambda", (90, 90, 90), font, anchor="ra")
    for name, line in lines.items():
        for channel in line.T:
            draw.line(at(lam, channel), COLOURS[name], 2)
    for i, name in enumerate(lines):
        draw.text((left + 70 * i, 10), name, COLOURS[name], font)
    if expected and min(expected.values()) > 0:
        told = statistics.about.get("refits", {})
        refitted = {n: told[str(n)]["selection"][1] for n in statistics.plans
                    if str(n) in told and told[str(n)]["selection"][1] > 0}
        selection = statistics.about.get("hypersolver", {}).get("selection", {})
        taught = {int(n): pair for n, pair in selection.items()
                  if n.isdecimal() and int(n) > 1 and len(pair) == 2 and min(pair) > 0}
        _expected(draw, font, expected, refitted, taught, (left, height + 30, right, height + 186))
    return tensor(image)


def _expected(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, errors: dict[int, float],
              refitted: dict[int, float], taught: dict[int, Sequence[float]], box: tuple) -> None:
    """The fitted solver's error against evaluations, both logarithmic; a square where it was refitted, and on
    prompts held out the error without a hypersolver, in grey, and with it."""
    left, top, right, bottom = box
    known = [*errors.values(), *refitted.values(), *(error for pair in taught.values() for error in pair)]
    low, high = 0.8 * min(known), 1.25 * max(known)
    first, last = min([*errors, *taught]), max([*errors, *taught])

    def at(n: float, error: float) -> tuple[float, float]:
        return (left + math.log(n / first) / math.log(last / first) * (right - left),
                bottom - math.log(error / low) / math.log(high / low) * (bottom - top))

    for value in log_ticks(low, high, 5):
        _, y = at(1, value)
        draw.line([(left, y), (right, y)], (225, 225, 225))
        draw.text((left - 8, y), f"{value:g}", (90, 90, 90), font, anchor="rm")
    points = [at(n, error) for n, error in errors.items()]
    draw.line(points, COLOURS["l"], 2)
    for n, (x, y) in zip(errors, points):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), COLOURS["l"])
        draw.text((x, bottom + 8), str(n), (90, 90, 90), font, anchor="mt")
    for n, error in refitted.items():
        x, y = at(n, error)
        draw.rectangle((x - 4, y - 4, x + 4, y + 4), COLOURS["b"])
    for which, colour in enumerate((GREY, COLOURS["s"])):
        points = [at(n, pair[which]) for n, pair in sorted(taught.items())]
        draw.line(points, colour, 2)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    draw.text((left, top - 22), "error to expect of lambda_fitted (rms)", COLOURS["l"], font)
    words = {"refitted: on the images it was selected by": ("b", refitted),
             "with a hypersolver, on prompts held out (grey: without)": ("s", taught)}
    for k, text in enumerate(text for text, (_, of) in words.items() if of):
        draw.text((left, bottom - 4 - 16 * k), text, COLOURS[words[text][0]], font, anchor="lb")
    draw.text((right, top - 22), "evaluations", (90, 90, 90), font, anchor="ra")


ROWS = 30
"""Of a table: of more levels the middle is left out."""


def schedule(levels: Sequence[Level], times: Sequence[float], width: int = 480, height: int = 200) -> Tensor:
    """lam over the steps, and a table of the levels: sigma, lambda, t, alpha and the signal-to-noise
    ratio."""
    rows = [[str(i), *(f"{v:.4g}" for v in (level.sigma, level.lam, t, level.alpha, _snr(level)))]
            for i, (level, t) in enumerate(zip(levels, times))]
    if len(rows) > ROWS:
        rows[ROWS // 2:ROWS // 2 - ROWS] = [["..."] * 6]
    rows = [["", "sigma", "lambda", "t", "alpha", "SNR"], *rows]
    image = Image.new("RGB", (width, height + 20 * len(rows) + 8), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    _steps(draw, font, [(i, level.lam) for i, level in enumerate(levels) if math.isfinite(level.lam)],
           len(levels) - 1, (48, 26, width - 16, height - 30))
    for k, row in enumerate(rows):
        for column, text in enumerate(row):
            draw.text((48 + 84 * column, height + 20 * k), text, (40, 40, 40), font, anchor="ra")
    return tensor(image)


def _snr(level: Level) -> float:
    return math.exp(2.0 * level.lam) if level.lam < 300.0 else math.inf


def _steps(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, points: Sequence[tuple[int, float]],
           steps: int, box: tuple) -> None:
    """lam against the number of the step."""
    left, top, right, bottom = box
    lams = [lam for _, lam in points] or [0.0]
    low, high = lams[0], lams[-1] if lams[-1] > lams[0] else lams[0] + 1.0
    at = [(left + i / max(1, steps) * (right - left), bottom - (lam - low) / (high - low) * (bottom - top))
          for i, lam in points]
    for value in ticks(low, high):
        y = bottom - (value - low) / (high - low) * (bottom - top)
        draw.line([(left, y), (right, y)], (225, 225, 225))
        draw.text((left - 8, y), f"{value:g}", (90, 90, 90), font, anchor="rm")
    draw.line(at, COLOURS["l"], 2)
    for x, y in at:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), COLOURS["l"])
    draw.text((left, 6), "lambda", COLOURS["l"], font)
    draw.text((right, bottom + 8), f"step {steps}", (90, 90, 90), font, anchor="rt")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 x 10^k from low to high: at most so many, of the smallest such step."""
    for step in (m * 10.0**k for k in range(math.floor(math.log10(high - low)) - 2, 400) for m in (1, 2, 5)):
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first < most:
            return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """1, 2 and 5 x 10^k from low to high, or only 1 x 10^k if more than `most`; `ticks` if fewer than two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [[value for k in decades for m in marks if low <= (value := m * 10.0**k) <= high]
             for marks in ((1, 2, 5), (1,))]
    fine = found[0] if len(found[0]) <= most else found[1]
    return fine if len(fine) > 1 else ticks(low, high, most)


def tensor(image: Image.Image) -> Tensor:
    """An IMAGE, [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]


def training(trained: Amed, width: int = 480, height: int = 320) -> Tensor:
    """r, c, a of every step above, and the error at its end below, untrained and trained, [1, H, W, 3]."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    steps = len(trained.table)
    learned = np.isfinite(trained.lam[:-1]) & np.isfinite(trained.lam[1:])
    losses = trained.about.get("losses", {})
    which = trained.others or "training"
    left, right = 60, width - 20

    def panel(title: str, top: int, bottom: int, lines: dict[str, np.ndarray], colours: Sequence[tuple],
              log: bool) -> None:
        """Values over the steps; NaN where there is none."""
        scaled = {name: np.log10(np.maximum(line, 1e-12)) if log else line for name, line in lines.items()}
        values = np.concatenate(list(scaled.values()))
        low, high = np.nanmin(values), np.nanmax(values)
        low, high = low - 0.1 * (high - low + 0.1), high + 0.1 * (high - low + 0.1)
        x = left + 16 + np.arange(steps) / max(steps - 1, 1) * (right - left - 32)
        for value in log_ticks(10**low, 10**high, 5) if log else ticks(low, high):
            y = bottom - ((math.log10(value) if log else value) - low) / (high - low) * (bottom - top)
            draw.line([(left, y), (right, y)], (225, 225, 225))
            draw.text((left - 8, y), f"{value:g}", (90, 90, 90), font, anchor="rm")
        place = left
        for (name, line), colour in zip(scaled.items(), colours):
            points = [(px, bottom - (value - low) / (high - low) * (bottom - top))
                      for px, value in zip(x, line) if np.isfinite(value)]
            draw.line(points, colour, 2)
            for px, py in points:
                draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour)
            draw.text((place, top - 20), name, colour, font)
            place += draw.textlength(name, font) + 16
        draw.text((right, top - 20), title, (90, 90, 90), font, anchor="ra")
        for step in range(1, steps + 1, math.ceil(steps / 16)):
            draw.text((x[step - 1], bottom + 4), str(step), (90, 90, 90), font, anchor="ma")

    blue, red, green, grey = *(COLOURS[name] for name in ("l", "s", "b")), (130, 130, 130)
    table = np.where(learned[:, None], trained.table, np.nan)
    half = height // 2 if losses else height
    panel("step", 28, half - 24, dict(zip("rca", table.T)), (blue, red, green), False)
    if losses:
        names = [name for name in ("untrained", "table", "trained") if name in losses]
        errors = {name: np.array(losses[name][which]) for name in names}
        colours = {"untrained": grey, "table": green, "trained": blue}
        panel(f"error after the step, {which}", half + 28, height - 24, errors,
              [colours[name] for name in errors], True)
    return tensor(image)


def first(images: Tensor) -> Image.Image:
    """The first picture of an IMAGE or of a video's frames, [..., H, W, 3], as ComfyUI saves it."""
    pixels = images.reshape(-1, *images.shape[-3:])[0, ..., :3].float().cpu()
    return Image.fromarray((pixels.clamp(0, 1) * 255).to(torch.uint8).numpy())


# --- error against evaluations ------------------------------------------------------------------------------

HUES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0),
        (120, 94, 60), (110, 80, 190), (60, 60, 60), (150, 180, 40))
"""Colours to tell lines apart: first six of Okabe and Ito's, for any colour vision, then four more."""
INK, GREY, GRID, GOOD, DOUBT = (35, 35, 35), (110, 110, 110), (228, 228, 228), (20, 130, 70), (240, 240, 240)
SHAPES = ("disc", "square", "triangle", "diamond", "cross")
FINER = 2  # drawn larger and reduced, for smooth lines


class Line(NamedTuple):
    """One sampler on one scheduler: (evaluations, error) from left to right."""

    sampler: str
    scheduler: str
    stochastic: bool
    points: list[tuple[int, float]]


def errors(lines: Sequence[Line], good: float, doubt: float, width: int = 1000,
           height: int = 600) -> Image.Image:
    """Error against evaluations, both logarithmic. A colour is a sampler, a shape a scheduler.

    Hollow marks are stochastic. The green line is good enough; the grey ground is below `doubt`, where the
    reference is not known.
    """
    points = [point for line in lines for point in line.points if point[1] > 0]
    if not points:
        return notice("Nothing to plot: the table says why", width, height)
    z = FINER
    image = Image.new("RGB", (width * z, height * z), "white")
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(14 * z), ImageFont.load_default(17 * z)
    colours = dict(zip(dict.fromkeys(line.sampler for line in lines), cycle(HUES)))
    shapes = dict(zip(dict.fromkeys(line.scheduler for line in lines), cycle(SHAPES)))
    longest = max(draw.textlength(name, small) for name in (*colours, *shapes))
    legend = min(width * z // 2, int(longest) + 64 * z)
    plane = Plane(74 * z, width * z - legend - 24 * z, 52 * z, (height - 58) * z,
                  tuple(math.log(n) + by for n, by in ((min(points)[0], -0.08), (max(points)[0], 0.08))),
                  tuple(math.log(value) for value in (min(min(e for _, e in points), good) / 1.25,
                                                      max(max(e for _, e in points), good) * 1.25)))
    _grid(draw, plane, sorted({n for n, _ in points}), good, doubt, small)
    draw.text((plane.left, 14 * z), "Error at equal model evaluations", INK, large)
    draw.text(((plane.left + plane.right) / 2, height * z - 12 * z), "model evaluations", INK, small,
              anchor="ms")
    draw.text((plane.left - 62 * z, plane.top - 10 * z), "error", INK, small, anchor="ls")
    for line in lines:
        places = [plane.at(*point) for point in line.points if point[1] > 0]
        draw.line(places, colours[line.sampler], (1 if line.stochastic else 2) * z, joint="curve")
        for place in places:
            _mark(draw, place, shapes[line.scheduler], colours[line.sampler], line.stochastic, 5 * z)
    _legend(draw, (plane.right + 24 * z, plane.top + 8 * z), colours, shapes,
            {line.sampler for line in lines if line.stochastic}, small)
    return image.reduce(z)


class Plane(NamedTuple):
    """A frame in the picture, and the logarithms from which to which it shows evaluations and errors."""

    left: int
    right: int
    top: int
    bottom: int
    x: tuple[float, ...]
    y: tuple[float, ...]

    def at(self, n: float, error: float) -> tuple[float, float]:
        return (self.left + (math.log(n) - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left),
                self.bottom - (math.log(error) - self.y[0]) / (self.y[1] - self.y[0]) *
                (self.bottom - self.top))


def _grid(draw: ImageDraw.ImageDraw, plane: Plane, calls: Sequence[int], good: float, doubt: float,
          font: ImageFont.FreeTypeFont) -> None:
    """The ground, the lines at round errors and at these evaluations, and what is good enough."""
    z, (left, right, top, bottom, _, (low, high)) = FINER, plane
    if doubt > math.exp(low):
        ground = plane.at(1, min(doubt, math.exp(high)))[1]
        draw.rectangle([left, ground, right, bottom], DOUBT)
        if bottom - ground > 24 * z:
            draw.text((right - 8 * z, bottom - 8 * z), "the reference itself is not known better", GREY, font,
                      anchor="rs")
    for value in log_ticks(math.exp(low), math.exp(high), 12):
        _, y = plane.at(1, value)
        draw.line([(left, y), (right, y)], GRID, z)
        draw.text((left - 10 * z, y), f"{value:g}", GREY, font, anchor="rm")
    taken = -math.inf
    for n in calls:
        x, _ = plane.at(n, 1)
        draw.line([(x, top), (x, bottom)], GRID, z)
        if x - taken > 26 * z:
            draw.text((x, bottom + 10 * z), f"{n}", GREY, font, anchor="mt")
            taken = x
    draw.rectangle([left, top, right, bottom], outline=GREY, width=z)
    _, y = plane.at(1, good)
    draw.line([(left, y), (right, y)], GOOD, 2 * z)
    draw.text((right - 8 * z, y - 5 * z), f"good enough: {good:g}", GOOD, font, anchor="rs")


def _legend(draw: ImageDraw.ImageDraw, place: tuple[float, float], colours: Mapping[str, tuple],
            shapes: Mapping[str, str], hollow: set[str],
            font: ImageFont.FreeTypeFont) -> None:
    z, (x, y) = FINER, place
    for name, colour in colours.items():
        draw.line([(x, y), (x + 26 * z, y)], colour, (1 if name in hollow else 3) * z)
        draw.text((x + 34 * z, y), name, INK, font, anchor="lm")
        y += 22 * z
    y += 14 * z
    for name, shape in shapes.items():
        _mark(draw, (x + 13 * z, y), shape, GREY, False, 5 * z)
        draw.text((x + 34 * z, y), name, INK, font, anchor="lm")
        y += 22 * z
    if hollow:
        _mark(draw, (x + 13 * z, y + 14 * z), "disc", GREY, True, 5 * z)
        draw.text((x + 34 * z, y + 14 * z), "stochastic", INK, font, anchor="lm")


def _mark(draw: ImageDraw.ImageDraw, place: tuple[float, float], shape: str, colour: tuple, hollow: bool,
          r: float) -> None:
    x, y = place
    fill, edge = ("white" if hollow else colour), max(1, int(r / 3))
    if shape == "disc":
        draw.ellipse([x - r, y - r, x + r, y + r], fill, colour, edge)
    elif shape == "square":
        draw.rectangle([x - r, y - r, x + r, y + r], fill, colour, edge)
    elif shape == "triangle":
        draw.polygon([(x, y - 1.2 * r), (x + 1.2 * r, y + r), (x - 1.2 * r, y + r)], fill, colour, edge)
    elif shape == "diamond":
        s = 1.4 * r
        draw.polygon([(x, y - s), (x + s, y), (x, y + s), (x - s, y)], fill, colour, edge)
    else:
        draw.line([(x - r, y - r), (x + r, y + r)], colour, edge + 1)
        draw.line([(x - r, y + r), (x + r, y - r)], colour, edge + 1)


# --- contact sheet ------------------------------------------------------------------------------------------

class Tile(NamedTuple):
    """A picture with lines below it; framed if it is good, doubly if it is the best."""

    image: Image.Image | None
    captions: Sequence[str]
    frame: str | None = None


def sheet(first_row: Sequence[Tile], words: str, heads: Sequence[tuple[str, str]],
          rows: Sequence[tuple[str, Sequence[Tile | None]]], side: int = 168) -> Image.Image:
    """References on top with words beside them, then a labelled row of tiles a sampler, below heads."""
    gap, text, edge, head = 12, 40, 16, 54
    font, bold = ImageFont.load_default(15), ImageFont.load_default(18)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    names = [*(name for name, _ in rows), "converged"]
    label = int(max(measure.textlength(name, bold) for name in names)) + 24
    high = side + text + gap
    beside = edge + label + len(first_row) * (side + gap) + 2 * gap
    wide = max(edge + label + len(heads) * (side + gap),
               int(beside + max(measure.textlength(line, font) for line in words.splitlines())))
    image = Image.new("RGB", (wide + edge, edge * 2 + head + high * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(image)

    def place(tile: Tile | None, column: int, y: int) -> None:
        if tile is None:
            return
        x = edge + label + column * (side + gap)
        if tile.image is None:
            draw.rectangle([x, y, x + side - 1, y + side - 1], DOUBT)
        else:
            scale = side / max(tile.image.size)
            size = tuple(max(1, round(length * scale)) for length in tile.image.size)
            small = tile.image.resize(size, Image.Resampling.LANCZOS)
            image.paste(small, (x + (side - size[0]) // 2, y + (side - size[1]) // 2))
        if tile.frame:
            thick = 5 if tile.frame == "best" else 2
            box = [x - thick, y - thick, x + side - 1 + thick, y + side - 1 + thick]
            draw.rectangle(box, outline=GOOD, width=thick)
        for k, caption in enumerate(tile.captions):
            colour = GOOD if tile.frame else GREY
            draw.text((x + side / 2, y + side + 6 + 16 * k), caption, colour, font, anchor="mt")

    draw.text((edge, edge + side // 2), "converged", INK, bold, anchor="lm")
    for column, tile in enumerate(first_row):
        place(tile, column, edge)
    draw.multiline_text((beside, edge + side // 2), words, GREY, font, anchor="lm", spacing=6)
    y = edge + high
    for column, (above, below) in enumerate(heads):
        x = edge + label + column * (side + gap) + side / 2
        draw.text((x, y + 4), above, INK, bold, anchor="mt")
        draw.text((x, y + 26), below, GREY, font, anchor="mt")
    draw.line([(edge, y), (image.width - edge, y)], GRID, 1)
    y += head
    for name, tiles in rows:
        draw.text((edge, y + side // 2), name, INK, bold, anchor="lm")
        for column, tile in enumerate(tiles):
            place(tile, column, y)
        y += high
    return image


def notice(text: str, width: int = 640, height: int = 160) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((width / 2, height / 2), text, GREY, ImageFont.load_default(18), anchor="mm")
    return image
