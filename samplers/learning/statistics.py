"""The statistics of DPM-Solver-v3: what they are, their file, and the integrand made of them.

Zheng et al. 2023 (arXiv:2310.13268) write the ODE in y = x / alpha as  dy/dlam + l y = -f,  f = (1 - l) y -
D,  and remove from f what it does to first order by two more functions of lam:

    g_j = e^(S_s - S_j) f_j - e^(S_s) (B_j - B_s),        L = int l,  S = int s,  B = int e^(-S) b

g varies least along a trajectory if (l, s, b) are the model's "empirical model statistics" (their section
3.2):

    l = 1 - E[diag dD/dy],      s = cov(f, f') / var(f),      b = E f' - s E f,      f' = df/dlam

Another prompt's f has another mean, and b is of no use to it. Then it is left out, and the s that leaves
least of f' without it takes the place of s:

    s_alone = E[f f'] / E[f^2]

f, and so l, s, b, are the same on every path: they belong to a model and its guidance, not to a
parametrisation. (l, s, b) = (1, 0, 0) is DPM-Solver++ and (0, -1, 0) DPM-Solver.
"""
from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from ..integrand import AncestralPrediction, Evaluation, Flow, Stage, Update
from ..schedule import Level
from .hypersolver import Hypersolver
from .record import Record, array, group
from .storage import CalibrationError

FORMAT = "lambda-solvers statistics 1"
CURVES = ("l", "s", "b")
COUNT = re.compile("[1-9][0-9]{0,3}")
EXPONENT = 300.0
SLACK = 0.01  # in lam: schedules are computed in float32, and end a little beside the model's own last level


def integral(lam: np.ndarray, curve: np.ndarray, zero: int = 0) -> np.ndarray:
    """The cumulative trapezoidal integral of a curve over lam, 0 at the point `zero`."""
    pieces = _column(np.diff(lam), curve) * (curve[1:] + curve[:-1]) / 2.0
    total = np.concatenate([np.zeros_like(curve[:1]), np.cumsum(pieces, axis=0)])
    return total - total[zero]


