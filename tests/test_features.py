"""The distance between sets of images as distributions, and the tables that are made of it."""
from __future__ import annotations

import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from comfy_host import ROOT, comfy_sampling

sys.path.append(str(ROOT / "dev" / "accuracy"))
from features import energy, features, wavelets  # noqa: E402


def drawn(count: int, seed: int, square: bool = False) -> Tensor:
    """Discs or squares of any colour and place, on white."""
    generator = torch.Generator().manual_seed(seed)
    place, size, colour = (torch.rand(count, n, 1, 1, generator=generator) for n in (2, 1, 3))
    at = torch.linspace(-1, 1, 32)
    x, y = (at.view(shape) - 0.6 * (place[:, k:k + 1] - 0.5)
            for k, shape in enumerate([(1, 1, 1, -1), (1, 1, -1, 1)]))
    far = torch.maximum(x.abs(), y.abs()) if square else (x**2 + y**2).sqrt()
    inside = torch.sigmoid(40 * (0.4 + 0.3 * size - far))
    return 1 - inside * 2 * (1 - colour)


def blurred(images: Tensor, width: float) -> Tensor:
    kernel = torch.exp(-torch.arange(-6.0, 7.0)**2 / (2 * width**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1).expand(3, 1, -1, 1)
    padded = torch.nn.functional.pad(images, (6, 6, 6, 6), mode="replicate")
    once = torch.nn.functional.conv2d(padded, kernel, groups=3)
    return torch.nn.functional.conv2d(once, kernel.transpose(2, 3), groups=3)


IMAGES = drawn(80, 0)
SEEN = features(IMAGES)
NOISE = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(1))
WORSE = {
    "blur": [blurred(IMAGES, width) for width in (0.5, 0.7, 1.0, 2.0)],
    "noise": [IMAGES + size * NOISE for size in (0.05, 0.1, 0.2, 0.4)],
    "contrast": [IMAGES * scale for scale in (0.98, 0.95, 0.9, 0.8)],
    "others": [torch.cat([drawn(n, 2, square=True), IMAGES[n:]]) for n in (20, 40, 80)],
}


@pytest.mark.parametrize("name", WORSE)
def test_the_worse_the_images_the_farther_they_are(name: str) -> None:
    far = [energy(features(images), SEEN) for images in WORSE[name]]
    values = [distance.value for distance in far]
    assert values == sorted(values) and values[0] > 0
    assert values[-1] > 2 * far[-1].error
    if name != "others":
        assert all(distance.value > 4 * distance.error for distance in far)


def test_the_same_images_are_at_0_and_other_draws_of_them_at_0_but_for_chance() -> None:
    assert energy(SEEN, SEEN).value == pytest.approx(0.0, abs=1e-12)
    sets = [features(drawn(30, seed)) for seed in range(16)]
    far = [energy(one, other) for one, other in zip(sets[::2], sets[1::2])]
    values = torch.tensor([distance.value for distance in far])
    error = torch.tensor([distance.error for distance in far]).mean()
    assert values.mean().abs() < 3 * values.std() / len(values)**0.5 and (values < 0).any()
    assert 0.4 < values.std() / error < 2.5


def test_it_is_the_energy_distance_of_two_gaussians() -> None:
    """In one dimension: E |N(m, 1) - N(0, 1)'| is known."""
    generator, shift = torch.Generator().manual_seed(0), 1.0
    one, other = (torch.randn(2000, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    normal = torch.distributions.Normal(0.0, 1.0)
    between = 2 / torch.pi**0.5 * torch.exp(torch.tensor(-shift**2 / 4)) + shift * (
        2 * normal.cdf(torch.tensor(shift / 2**0.5)) - 1)
    within = 2 / torch.pi**0.5
    found = energy(one + shift, other)
    assert abs(found.value - float(2 * (between - within) / within)) < 3 * found.error


def test_wavelets_see_no_constant() -> None:
    assert wavelets(32)[..., 0, 0].abs().max() < 1e-7


@pytest.fixture()
def images(tmp_path: Path):
    comfy_sampling()
    from accuracy.distribution import Images

    class Problem:
        """As much of the emoji problem as is asked."""

        shape, dtype = (3, 8, 8), torch.float32

        def session(self, prompts, guidance, body):
            model = SimpleNamespace(denoiser=None, inner_model=SimpleNamespace(
                inner_model=SimpleNamespace(model_sampling=None)))
            return body(model)

    kept = SimpleNamespace(begins=tmp_path / "theirs", files={True: tmp_path / "ours.csv"})
    return Images(Problem(), 7.0, kept)


def test_images_are_kept_and_a_run_that_was_cut_short_goes_on(images, monkeypatch) -> None:
    from accuracy import distribution
    made = []

    def column(label: str, change: float) -> distribution.Made:
        def run(model, noise, budget):
            made.append((label, budget))
            return noise * 0.2 + change * budget

        return distribution.Made(label, label == "ours", run)

    columns = [column(distribution.CONVERGED, 0.0), column("ours", 0.01), column("comfy/x", 0.001)]
    part = distribution.PART
    assert "no image is there" in "\n".join(images.table(columns, (4, 8), part))
    with redirect_stdout(StringIO()):
        images.make(columns, (4, 8), 3 * part, seconds=-1.0)
        assert made == []
        images.make(columns, (4, 8), part, seconds=1e9)
        assert made == [("converged", 0), ("ours", 4), ("ours", 8), ("comfy/x", 4), ("comfy/x", 8)]
        images.make(columns, (4, 8), 2 * part, seconds=1e9)
    assert len(made) == 10
    lines = "\n".join(images.table(columns, (4, 8), 2 * part)).splitlines()
    assert lines[0].startswith(f"{2 * part} images, guidance 7") and "| ours |" in lines[4]
    ours, theirs = ([float(cell.split()[0]) for cell in line.split("|")[2:4]] for line in lines[4:])
    assert 0 < ours[0] < ours[1] and abs(theirs[0]) < ours[0]
