"""What is measured: ComfyUI's deterministic samplers, and ours, with what they learn of a model beforehand.

A new solver of the catalogue is measured by existing. One that needs a calibration gets a line in CALIBRATED.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import comfy_host
import demo
from comfy.extra_samplers import uni_pc
from torch import Tensor

import samplers

from . import hypersolver

S = comfy_host.comfy_sampling()
BASELINE = "comfy/dpmpp_2m"
REFIT_PROMPTS = (*demo.LEARNED[:8], "fox", *demo.LEARNED[8:])  # none is evaluated
REFIT_BUDGETS = (4, 5, 6, 8, 10)

Options = Mapping[str, Any]  # of k_diffusion_sampler


class Seen(NamedTuple):
    """What a calibration sees of a problem: x at sigmas[0], of so many prompts, of which `samples` are for
    statistics; and what fitted_statistics found on one of them."""

    model: comfy_host.Model
    x: Tensor
    sigmas: Tensor
    samples: int
    prompts: int
    guidance: float
    measured: Options


@dataclass(frozen=True)
class Entry:
    """A sampler to measure. `cost(n)` is its model evaluations in n steps to sigma = 0.

    calibrate(Seen) -> Options is called once for each problem and guidance, on noises that are not
    evaluated. On the emoji it sees nobody's prompt, as the rule `auto` of the nodes does it, and serves all
    prompts; "own prompt" saw the one that is evaluated. train(name, model, x, sigmas, block) is the same
    for one schedule. """

    label: str
    run: Callable[..., Tensor]      # (model, x, sigmas, **options) -> x
    cost: Callable[[int], int]
    kind: str = "core"              # plain, calibrated, own prompt, refitted, hypersolver, trained, ...
    discards: bool = False          # KSampler drops the last sigma above 0 for it
    calibrate: Callable[..., Options] | None = None
    train: Callable[..., Options] | None = None
    own_prompt: bool = False        # calibrated on the prompt that is evaluated
    several: bool = False           # calibrated on REFIT_PROMPTS, where prompts differ

    @property
    def name(self) -> str:
        return self.label.split()[0]

    @property
    def variant(self) -> bool:
        """An option away from its default, or a calibration of another kind: main schedulers only."""
        return self.label != self.name

    @property
    def ours(self) -> bool:
        return self.kind != "core"

    @property
    def chooses(self) -> bool:
        """Its levels: of a schedule only the range counts."""
        return self.name == "lambda/fitted_chosen"

    def steps(self, budget: int) -> int | None:
        """The most steps that fit the budget; for ours they must spend it exactly."""
        least = budget if self.ours else 0
        return max((n for n in range(2, budget + 1) if least <= self.cost(n) <= budget), default=None)


def core(name: str, cost: Callable[[int], int] = lambda n: n, discards: bool = False, **options) -> Entry:
    unipc = {"uni_pc": uni_pc.sample_unipc, "uni_pc_bh2": uni_pc.sample_unipc_bh2}
    function = unipc.get(name) or getattr(S, "sample_" + name)

    def run(model, x, sigmas):
        if name in unipc:  # fails in float64
            x, sigmas = x.float(), sigmas.float()
        return function(model, x, sigmas, extra_args={}, disable=True, **options)

    return Entry("comfy/" + name, run, cost, discards=discards)


def ours(name: str, kind: str, about: str = "", options: Options = {}, **what: Any) -> Entry:
    def run(model, x, sigmas, **calibrated):
        sample = samplers.k_diffusion_sampler(name, **options, **calibrated)
        return sample(model, x, sigmas, extra_args={}, disable=True)

    def cost(n):  # of an AMED the same whatever was learned
        return n if what.get("calibrate") else samplers.nfe(name, n, **options)

    return Entry(" ".join(["lambda/" + name, about]).strip(), run, cost, kind, **what)


CORE = [
    core("euler"), core("dpmpp_2m"), core("ipndm"), core("ipndm_v"), core("deis"), core("lms"),
    core("uni_pc", discards=True), core("uni_pc_bh2", discards=True), core("res_multistep"),
    core("gradient_estimation"),
    core("sa_solver", tau_func=lambda sigma: 0.0), core("heun", lambda n: 2 * n - 1),
    core("dpm_2", lambda n: 2 * n - 1, discards=True), core("heunpp2", lambda n: 3 * n - 3),
]
VARIANTS = [  # name, what is different, options
    ("dpmpp_2m", "taylor", {"rule": "taylor"}),
    ("dpmpp_2m", "final off", {"lower_order_final": "off"}),
    ("dpmpp_2m", "final on", {"lower_order_final": "on"}),
    ("dpmpp_2m", "taylor, final off", {"rule": "taylor", "lower_order_final": "off"}),
    ("dpmpp_3m", "midpoint", {"rule": "midpoint"}),
    ("dpmpp_3m", "published", {"rule": "published"}),
    ("dpmpp_3m", "final off", {"lower_order_final": "off"}),
    ("dpmpp_3m", "final on", {"lower_order_final": "on"}),
    ("dpmpp_3m", "published, final off", {"rule": "published", "lower_order_final": "off"}),
    ("dpm_fast", "data", {"prediction": "data"}),
    ("dpm_fast", "noise", {"prediction": "noise"}),
    ("dpm_fast", "data, order 2", {"prediction": "data", "order": 2}),
]


def dpm_solver_v3_statistics(seen: Seen) -> Options:
    return {"statistics": samplers.estimate_statistics(seen.model, seen.x[:seen.samples], seen.sigmas)}


def fitted_statistics(seen: Seen) -> Options:
    return {"statistics": samplers.estimate_statistics(seen.model, seen.x[:seen.samples], seen.sigmas,
                                                       fitted=True)}


def refitted(seen: Seen) -> Options:
    """What was measured, refitted for every budget, a quarter of the images held out."""
    found = seen.measured["statistics"]
    for budget in REFIT_BUDGETS:
        found = samplers.refit_multistep(seen.model, seen.x, found, budget, held_out=len(seen.x) // 4,
                                         about={"prompts": seen.prompts})
    return {"statistics": found}


def hypersolved(seen: Seen) -> Options:
    """What was trained once, for all guidances, on prompts that are not evaluated."""
    found = hypersolver.trained()
    return {"statistics": replace(found, hypersolver=replace(found.hypersolver, guidance=seen.guidance))}


CALIBRATED = [  # name, what is different, options, calibration
    ("dpm_solver_v3", "", {}, dpm_solver_v3_statistics),
    ("dpm_solver_v3", "order 3", {"order": 3}, dpm_solver_v3_statistics),
    ("dpm_solver_v3", "corrector", {"corrector": "full"}, dpm_solver_v3_statistics),
    ("fitted", "", {}, fitted_statistics),
    ("fitted_chosen", "", {}, fitted_statistics),
]


def amed(form: str = "table", **how: Any) -> Callable[..., Options]:
    """AMED's training for one schedule, as the nodes do it."""
    def train(name: str, model: comfy_host.Model, x: Tensor, sigmas: Tensor, block: Any) -> Options:
        trained = samplers.fit_amed(model, x, sigmas, base=samplers.SAMPLERS[name].fixed["base"], form=form,
                                    held_out=len(x) // 5, features=block and block.features, **how)
        return {"trained": trained if form == "table" else replace(trained, features=block.features)}

    return train


TRAINED = [  # name, what is different, options, training: for every schedule by itself, so on few of them
    ("amed", "", {}, amed()),
    ("amed", "afs", {"first_step": "afs"}, amed(first_step="afs")),
    ("amed_dpmpp_2m", "", {}, amed()),
    ("amed_dpmpp_2m", "afs", {"first_step": "afs"}, amed(first_step="afs")),
    ("amed_dpmpp_2m", "untrained", {"trained": samplers.Amed.untrained()}, None),
    ("amed_dpmpp_2m", "predictor", {}, amed("predictor")),
    ("amed_ipndm", "", {}, amed()),
    ("dpmpp_2m", "afs", {"first_step": "afs"}, None),
]


def plain() -> Iterator[str]:
    """Of the catalogue what is deterministic, has a fixed cost and learns nothing beforehand."""
    for name, sampler in samplers.SAMPLERS.items():
        learns = sampler.options.keys() & {"statistics", "trained"}
        if not learns and sampler.evaluations_per_step is not None and not sampler.draws:
            yield name


def everything() -> Iterator[Entry]:
    yield from CORE
    for name in plain():
        yield ours(name, "plain")
    for name, about, options in VARIANTS:
        if any(samplers.SAMPLERS[name].options[key].default != value for key, value in options.items()):
            yield ours(name, "plain variant", about, options)
    for name, about, options, calibrate in CALIBRATED:
        yield ours(name, "calibrated variant" if about else "calibrated", about, options, calibrate=calibrate)
        if not about:
            yield ours(name, "own prompt", "own prompt", options, calibrate=calibrate, own_prompt=True)
    yield ours("fitted_chosen", "refitted", "refitted, several prompts", calibrate=refitted, several=True)
    yield ours("fitted_chosen", "refitted", "refitted, own prompt", calibrate=refitted, own_prompt=True)
    yield ours("fitted_chosen", "hypersolver", "hypersolver", calibrate=hypersolved)
    for name, about, options, train in TRAINED:
        yield ours(name, "trained variant" if about else "trained", about, options, train=train)


def entries(kinds: tuple[str, ...], names: tuple[str, ...] = ()) -> list[Entry]:
    """The entries of these kinds; of these names, if there are any ("comfy/lms")."""
    return [entry for entry in everything() if entry.kind in kinds and (not names or entry.name in names)]