def _column(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def _read_plans(arrays: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    return {int(n): rows.astype(np.float64) for n, rows in arrays.items() if COUNT.fullmatch(n)}


@dataclass(frozen=True, eq=False)
class Statistics(Record, format=FORMAT):
    """Curves over an increasing grid in lam.

    lam [N+1]; l, s, b [N+1] or [N+1, ...] with trailing axes that broadcast over one latent (channels: [N+1,
    C, 1, 1]); s_alone like s, or None. All float64. about: what and how it was measured
    (model, guidance, ...).

    Two more for the fitted solver, or None: damping [N+1], the rate - d log|error| / dlam at which a solver's
    own error dies out; and root [K, M, M], M = 2N + 3, for each trajectory a matrix whose columns have the
    inner products (per element) of the tensors y_0 .. y_N, D_0 .. D_N, 1, y = x / alpha: |V c|^2 = |root c|^2
    for every combination c of them.

    plans: for a number n of evaluations that was refitted, its steps, [n, 3 + order] (fitted.Plan has the
    columns). hypersolver: what was trained to add what each step misses, or None.
    """

    lam: np.ndarray = array(lambda n: (n,))
    l: np.ndarray = array(lambda n: (n, ...))  # noqa: E741  (the paper's letter)
    s: np.ndarray = array(lambda n: (n, ...))
    b: np.ndarray = array(lambda n: (n, ...))
    s_alone: np.ndarray | None = array(lambda n: (n, ...), optional=True)
    damping: np.ndarray | None = array(lambda n: (n,), optional=True)
    root: np.ndarray | None = array(lambda n: ("trajectories", 2 * n + 1, 2 * n + 1), optional=True)
    plans: Mapping[int, np.ndarray] = group("plan", lambda plans: {str(n): rows for n, rows in plans.items()},
                                            _read_plans, dict)
    hypersolver: Hypersolver | None = group("hypersolver", Hypersolver.arrays, Hypersolver.of_arrays,
                                            lambda: None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in CURVES:
            if (shape := getattr(self, name).shape) != self.l.shape:
                raise CalibrationError(
                    f"{name} has shape {list(shape)} and l has {list(self.l.shape)}: they must agree")
        for name in ("l", "s"):
            reach = float(integral(self.lam, np.abs(getattr(self, name)))[-1].max())
            if reach > EXPONENT:
                raise CalibrationError(
                    f"the integral of |{name}| over lam is {reach:.3g}: no model has more than {EXPONENT:g}, "
                    "and the solver takes its exponential; measure again")
        for n, rows in self.plans.items():
            self._check_plan(n, rows)
        for n, errors in self.about.get("hypersolver", {}).get("selection", {}).items():
            if len(errors) != 2:
                raise CalibrationError(
                    f"about.hypersolver.selection.{n} must have the errors without it and with it: train "
                    "anew")
        for n, told in self.about.get("refits", {}).items():
            if len(told.get("selection", ())) != 2:
                raise CalibrationError(
                    f"about.refits.{n} does not say the two errors of its selection: refit again")

    def _check_plan(self, n: int, rows: np.ndarray) -> None:
        if rows.ndim != 2 or rows.shape[0] != n or not 4 <= rows.shape[1] <= 3 + n:
            raise CalibrationError(f"plan.{n} has shape {list(rows.shape)}: it must be [{n}, 4 to {3 + n}]")
        if (np.diff(rows[:, 0])
                <= 0).any() or rows[0, 0] < self.lam[0] - SLACK or rows[-1, 0] > self.lam[-1] + SLACK:
            raise CalibrationError(f"plan.{n} has levels that do not rise within lam")
        _, decay, *terms, bias = rows[-1].tolist()
        if decay or bias or any(terms[2:]) or abs(sum(terms) - 1.0) > 1e-9:
            raise CalibrationError(
                f"plan.{n} does not end in the model's own images, as a weighted mean of the last two: "
                "it would alter what inpainting keeps; refit again")

    def curves(self) -> dict[str, np.ndarray]:
        return {
            name: curve for name in (*CURVES, "s_alone", "damping")
            if (curve := getattr(self, name)) is not None
        }

    @classmethod
    def constant(cls, l: float = 1.0, s: float = 0.0, b: float = 0.0,
                 lam: tuple[float, float] = (-40.0, 40.0)) -> Statistics:
        """The same (l, s, b) everywhere; (1, 0, 0) is DPM-Solver++."""
        return cls(np.array(lam), *(np.full(2, value) for value in (l, s, b)))

    def for_another_prompt(self) -> Statistics:
        """Without b, which is the mean of what the model does on the measured prompt, with s_alone for s,
        and without plans that one prompt taught.

        Measured on the emoji model (rms as a ratio to DPM-Solver++(2M), 5 to 15 evaluations, guidance 3 and
        7): with the statistics of the prompt itself 0.76, with all of another prompt's 1.18, with another
        prompt's l and s 0.94. With s_alone for s about the same (0.99 of that), and no harm to models whose
        prompts differ in their mean, where b held back what s alone made grow until images had one colour.
        Plans of one prompt helped all others, of another some and harmed some; those of a dozen prompts
        helped others: a third less error without guidance, a seventh at 3, none at 7.
        """
        refits = self.about.get("refits", {})
        plans = {n: rows for n, rows in self.plans.items() if refits.get(str(n), {}).get("prompts", 1) > 1}
        s = self.s if self.s_alone is None else self.s_alone
        return replace(self, s=s, b=np.zeros_like(self.b), plans=plans, about={**self.about, "b": "left out"})

    def on(self, lam: np.ndarray) -> Statistics:
        """The same curves on another grid, without what a fit needs."""
        return Statistics(np.asarray(lam, dtype=np.float64),
                          **{name: self.at(name, lam) for name in self.curves()}, about=self.about)

    def at(self, name: str, lam: float | np.ndarray) -> np.ndarray:
        """A curve at any lam of the grid's range, linear between grid points."""
        lam = np.asarray(lam, dtype=np.float64)
        i = np.clip(np.searchsorted(self.lam, lam, side="right") - 1, 0, len(self.lam) - 2)
        share = np.clip((lam - self.lam[i]) / (self.lam[i + 1] - self.lam[i]), 0.0, 1.0)
        curve = getattr(self, name)
        share = share.reshape(share.shape + (1,) * (curve.ndim - 1))
        return (1.0 - share) * curve[i] + share * curve[i + 1]

    def covers(self, *levels: Level) -> bool:
        """Whether all levels lie within the grid."""
        return all(self.lam[0] - SLACK <= level.lam <= self.lam[-1] + SLACK for level in levels)

    def check_range(self, *levels: Level) -> None:
        """ValueError naming both ranges if a level lies outside the grid."""
        outside = [level for level in levels if not self.covers(level)]
        if outside:
            raise ValueError(
                f"the statistics cover lambda from {self.lam[0]:.3f} to {self.lam[-1]:.3f} (sigma / alpha "
                f"from {np.exp(-self.lam[0]):.4g} to {np.exp(-self.lam[-1]):.4g}), but the schedule goes to "
                f"lambda = {outside[0].lam:.3f} (sigma = {outside[0].sigma:.4g}): estimate them again over "
                "the whole schedule, or use a schedule within their range")

    @classmethod
    def from_npz(cls, folder: str | os.PathLike, lam: tuple[float, float],
                 about: Mapping[str, Any] | None = None) -> Statistics:
        """The authors' published files, l.npz and sb.npz, over their uniform grid from lam[0] to lam[1].

        Their arrays `l`, `s`, `b` have one row for each grid point (and then channels or elements).
        """
        arrays = {}
        for file, names in (("l.npz", ("l",)), ("sb.npz", ("s", "b"))):
            path = Path(folder) / file
            if not path.is_file():
                raise CalibrationError(f"{path} does not exist: a published folder holds l.npz and sb.npz")
            with np.load(path) as archive:
                for name in names:
                    if name not in archive:
                        raise CalibrationError(
                            f"{path} has no array {name!r}; it has {', '.join(archive.files)}")
                    arrays[name] = archive[name].astype(np.float64)
        return cls(np.linspace(*lam, len(arrays["l"])), **arrays,
                   about={**(about or {}), "source": "DPM-Solver-v3 npz"})


@dataclass(frozen=True, eq=False)
class AnalyticPrediction(AncestralPrediction):
    """m = D, and the noise of a step that is right on average: of the variance of x_t given x_s.

        std^2 = std_DDIM(eta)^2 + (alpha_t (1 - e^(-z)))^2 v_s,
        v = varsigma^2 (1 - Gamma),   Gamma = E |eps|^2 / d = l,   varsigma = sigma / alpha

    v is the mean variance of x0 given x, which DDIM and DDPM leave out as they take D for x0: Gamma = 1 is
    theirs. Bao et al. 2022, Analytic-DPM (arXiv:2201.06503), Theorem 1; and as their Theorem 2 bounds the
    variance, Gamma is clipped to 0 .. 1, and sqrt(v) to half the range of the data. A step to sigma = 0 shows
    D, without noise. At lam = -inf v is that of the lowest lam that was measured.

    Gamma of an exact denoiser is l, by parts. At high noise both are nearly 1, and 1 - l is what was
    measured, where 1 - E |eps|^2 is the difference of two measured numbers: on N(0.7, 0.4^2), two
    trajectories of 3,072 elements, v at sigma = 14.6 was 0.6 to 6.7 by |eps|^2, and 0.160 = 0.4^2 by l.
    """

    statistics: Statistics = Statistics.constant()
    half_range: float = np.inf

    def flow(self, s: Level, t: Level) -> Flow:
        flow = super().flow(s, t)
        if not t.sigma:
            return flow
        unknown = -t.alpha * np.expm1(-flow.z) * self.spread(s)
        return flow._replace(std=float(np.hypot(flow.std, self.s_noise * unknown)))

    def spread(self, s: Level) -> float:
        """sqrt(v): the root mean square distance from D of what x at s may be the noised image of."""
        if np.isfinite(s.lam):
            self.statistics.check_range(s)
        lam = max(s.lam, self.statistics.lam[0])
        gamma = np.clip(np.mean(self.statistics.at("l", lam)), 0.0, 1.0)
        return float(min(np.exp(-lam) * np.sqrt(1.0 - gamma), self.half_range))


SPACING = 1 / 64
"""Spacing in lam of the quadrature between grid points, before its extrapolation."""


@dataclass(frozen=True, eq=False)
class EmpiricalPrediction:
    """m = f = (1 - l) x / alpha - D, and the flow that l, s and b imply.

        x_t = alpha_t e^(-L_t) (x_s / alpha_s - sum_j w_j (e^(-S_j) f_j - B_j) - C_t),
        w_j = int e^(L+S) ell_j,    C_t = int e^(L+S) B,    all integrals from s,
        ell_j the basis polynomials of the nodes

    Zheng et al. 2023 (arXiv:2310.13268), section 3. The authors' integrals are trapezoidal on the statistics'
    grid; ours go through the levels of the step too, and with `fine` they are divided further and
    extrapolated to spacing 0.
    """

    statistics: Statistics
    fine: bool = True

    def evaluation(self, at: Level) -> Evaluation:
        return Evaluation(at, _plain((1.0 - self.statistics.at("l", at.lam)) / at.alpha), -1.0)

    def update(self, s: Level, to: Level, stage: Stage, at: Mapping[int, Level]) -> Update:
        self.statistics.check_range(s, to)
        nodes = [at[k].lam for k in stage.uses]
        if self.fine:  # trapezoidal errors go with the square of the spacing: once Richardson's extrapolation
            coarse, fine = (self._coefficients(s, to, stage, nodes, parts) for parts in (1, 2))
            values = [(4.0 * b - a) / 3.0 for a, b in zip(coarse, fine)]
        else:
            values = self._coefficients(s, to, stage, nodes, 0)
        decay, bias, *terms = map(_plain, values)
        return Update(to, decay, tuple(zip(stage.uses, terms)), bias)

    def _coefficients(self, s: Level, to: Level, stage: Stage, nodes: list[float],
                      parts: int) -> list[np.ndarray]:
        """Decay, bias, and the coefficients of the values, by trapezoidal sums."""
        lam = self._points((s.lam, to.lam, *nodes), parts)
        start, end = np.searchsorted(lam, (s.lam, to.lam))
        places = np.searchsorted(lam, nodes)
        l, s_, b = (self.statistics.at(name, lam) for name in CURVES)  # noqa: E741
        big_l, big_s = integral(lam, l, start), integral(lam, s_, start)
        big_b = integral(lam, np.exp(-big_s) * b, start)
        step = slice(start, end + 1)
        weight = np.exp(big_l + big_s)[step]
        r = _column((lam[step] - s.lam) / (to.lam - s.lam), weight)
        moments = [integral(lam[step], weight * r**p)[-1] for p in range(len(nodes))]
        w = stage.basis([(node - s.lam) / (to.lam - s.lam) for node in nodes], moments)
        scale = to.alpha * np.exp(-big_l[end])
        bias = sum(wj * big_b[j] for wj, j in zip(w, places)) - integral(lam[step], weight * big_b[step])[-1]
        return [scale / s.alpha, scale * bias, *(-scale * wj * np.exp(-big_s[j]) for wj, j in zip(w, places))]

    def _points(self, levels: tuple[float, ...], parts: int) -> np.ndarray:
        """The grid between the outermost levels, with the levels themselves among its points.

        Its intervals are divided to SPACING, and each of those into `parts`; 0 leaves them whole.
        """
        grid = self.statistics.lam
        coarse = np.unique([*grid[(grid > min(levels)) & (grid < max(levels))], *levels])
        counts = parts * np.ceil(np.diff(coarse) / SPACING).astype(int) if parts else np.ones(
            len(coarse) - 1, int)
        share = np.concatenate([np.arange(n) / n for n in counts])
        return np.append(
            np.repeat(coarse[:-1], counts) + np.repeat(np.diff(coarse), counts) * share, coarse[-1])


def _plain(value: np.ndarray) -> float | np.ndarray:
    """A scalar as the float it is."""
    return float(value) if np.ndim(value) == 0 else np.asarray(value)
