"""A distance between two sets of emoji images, as distributions, in a fixed space of features.

    f(x)    scattering of small images (Bruna & Mallat 2013, arXiv:1203.1513), of each colour by itself: the
            means over the quarters of x, of |x * psi| and of ||x * psi| * psi'|, for wavelets psi of SCALES
            and ANGLES, psi' of larger scales than psi
    E^2     = (E |f(X) - f(Y')| + E |f(Y) - f(X')| - E |f(X) - f(X')|) / E |f(Y) - f(Y')| - 1

the energy distance, in units of the mean distance within the second set. (X, Y) and (X', Y') are two
different pairs of the sets, so E^2 has no bias, and what the two of a pair share (the noise they began with)
only takes variance from it. It is 0 for equal distributions, and below 0 by chance. Its standard error is by
bootstrap over the pairs.

What it shows of 100 pictures, in 10^-4: a blur of 0.5 pixels makes 5, of 1 pixel 44, of 2 pixels 162; noise
of 0.05 makes 3, of 0.1 16, of 0.2 84; 0.9 of the contrast 187; a tenth of other pictures 30, a quarter 125.
(The pixels themselves miss noise: 0.1, 1 and 17. The last features of the classifier of colours miss blur and
noise: 0.3 for 1 pixel, 0.1 for noise of 0.2.)
"""
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

SCALES, ANGLES, BOOTSTRAPS = (1.0, 2.0, 4.0), 4, 200


class Distance(NamedTuple):
    """E^2 and its standard error."""

    value: float
    error: float


@functools.cache
def wavelets(size: int) -> Tensor:
    """Morlet wavelets [SCALES, ANGLES, size, size] by their Fourier transforms, real, 0 at frequency 0."""
    frequency = 2 * math.pi * torch.fft.fftfreq(size, dtype=torch.float64)
    v, u = torch.meshgrid(frequency, frequency, indexing="ij")
    made = []
    for scale in SCALES:
        for k in range(ANGLES):
            angle, width, centre = math.pi * k / ANGLES, 0.6 / scale, 0.75 * math.pi / scale
            cos, sin = math.cos(angle), math.sin(angle)
            along, across = u * cos + v * sin, v * cos - u * sin
            bump, low = ((-((along - at)**2 + (1.5 * across)**2) / (2 * width**2)).exp()
                         for at in (centre, 0.0))
            made.append(bump - math.exp(-centre**2 / (2 * width**2)) * low)
    return torch.stack(made).float().view(len(SCALES), ANGLES, size, size)


def moduli(spectra: Tensor, scale: int) -> Tensor:
    """|x * psi|, [..., ANGLES, size, size] of the Fourier transforms [..., size, size], psi of one scale."""
    return torch.fft.ifft2(spectra[..., None, :, :] * wavelets(spectra.shape[-1])[scale]).abs()


def features(images: Tensor) -> Tensor:
    """f of images [B, 3, size, size] in -1..1: [B, F]."""
    spectra, found = torch.fft.fft2(images.float()), [images.float()]
    for first in range(len(SCALES)):
        once = moduli(spectra, first)
        found.append(once)
        again = torch.fft.fft2(once)
        found += [moduli(again, second) for second in range(first + 1, len(SCALES))]
    return torch.cat([torch.nn.functional.adaptive_avg_pool2d(part.flatten(1, -3), 2).flatten(1)
                      for part in found], 1)


def energy(one: Tensor, other: Tensor) -> Distance:
    """E^2 between two sets of features [N, F], the k-th of one paired with the k-th of the other."""
    n = len(one)
    one, other = one.double(), other.double()
    between, within = torch.cdist(one, other), torch.cdist(other, other)
    kernel = (between + between.T - torch.cdist(one, one) - within) / (within.sum() / (n * (n - 1)))
    kernel.fill_diagonal_(0.0)
    chosen = torch.randint(n, (BOOTSTRAPS, n), generator=torch.Generator().manual_seed(0))
    counts = torch.stack([row.bincount(minlength=n) for row in (torch.arange(n), *chosen)]).double()
    pairs = n * n - counts.square().sum(1)
    values = ((counts @ kernel) * counts).sum(1) / pairs
    return Distance(float(values[0]), float(values[1:].std()))
