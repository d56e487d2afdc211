"""Error to the converged solution at equal model evaluations: every deterministic sampler, ours and ComfyUI's, in one run.

    python dev/benchmark.py accuracy            every scheduler, more than an hour beside other work
    python dev/benchmark.py accuracy --few      two schedulers, two prompts, guidance 1, 3, 7, every budget from 3 to 10, and AMED
    python dev/benchmark.py accuracy --best     every scheduler, many images: ComfyUI's samplers and ours that calibrate, about five hours
    python dev/benchmark.py accuracy --ours     the samplers that changed most, beside three of ComfyUI's: three schedulers, 3 images a prompt, 25 minutes
    python dev/benchmark.py accuracy --quick    three schedulers, two prompts, 5, 8 and 10 evaluations, about 3 minutes

Writes accuracy.csv (a row a cell), accuracy.md (tables) and accuracy.png (error against evaluations) to --out. With --resume
a run that was cut short goes on there: what accuracy.csv has, of the same size and code, is not measured again.

Problems
    gaussians   exact denoiser: 50 Gaussians in 3x16x16, float64; guidance towards 10 of them
    digits      exact denoiser: 1797 coloured 8x8 digits, each a Gaussian of std 0.05, float64; guidance towards the threes
    emoji       dev/tiny_emoji as ComfyUI runs it: its loader, text encoder, guider and timestep rounding, float32

A cell is problem, prompt, guidance, scheduler, budget and sampler. Its error is taken to the converged solution from the
same starting noise: the rms, and the median of |error|, over all pixels of its images. All cells are run
with the core schedulers' sigmas as KSampler makes them (dpm_2 and uni_pc without the last but one), and every run is
counted: a sampler of ours spends the budget exactly or the cell is left out; ComfyUI's heun, heunpp2 and dpm_2 take as
many steps as fit. The main schedulers (karras, sgm_uniform, exponential, which is uniform in lambda) get all budgets and
all variants of options; the others get fewer budgets and defaults only. ddim_uniform starts below sigma_max, at a sigma
that depends on its steps: its converged picture is another one, so it is left out of the list of best cells.

A new solver of the catalogue is measured by existing. One that needs a calibration gets a line in CALIBRATED.
"""
from __future__ import annotations

import contextlib
import csv
import importlib.util
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import comfy_host
import demo
import environment
import torch
from torch import Tensor

import samplers

S = comfy_host.comfy_sampling()  # ComfyUI's modules can be imported from here on
import comfy.model_sampling  # noqa: E402
import comfy.samplers  # noqa: E402
from comfy.extra_samplers import uni_pc  # noqa: E402

MAIN = ("karras", "sgm_uniform", "exponential")
BASELINE = "comfy/dpmpp_2m"
MOVING_START = "ddim_uniform"
REFIT_PROMPTS = (*demo.LEARNED[:8], "fox", *demo.LEARNED[8:])  # none is evaluated


Options = Mapping[str, Any]  # of k_diffusion_sampler


@dataclass(frozen=True)
class Size:
    """How much one run measures."""

    schedulers: tuple[str, ...]
    prompts: tuple[str, ...]
    budgets: tuple[int, ...]        # on the main schedulers
    other_budgets: tuple[int, ...]  # on the others
    guidances: tuple[float, ...]    # of the emoji
    noises: int                     # images a prompt
    exact_noises: int
    own_prompt: bool                # calibrate on every evaluated prompt too
    catalogue: bool = True          # the samplers of ours that calibrate nothing, and the variants
    refits: bool = False            # the fitted solver refitted too
    calibration_prompt: str | None = None  # what samplers are calibrated on for all prompts; None: nobody's, as `auto` does it
    core: tuple[str, ...] = ()      # of ComfyUI's samplers; all if empty
    names: tuple[str, ...] = ()     # of ours that calibrate nothing; all if empty
    stride: int = 2                 # timesteps from one to the next in the emoji's converged solution


FULL = Size(tuple(comfy.samplers.SCHEDULER_NAMES), ("red heart", "panda", "strawberry", "doughnut"), (4, 5, 6, 8, 10, 15, 20),
            (4, 5, 6, 8, 10), (3.0, 7.0, 1.0), 1, 32, True)
FEW = Size(("karras", "sgm_uniform"), ("red heart", "panda"), tuple(range(3, 11)), (), (3.0, 7.0, 1.0), 2, 16, True)
BEST = Size(tuple(name for name in FULL.schedulers if name != MOVING_START), FULL.prompts, FULL.other_budgets, FULL.other_budgets,
            FULL.guidances, 8, 512, True, catalogue=False, refits=True)
OURS = Size(MAIN, FULL.prompts, FULL.other_budgets, (), FULL.guidances, 3, 128, True,
            core=("dpmpp_2m", "lms", "ipndm_v"), names=("dpmpp_2m", "dpmpp_3m", "ipndm"), stride=5)
QUICK = Size(MAIN, ("red heart", "panda"), (5, 8, 10), (), (3.0,), 1, 16, True)


# --- samplers ---------------------------------------------------------------------------------------------------------

Run = Callable[..., Tensor]  # (model, x, sigmas, **options) -> x


@dataclass(frozen=True)
class Entry:
    """A sampler to measure. `cost(n)` is its model evaluations in n steps to sigma = 0."""

    label: str
    run: Run
    cost: Callable[[int], int]
    variant: bool = False           # an option away from its default: main schedulers only
    discards: bool = False          # KSampler drops the last sigma above 0 for it
    calibrate: Callable[[comfy_host.Model, Tensor, Tensor, int, int, Options], Options] | None = None
    own_prompt: bool = False        # calibrated on the prompt that is evaluated
    chooses: bool = False           # its levels: of a schedule only the range counts
    several: bool = False           # calibrated on REFIT_PROMPTS, where prompts differ
    train: Callable[..., Mapping[str, Any]] | None = None  # a calibration of every schedule by itself: main schedulers only

    @property
    def ours(self) -> bool:
        return self.label.startswith("lambda/")

    def steps(self, budget: int) -> int | None:
        """The most steps that fit the budget; for ours they must spend it exactly."""
        fitting = [n for n in range(2, budget + 1) if (self.cost(n) == budget if self.ours else self.cost(n) <= budget)]
        return max(fitting, default=None)


def core(name: str, cost: Callable[[int], int] = lambda n: n, discards: bool = False, **options: Any) -> Entry:
    unipc = {"uni_pc": uni_pc.sample_unipc, "uni_pc_bh2": uni_pc.sample_unipc_bh2}
    function = unipc.get(name) or getattr(S, "sample_" + name)

    def run(model, x, sigmas):
        if name in unipc:  # fails in float64
            x, sigmas = x.float(), sigmas.float()
        return function(model, x, sigmas, extra_args={}, disable=True, **options)

    return Entry("comfy/" + name, run, cost, discards=discards)


def ours(name: str, about: str = "", calibrate=None, own_prompt: bool = False, train=None, several: bool = False,
         **options: Any) -> Entry:
    def run(model, x, sigmas, **calibrated):
        return samplers.k_diffusion_sampler(name, **options, **calibrated)(model, x, sigmas, extra_args={}, disable=True)

    def cost(n):  # of an AMED the same whatever was learned
        return n if calibrate else samplers.nfe(name, n, **options)

    return Entry(" ".join(["lambda/" + name, about]).strip(), run, cost, bool(about), False, calibrate, own_prompt,
                 name == "fitted_chosen", several, train)


CORE = [
    core("euler"), core("dpmpp_2m"), core("ipndm"), core("ipndm_v"), core("deis"), core("lms"),
    core("uni_pc", discards=True), core("uni_pc_bh2", discards=True), core("res_multistep"), core("gradient_estimation"),
    core("sa_solver", tau_func=lambda sigma: 0.0),
    core("heun", lambda n: 2 * n - 1), core("dpm_2", lambda n: 2 * n - 1, discards=True), core("heunpp2", lambda n: 3 * n - 3),
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


def dpm_solver_v3_statistics(model: comfy_host.Model, x: Tensor, sigmas: Tensor, samples: int, prompts: int, measured: Options) -> Options:
    return {"statistics": samplers.estimate_statistics(model, x[:samples], sigmas)}


def fitted_statistics(model: comfy_host.Model, x: Tensor, sigmas: Tensor, samples: int, prompts: int, measured: Options) -> Options:
    return {"statistics": samplers.estimate_statistics(model, x[:samples], sigmas, fitted=True)}


def refitted(model: comfy_host.Model, x: Tensor, sigmas: Tensor, samples: int, prompts: int, measured: Options) -> Options:
    """What was measured, refitted for every budget, a quarter of the images held out."""
    found = measured["statistics"]
    for budget in BEST.budgets:
        found = samplers.refit_multistep(model, x, found, budget, held_out=len(x) // 4, about={"prompts": prompts})
    return {"statistics": found}


CALIBRATED = [  # name, what is different, options, calibration
    ("dpm_solver_v3", "", {}, dpm_solver_v3_statistics),
    ("dpm_solver_v3", "order 3", {"order": 3}, dpm_solver_v3_statistics),
    ("dpm_solver_v3", "corrector", {"corrector": "full"}, dpm_solver_v3_statistics),
    ("fitted", "", {}, fitted_statistics),
    ("fitted_chosen", "", {}, fitted_statistics),
]
"""Solvers that first see the model: the calibration is called with (model, x at sigmas[0], sigmas, how many images statistics
take, of how many prompts they are, what fitted_statistics found on one prompt) on noises that are not evaluated, once for each
problem and guidance. On the emoji it sees Size.calibration_prompt (nobody's, as `auto`) and is used for all prompts, as the
nodes do it (Statistics.for_another_prompt); "own prompt" saw the prompt that is evaluated."""


def amed(form: str = "table", **how: Any) -> Callable[..., Mapping[str, Any]]:
    """AMED's training for one schedule, as the nodes do it."""
    def train(name: str, model: comfy_host.Model, x: Tensor, sigmas: Tensor, block: Any) -> Mapping[str, Any]:
        trained = samplers.fit_amed(model, x, sigmas, base=samplers.SAMPLERS[name].fixed["base"], form=form,
                                    held_out=len(x) // 5, features=block and block.features, **how)
        return {"trained": trained if form == "table" else replace(trained, features=block.features)}

    return train


TRAINED = [  # name, what is different, options, training
    ("amed", "", {}, amed()),
    ("amed", "afs", {"first_step": "afs"}, amed(first_step="afs")),
    ("amed_dpmpp_2m", "", {}, amed()),
    ("amed_dpmpp_2m", "afs", {"first_step": "afs"}, amed(first_step="afs")),
    ("amed_dpmpp_2m", "untrained", {"trained": samplers.Amed.untrained()}, None),
    ("amed_dpmpp_2m", "predictor", {}, amed("predictor")),
    ("amed_ipndm", "", {}, amed()),
    ("dpmpp_2m", "afs", {"first_step": "afs"}, None),
]
"""AMED is trained for every schedule by itself, on noises that are not evaluated, of Size.calibration_prompt, for all prompts; with
--few only, since the training of twenty schedules takes longer than everything else."""

CALIBRATED_NAMES = {name for name, *_ in CALIBRATED}
TRAINED_NAMES = {name for name in samplers.SAMPLERS if "trained" in samplers.SAMPLERS[name].options}


def entries(size: Size) -> list[Entry]:
    result = [entry for entry in CORE if not size.core or entry.label.removeprefix("comfy/") in size.core]
    for name, sampler in samplers.SAMPLERS.items() if size.catalogue else ():
        if (not size.names or name in size.names) and name not in CALIBRATED_NAMES | TRAINED_NAMES and "eta" not in sampler.options and sampler.evaluations_per_step is not None:
            result.append(ours(name))
    for name, about, options in VARIANTS if size.catalogue and not size.names else ():
        default = all(samplers.SAMPLERS[name].options[key].default == value for key, value in options.items())
        if not default:
            result.append(ours(name, about, **options))
    for name, about, options, calibrate in CALIBRATED:
        if name not in samplers.SAMPLERS:
            print(f"NOTE: {name} is not measured: it is not in the catalogue yet")
            continue
        if size.catalogue or not about:
            result.append(ours(name, about, calibrate, **options))
        if size.own_prompt and not about:
            result.append(ours(name, "own prompt", calibrate, own_prompt=True, **options))
    if size.refits:
        result += [ours("fitted_chosen", "refitted, several prompts", refitted, several=True),
                   ours("fitted_chosen", "refitted, own prompt", refitted, own_prompt=True)]
    for name, about, options, train in TRAINED if size is FEW else ():
        result.append(ours(name, about, train=train, **options))
    return result


# --- problems ---------------------------------------------------------------------------------------------------------

@dataclass
class Mixture:
    """Posterior mean of isotropic Gaussians, by matrix products: tests/problems.py has the plain form."""

    means: Tensor  # [K, d]
    stds: Tensor   # [K]

    def __post_init__(self) -> None:
        self.squares = self.means.square().sum(1)

    def restricted(self, keep: Tensor) -> "Mixture":
        return Mixture(self.means[keep], self.stds[keep])

    def __call__(self, x: Tensor, sigma: Tensor, **extra) -> Tensor:
        y = x.flatten(1)
        variance = self.stds**2 + sigma[:, None] ** 2                                             # [B, K]
        distance = y.square().sum(1, keepdim=True) - 2 * y @ self.means.T + self.squares          # [B, K]
        posterior = (-0.5 * distance / variance - 0.5 * y.shape[1] * variance.log()).softmax(1)
        gain = posterior * self.stds**2 / variance
        return ((posterior - gain) @ self.means + gain.sum(1, keepdim=True) * y).reshape(x.shape)


def model_sampling() -> Any:
    """Stable Diffusion's sigmas, 0.029 to 14.6."""
    return comfy_host.sampling_of("ModelSamplingDiscrete", "EPS")


@dataclass
class Exact:
    """A mixture as a model with guidance: D_u + g (D_c - D_u), D_c the mixture of some of its components."""

    name: str
    mixture: Mixture
    chosen: Tensor  # bool [K]
    prompt: str
    shape: tuple[int, ...]
    noises: int
    guidances: tuple[float, ...] = (1.0, 4.0)
    dtype: torch.dtype = torch.float64
    reference_steps: int = 2000
    remembers: bool = False
    calibration_noises: int = 32
    refit_noises: int = 32
    training_noises: int = 40

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,)

    def middle_block(self) -> None:
        """There is none."""

    def session(self, prompts: Sequence[str], guidance: float, body: Callable[[comfy_host.Model], Any]) -> Any:
        conditional = self.mixture.restricted(self.chosen)

        def denoiser(x, sigma, **extra):
            y, level = x.to(self.dtype), sigma.to(self.dtype)
            denoised = conditional(y, level)
            if guidance != 1.0:
                free = self.mixture(y, level)
                denoised = free + guidance * (denoised - free)
            return denoised.to(x.dtype)

        return body(comfy_host.Model(denoiser, model_sampling()))


def gaussians(noises: int) -> Exact:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(50, 3, 4, 4, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic").clamp(-1.5, 1.5) / 1.5
    stds = 0.05 + 0.15 * torch.rand(50, generator=generator, dtype=torch.float64)
    return Exact("gaussians", Mixture(smooth.flatten(1), stds), torch.arange(50) < 10, "10 of 50", (3, 16, 16), noises)


def digits(noises: int) -> Exact:
    from sklearn.datasets import load_digits
    data = load_digits()
    generator = torch.Generator().manual_seed(2)
    ink = torch.as_tensor(data.images, dtype=torch.float64)[:, None] / 16                                  # [K, 1, 8, 8]
    paper, pen = 0.6 * torch.rand(2, len(ink), 3, 1, 1, generator=generator, dtype=torch.float64)          # [K, 3, 1, 1]
    colour = (0.4 + paper) * (1 - ink) + (pen - 1) * ink
    return Exact("digits", Mixture(colour.flatten(1), torch.full((len(ink),), 0.05, dtype=torch.float64)),
                 torch.as_tensor(data.target == 3), "threes", (3, 8, 8), noises)


class Emoji:
    """The tiny emoji checkpoint in ComfyUI's own classes. A session is one guider run; images of a batch have own prompts."""

    name = "emoji"
    shape = (3, 32, 32)
    dtype = torch.float32
    remembers = True
    calibration_noises, refit_noises = 2, 8  # the nodes' defaults for latents of this size
    training_noises = 5     # half of the nodes' default

    def __init__(self, prompts: tuple[str, ...], guidances: tuple[float, ...], noises: int, stride: int = 2) -> None:
        self.prompts, self.guidances, self.noises, self.stride = prompts, guidances, noises, stride
        folder = environment.ROOT / "dev" / "tiny_emoji"
        spec = importlib.util.spec_from_file_location("tiny_emoji", folder / "__init__.py",
                                                      submodule_search_locations=[str(folder)])
        sys.modules["tiny_emoji"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # enters the model's family into ComfyUI's list
        import comfy.sd
        self.model, self.clip, *_ = comfy.sd.load_checkpoint_guess_config(
            str(folder / "checkpoints" / "tiny_emoji.safetensors"), output_vae=False, output_clip=True)

    def middle_block(self) -> Any:
        comfy_host.pack()
        return sys.modules["custom_nodes_x_lambda-solvers.nodes.middle_block"].MiddleBlock(self.model)

    def cond(self, prompts: Sequence[str | None], negative: bool = False) -> list:
        """A cond with one prompt for each image; None: nobody's, as `auto` measures at."""
        if None in prompts:
            canonical = sys.modules[f"{comfy_host.pack().__name__}.nodes.canonical"]
            made = canonical.Text.like(self.cond([""])[0][0], negative).made(int(not negative))
            return [[made.repeat(len(prompts), 1, 1), {}]]
        each = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))[0][0] for prompt in prompts]
        return [[torch.cat(each), {}]]

    def session(self, prompts: Sequence[str], guidance: float, body: Callable[[comfy_host.Model], Any]) -> Any:
        """body(model) within a guider's run; prompts has one entry for each image of the batches body makes."""
        result = []

        class Inside(comfy.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
                       disable_pbar=False):
                host = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
                host.latent_image, host.noise = latent_image, noise
                bound = {**extra_args, "denoise_mask": None}
                result.append(body(comfy_host.Model(lambda x, sigma, **extra: host(x, sigma, **bound),
                                                    model_wrap.inner_model.model_sampling)))
                return noise

        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.cond(prompts), self.cond([None if None in prompts else ""], negative=True))
        guider.set_cfg(guidance)
        empty = torch.zeros(len(prompts), *self.shape)
        guider.sample(empty, empty, Inside(), torch.tensor([14.6, 0.0]), disable_pbar=True)
        return result[0]


Problem = Exact | Emoji


def starting_noise(problem: Problem, count: int, seed: int) -> Tensor:
    return torch.randn(count, *problem.shape, generator=torch.Generator().manual_seed(seed), dtype=problem.dtype)


def starting_x(model: comfy_host.Model, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noise as KSAMPLER scales it, for an empty latent."""
    sampling = model.inner_model.inner_model.model_sampling
    full = math.isclose(float(sampling.sigma_max), float(sigma), rel_tol=1e-5)
    return sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), full)


def schedule(scheduler: str, n: int, discards: bool, dtype: torch.dtype) -> Tensor:
    """n intervals as KSampler makes them. ValueError where the scheduler makes another number."""
    sigmas = comfy.samplers.calculate_sigmas(model_sampling(), scheduler, n + discards)
    if discards:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    if len(sigmas) != n + 1:
        raise ValueError(f"{scheduler} makes {len(sigmas) - 1} intervals of {n} steps")
    return sigmas.to(dtype)


def fine(start: float, n: int, dtype: torch.dtype) -> Tensor:
    """n intervals uniform in lambda from `start` to the model's lowest sigma, and one to 0."""
    low = float(model_sampling().sigma_min)
    return torch.tensor([*(start * (low / start) ** (i / (n - 1)) for i in range(n)), 0.0], dtype=dtype)


# --- measuring --------------------------------------------------------------------------------------------------------

class Counted(comfy_host.Model):
    """A model that counts its calls, and computes anew only what it was not asked before (to 1e-6 of the largest pixel).

    Nearly all samplers share their first two evaluations, and variants of one sampler many more. What is shared counts
    for each of them.
    """

    def __init__(self, model: comfy_host.Model, remembers: bool) -> None:
        super().__init__(model.denoiser, model.inner_model.inner_model.model_sampling)
        self.remembers, self.known, self.calls = remembers, defaultdict(list), 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra) -> Tensor:
        self.calls += 1
        if not self.remembers:
            return self.denoiser(x, sigma)
        known = self.known[float(sigma[0])]
        for earlier, denoised in known:
            if (x - earlier).abs().max() <= 1e-6 * earlier.abs().max():
                return denoised
        known.append((x.clone(), self.denoiser(x, sigma)))
        return known[-1][1]


class Reference(NamedTuple):
    x: Tensor
    agreement: float | None  # rms to a second reference of another method


def reference(problem: Problem, model: comfy_host.Model, noise: Tensor, start: float) -> Reference:
    """The converged solution by dpmpp_2m; from sigma_max held against a second one.

    ComfyUI rounds sigma to the model's 1000 timesteps, and the emoji network is rough from one to the next: two grids of 300
    steps differ by 2e-3 whatever the method, so a few hundred steps do not converge. The reference visits every second
    timestep, which is within 3e-4 of visiting all, and is held against 1000 steps uniform in lambda. The exact problems are
    smooth: their reference is held against heun.
    """
    def run(function, sigmas):
        return function(model, starting_x(model, noise, sigmas[0]), sigmas, extra_args={}, disable=True)

    highest = math.isclose(start, float(model_sampling().sigma_max), rel_tol=1e-4)
    if isinstance(problem, Exact):
        x = run(S.sample_dpmpp_2m, fine(start, problem.reference_steps, problem.dtype))
        other = run(S.sample_heun, fine(start, problem.reference_steps // 2, problem.dtype)) if highest else None
    else:
        every = [sigma for sigma in reversed(model_sampling().sigmas.tolist()) if sigma <= start * 1.0001]
        stride = problem.stride if highest else 4  # ddim_uniform's cells are few and their errors large
        x = run(S.sample_dpmpp_2m, torch.tensor([*every[:-1:stride], every[-1], 0.0]))
        other = run(S.sample_dpmpp_2m, fine(start, len(every) // (problem.stride - 1), problem.dtype)) if highest else None
    return Reference(x, None if other is None else rms(other - x))


def reference_name(problem: Problem, guidance: float, noise: Tensor) -> str:
    """What the files of a run begin with that keep its references; sigma follows."""
    return f"reference_{problem.name}_{guidance:g}_{len(noise)}_"


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@dataclass
class Table:
    """The rows measured so far, written to a file as they come."""

    path: Path
    resume: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    agreements: list[tuple[str, float, float]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    kept: set[tuple] = field(default_factory=set)  # the cells of a run before
    COLUMNS = ("problem", "prompt", "guidance", "scheduler", "budget", "evaluations", "steps", "sampler", "variant", "start",
               "rms", "median", "images", "reason")

    def __post_init__(self) -> None:
        before = list(csv.DictReader(self.path.open(newline=""))) if self.resume and self.path.exists() else []
        for row in before:
            row |= {key: float(row[key]) for key in ("guidance", "rms", "median", "start") if row[key]}
            row |= {key: int(row[key]) for key in ("budget", "evaluations", "steps", "variant") if row[key]}
        with self.path.open("w", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writeheader()
        self.add(before)
        self.kept = {(row["prompt"], *self.place(row)) for row in before}

    @staticmethod
    def place(row: Mapping[str, Any]) -> tuple:
        return tuple(row[key] for key in ("problem", "guidance", "scheduler", "budget", "sampler"))

    def has(self, row: Mapping[str, Any], prompts: Iterable[str]) -> bool:
        """Whether a run before has measured a cell for all these prompts."""
        return all((prompt, *self.place(row)) in self.kept for prompt in prompts)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        rows = list(rows)
        self.rows += rows
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerows(rows)

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self.started:6.0f} s  {text}", flush=True)


def measure(problem: Problem, size: Size, solvers: Sequence[Entry], table: Table) -> None:
    """All cells of a problem."""
    each = len(problem.prompts)
    noise = starting_noise(problem, problem.noises * each, seed=100)
    rows = [prompt for prompt in problem.prompts for _ in range(problem.noises)]
    several = each > 1
    for guidance in problem.guidances:
        def left(prompts: Sequence[str], own_prompt: bool) -> list[Entry]:
            """The entries with a cell that no run before has measured."""
            found = [row for row in cells_of(problem, size, [e for e in solvers if e.own_prompt == own_prompt], guidance)
                     if not table.has(row, prompts)]
            return [entry for entry in solvers if any(row["sampler"] == entry.label for row in found)]

        begins = reference_name(problem, guidance, noise)
        references = {float(file.stem.removeprefix(begins)): Reference(*torch.load(file))
                      for file in table.path.parent.glob(f"{begins}*.pt") if table.resume}
        shared = left(problem.prompts, own_prompt=False)
        other = [size.calibration_prompt] if several else [problem.prompts[0]]
        options = calibrated(problem, shared, guidance, other, several, table)
        with problem.middle_block() or contextlib.nullcontext() as block:
            options |= trained(problem, size, shared, guidance, block, table)
            problem.session(rows, guidance, lambda model: cells(
                problem, size, shared, options, guidance, model, noise, rows, references, table))
        for prompt in problem.prompts if several else ():
            apart = left([prompt], own_prompt=True)
            at = [i for i, row in enumerate(rows) if row == prompt]
            own = calibrated(problem, apart, guidance, [prompt], False, table)
            problem.session([prompt] * len(at), guidance, lambda model: cells(
                problem, size, apart, own, guidance, model, noise[at], [prompt] * len(at),
                {start: Reference(known.x[at], None) for start, known in references.items()}, table))


def calibrated(problem: Problem, solvers: Sequence[Entry], guidance: float, prompts: Sequence[str], elsewhere: bool,
               table: Table) -> dict[str, Mapping[str, Any] | Exception]:
    """Options of every entry that calibrates, from noises that are not evaluated; entries with one calibration share it."""
    wanted = {entry.label: (entry.calibrate, REFIT_PROMPTS if entry.several and elsewhere else tuple(prompts))
              for entry in solvers if entry.calibrate}
    sigmas = model_sampling().sigmas.flip(0).to(problem.dtype)
    result: dict[Any, Any] = {}
    plain = fitted_statistics, tuple(prompts)  # what a refit begins with
    first = [plain] if any(calibrate is refitted for calibrate, _ in wanted.values()) else []
    for calibrate, seen in dict.fromkeys([*first, *wanted.values()]):
        count = problem.calibration_noises
        if calibrate is refitted:
            count = max(problem.refit_noises, len(seen) * problem.refit_noises // 4)
        noise = starting_noise(problem, count, seed=7)

        def body(model):
            counted = Counted(model, remembers=False)
            try:
                found = dict(calibrate(counted, starting_x(model, noise, sigmas[0]), sigmas, problem.calibration_noises, len(seen),
                                       result.get(plain, {})))
                if elsewhere and "statistics" in found:
                    found["statistics"] = found["statistics"].for_another_prompt()
            except Exception as error:  # a solver in the making must not end the run: its cells say why they are empty
                found = error
            table.say(f"{problem.name}, guidance {guidance:g}: {calibrate.__name__} of {', '.join(map(str, seen))}, {counted.calls} evaluations of "
                      f"{count} images")
            return found

        result[calibrate, seen] = problem.session([seen[k % len(seen)] for k in range(count)], guidance, body)
    return {label: result[key] for label, key in wanted.items()}


def trained(problem: Problem, size: Size, solvers: Sequence[Entry], guidance: float, block: Any,
            table: Table) -> dict[str, Any]:
    """For every entry that is trained, its options for (scheduler, steps)."""
    wanted = [entry for entry in solvers if entry.train]
    noise = starting_noise(problem, problem.training_noises, seed=7)

    def body(model):
        result: dict[str, Any] = {}
        for entry in wanted:
            made, spent = {}, []
            for scheduler in filter(size.schedulers.__contains__, MAIN):
                for n in filter(None, map(entry.steps, size.budgets)):
                    counted = Counted(model, remembers=False)
                    sigmas = schedule(scheduler, n, False, problem.dtype)
                    try:
                        made[scheduler, n] = dict(entry.train(entry.label.split()[0].removeprefix("lambda/"), counted,
                                                              starting_x(model, noise, sigmas[0]), sigmas, block))
                    except Exception as error:  # its cells say why they are empty
                        made[scheduler, n] = error
                    spent.append(f"{counted.calls} for {entry.cost(n)}")
            result[entry.label] = made
            table.say(f"{problem.name}, guidance {guidance:g}: {entry.label} trained; evaluations of {len(noise)} images: "
                      f"{', '.join(dict.fromkeys(spent))}")
        return result

    prompt = size.calibration_prompt if len(problem.prompts) > 1 else problem.prompts[0]
    return problem.session([prompt] * len(noise), guidance, body) if wanted else {}


def cells_of(problem: Problem, size: Size, solvers: Sequence[Entry], guidance: float) -> Iterator[dict[str, Any]]:
    """Every cell of these entries, as the beginning of its row."""
    for scheduler in size.schedulers:
        main = scheduler in MAIN
        for budget in size.budgets if main else size.other_budgets:
            for entry in solvers:
                n = entry.steps(budget)
                if n is None or ((entry.variant or entry.train) and not main):
                    continue
                if scheduler == MOVING_START and (entry.discards or n != budget):
                    continue  # starts elsewhere than the baseline does
                yield {"problem": problem.name, "guidance": guidance, "scheduler": scheduler, "budget": budget,
                       "sampler": entry.label, "variant": int(entry.variant), "steps": n}


def cells(problem: Problem, size: Size, solvers: Sequence[Entry], options: Mapping[str, Any], guidance: float,
          model: comfy_host.Model, noise: Tensor, prompts: Sequence[str], references: dict[float, Reference],
          table: Table) -> None:
    """The cells of one guidance that no run before has measured: every scheduler, budget and entry."""
    entries_by_label = {entry.label: entry for entry in solvers}
    of_budget: dict[tuple, Counted] = {}
    chosen: dict[tuple, Tensor] = {}  # where runs ended that are the same on every schedule of their range
    for row in cells_of(problem, size, solvers, guidance):
        if table.has(row, prompts):
            continue
        at = row["scheduler"], row["budget"]
        if at not in of_budget:
            of_budget = {at: Counted(model, problem.remembers)}
            table.say(f"{problem.name}, guidance {guidance:g}, {row['scheduler']}, {row['budget']} evaluations")
        entry = entries_by_label[row["sampler"]]
        own = options.get(entry.label, {})
        own = own[row["scheduler"], row["steps"]] if entry.train else own
        looks = isinstance(own, Mapping) and getattr(own.get("trained"), "predictor", None)
        counted = Counted(model, remembers=False) if looks else of_budget[at]  # what is remembered has no middle block
        table.add(cell(problem, entry, own, counted, noise, prompts, references, table, row,
                       chosen if entry.chooses else {}))


def cell(problem: Problem, entry: Entry, options: Any, model: Counted, noise: Tensor, prompts: Sequence[str],
         references: dict[float, Reference], table: Table, row: dict[str, Any], same: dict[tuple, Tensor]) -> list[dict[str, Any]]:
    """The rows of one run, one for each prompt. `same`: runs that need not be made again."""
    model.calls, x = 0, None
    try:
        if isinstance(options, Exception):
            raise options
        sigmas = schedule(row["scheduler"], row["steps"], entry.discards, problem.dtype)
        start = float(sigmas[0])
        run = entry.label, row["steps"], round(start, 4)
        if run in same:
            model.calls = entry.cost(row["steps"])
        else:
            same[run] = entry.run(model, starting_x(model, noise, sigmas[0]), sigmas.clone(), **options)
        x = same[run]
        reason = "" if x.isfinite().all() else "not finite"
    except Exception as error:  # recorded, whatever it is: a sampler that fails is a result
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if reason:
        return [{**row, "prompt": prompt, "rms": math.nan, "median": math.nan, "reason": reason} for prompt in unique(prompts)]
    exact = entry.cost(row["steps"])
    assert model.calls == exact <= row["budget"], f"{entry.label} took {model.calls} evaluations, not {exact}: {row}"
    key = round(start, 4)
    if key not in references:
        references[key] = reference(problem, model.__class__(model, remembers=False), noise, start)
        torch.save(tuple(references[key]), table.path.with_name(f"{reference_name(problem, row['guidance'], noise)}{key:g}.pt"))
        if references[key].agreement is not None:
            table.agreements.append((problem.name, row["guidance"], references[key].agreement))
            table.say(f"{problem.name}, guidance {row['guidance']:g}: two references differ by {references[key].agreement:.2g}")
    error = x - references[key].x
    result = []
    for prompt in unique(prompts):
        own = error[[i for i, name in enumerate(prompts) if name == prompt]]
        result.append({**row, "prompt": prompt, "evaluations": model.calls, "start": key, "rms": rms(own),
                       "median": float(own.abs().median()), "images": " ".join(f"{rms(image):.4g}" for image in own)})
    return result


def unique(prompts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(prompts))


# --- report -----------------------------------------------------------------------------------------------------------

def mean(values: Iterable[float]) -> float:
    """Geometric."""
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def good(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["rms"] > 0]  # leaves out nan


def ratios(rows: Sequence[dict[str, Any]], what: str = "rms") -> dict[str, list[tuple[dict[str, Any], float]]]:
    """For each sampler its cells with the ratio of its error to dpmpp_2m's in the same cell."""
    place = lambda row: tuple(row[key] for key in ("problem", "prompt", "guidance", "scheduler", "budget"))
    base = {place(row): row[what] for row in good(rows) if row["sampler"] == BASELINE}
    result = defaultdict(list)
    for row in good(rows):
        if place(row) in base and row[what] > 0:
            result[row["sampler"]].append((row, row[what] / base[place(row)]))
    return result


def report(table: Table, size: Size, seconds: float) -> str:
    problems = unique([row["problem"] for row in table.rows])
    parts = [f"# Error at equal evaluations\n\nWritten by `python dev/benchmark.py accuracy{ {QUICK: ' --quick', FEW: ' --few', BEST: ' --best', OURS: ' --ours'}.get(size, '') }`"
             f" in {seconds / 60:.0f} minutes; {len(table.rows)} cells in accuracy.csv. What is measured and how: "
             "`dev/accuracy.py`. `comfy/` is ComfyUI's sampler, `lambda/` ours. Errors are rms over pixels; values are in "
             "-1 to 1.", "## Summary", summary_table(table.rows, problems), agreement_table(table)]
    for problem in problems:
        rows = [row for row in table.rows if row["problem"] == problem]
        parts += [f"## {problem}", best_table(rows), oracle_table(rows, size), RATIO_HELP, "By rms:", ratio_table(rows, size, "rms"),
                  "By median:", ratio_table(rows, size, "median")]
    parts.append(failure_table(table.rows))
    return "\n\n".join(parts) + "\n"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def agreement_table(table: Table) -> str:
    lines = []
    for problem, guidance, difference in table.agreements:
        errors = [r["rms"] for r in good(table.rows) if r["problem"] == problem and r["guidance"] == guidance]
        lines.append([problem, f"{guidance:g}", f"{difference:.1e}", f"{min(errors):.1e}", f"{statistics.median(errors):.1e}"])
    return ("How far two references that were made differently are apart. Errors that are not far above this cannot be told "
            "apart:\n\n"
            + markdown(["problem", "guidance", "difference of the references", "smallest error", "median error"], lines))


def best_table(rows: Sequence[dict[str, Any]]) -> str:
    """The best sampler x scheduler of every guidance and budget, chosen after the fact."""
    found = defaultdict(list)
    whole = len({row["prompt"] for row in rows})
    for row in good(rows):
        if row["scheduler"] != MOVING_START:
            found[row["guidance"], row["budget"], row["sampler"], row["scheduler"]].append(row["rms"])
    lines = []
    for guidance in sorted({row["guidance"] for row in rows}):
        for budget in sorted({row["budget"] for row in rows}):
            means = {key[2:]: mean(v) for key, v in found.items() if key[:2] == (guidance, budget) and len(v) == whole}
            cells = [f"{guidance:g}", f"{budget}"]
            for prefix in ("comfy/", "lambda/"):
                part = {key: value for key, value in means.items() if key[0].startswith(prefix)}
                best = min(part, key=part.get)
                cells.append(f"{best[0].removeprefix(prefix)}, {best[1]}: {part[best]:.3g}")
            usual = min((value, key[1]) for key, value in means.items() if key[0] == BASELINE)
            lines.append([*cells, f"{usual[1]}: {usual[0]:.3g}"])
    return ("The best cell of each budget (geometric mean over prompts), chosen with the result known, so nobody's choice "
            "beforehand is as good; beside it `dpmpp_2m` with its best scheduler:\n\n"
            + markdown(["guidance", "evaluations", "best of ComfyUI's", "best of ours", "comfy/dpmpp_2m"], lines))


def oracle_table(rows: Sequence[dict[str, Any]], size: Size) -> str:
    """Every sampler on one scheduler, the one with the lowest mean, against ComfyUI's best sampler x scheduler of each cell."""
    budgets = size.other_budgets or size.budgets  # those of every scheduler
    rows = [row for row in good(rows) if row["scheduler"] != MOVING_START and row["budget"] in budgets]
    place = lambda row: (row["prompt"], row["guidance"], row["budget"])
    parts = []
    for what in ("rms", "median"):
        best: dict[tuple, float] = defaultdict(lambda: math.inf)
        for row in rows:
            if row["sampler"].startswith("comfy/"):
                best[place(row)] = min(best[place(row)], row[what])
        for guidance in sorted({row["guidance"] for row in rows}):
            found: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
            for row in rows:
                plain = not row["variant"] or "own prompt" in row["sampler"] or "refitted" in row["sampler"]
                if row["guidance"] == guidance and row[what] > 0 and plain:
                    found[row["sampler"], row["scheduler"]].append((row["budget"], row[what] / best[place(row)]))
            full = max(map(len, found.values()))
            means = {key: mean(r for _, r in pairs) for key, pairs in found.items() if len(pairs) == full}
            chosen = {name: min((key for key in means if key[0] == name), key=means.get) for name in unique([k[0] for k in means])}
            lines = [[name, key[1], *(shown([r for n, r in found[key] if n == budget]) for budget in budgets), f"{means[key]:.2f}"]
                     for name, key in sorted(chosen.items(), key=lambda item: means[item[1]])]
            parts.append(f"By {what}, guidance {guidance:g}:\n\n"
                         + markdown(["sampler", "scheduler", *map(str, budgets), "mean"], lines))
    return ("Every sampler on the one scheduler that suited it best over all these budgets, as a ratio to the best sampler x "
            "scheduler of ComfyUI's in each cell, which nobody knows beforehand; geometric mean over prompts:\n\n" + "\n\n".join(parts))


RATIO_HELP = ("Error as a ratio to `comfy/dpmpp_2m` in the same cell (below 1 is better), geometric mean over prompts, guidances "
              f"and the schedulers {', '.join(MAIN)}. Better: in how many of those cells by more than 0.5 %. A sampler without "
              "cells at some budgets has a mean over the others only. Where the rms of a few images that ended up elsewhere "
              "hides the rest (digits), the median shows it.")


def ratio_table(rows: Sequence[dict[str, Any]], size: Size, what: str) -> str:
    lines = []
    found = ratios(rows, what)
    main = {name: [(row, ratio) for row, ratio in pairs if row["scheduler"] in MAIN] for name, pairs in found.items()}
    for sampler in sorted(main, key=lambda name: mean(ratio for _, ratio in main[name])):
        part = main[sampler]
        other = [ratio for row, ratio in found[sampler] if row["scheduler"] not in MAIN]
        lines.append([sampler, *(shown([r for row, r in part if row["budget"] == budget]) for budget in size.budgets),
                      shown([r for _, r in part]), f"{sum(r < 0.995 for _, r in part)} of {len(part)}", shown(other)])
    return markdown(["sampler", *map(str, size.budgets), "mean", "better", "other schedulers"], lines)


def shown(values: Sequence[float]) -> str:
    return f"{mean(values):.2f}" if values else ""


def summary_table(rows: Sequence[dict[str, Any]], problems: Sequence[str]) -> str:
    """All samplers with their defaults, sorted by their mean over the problems at 10 evaluations and fewer."""
    found = {name: kept for name, pairs in ratios(rows).items()
             if (kept := [(row, r) for row, r in pairs if row["scheduler"] in MAIN and not row["variant"]])}
    full = max(len(pairs) for pairs in found.values())
    ranges = [("10 and fewer", 0, 10), ("more", 11, 999)]
    ranges = [part for part in ranges if any(part[1] <= row["budget"] <= part[2] for row in rows)]

    def over(name: str, problem: str, low: int, high: int) -> list[float]:
        return [r for row, r in found[name] if row["problem"] == problem and low <= row["budget"] <= high]

    def overall(name: str) -> float:
        return mean(mean(values) for problem in problems if (values := over(name, problem, 0, 10)))

    order = sorted(found, key=lambda name: (len(found[name]) < full, overall(name)))
    lines = [[name, f"{overall(name):.2f}", *(shown(over(name, problem, low, high)) for _, low, high in ranges
                                              for problem in problems), f"{len(found[name])} of {full}"] for name in order]
    return ("Every sampler with its defaults: rms as a ratio to `comfy/dpmpp_2m` in the same cell (below 1 is better), geometric "
            f"mean over prompts, guidances and the schedulers {', '.join(MAIN)}; the column \"all\" weighs the problems alike. "
            "Last come those that do not have all cells (budgets they cannot spend, failures): their means are over other "
            "cells. `comfy/euler`, `lambda/dpmpp_1m` and `lambda/dpm_1m` are one method, so are the two `dpmpp_2m`; heun, dpm_2 "
            "and heunpp2 spend less than the budget where it does not fit. The evaluations of a calibration are not counted:\n\n"
            + markdown(["sampler", "all, 10 and fewer", *(f"{problem}, {name}" for name, *_ in ranges for problem in problems),
                        "cells"], lines))


def failure_table(rows: Sequence[dict[str, Any]]) -> str:
    failed = Counter((row["problem"], row["sampler"], row["scheduler"], row["reason"]) for row in rows if row.get("reason"))
    if not failed:
        return "## Failures\n\nNone."
    return "## Failures\n\n" + markdown(["problem", "sampler", "scheduler", "reason", "rows"],
                                        [[*key, str(count)] for key, count in failed.items()])


def plot(table: Table, path: Path) -> None:
    """A panel a problem: geometric mean of the rms over prompts, guidances and the main schedulers."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [row for row in good(table.rows) if row["scheduler"] in MAIN and not row["variant"]]
    problems, names = unique([row["problem"] for row in rows]), unique([row["sampler"] for row in rows])
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(1, len(problems), figsize=(5 * len(problems) + 2.5, 6), squeeze=False)
    for axis, problem in zip(axes[0], problems):
        for name in names:
            mine = name.startswith("lambda/")
            place = [n for n in names if n.startswith("lambda/") == mine].index(name)
            points = defaultdict(list)
            for row in rows:
                if (row["problem"], row["sampler"]) == (problem, name):
                    points[row["evaluations"]].append(row["rms"])
            at = sorted(points)
            axis.plot(at, [mean(points[n]) for n in at], "-o" if mine else "--x", label=name, markersize=4,
                      color="black" if name == BASELINE else colours(place % colours.N),
                      zorder=3 if name == BASELINE else 2, linewidth=2.5 if mine and name.removeprefix("lambda/") in {"dpmpp_2m", *CALIBRATED_NAMES} else 1.1)
        ticks = sorted({row["evaluations"] for row in rows})
        axis.set(xscale="log", yscale="log", title=problem, xlabel="model evaluations")
        axis.set_xticks(ticks, [str(tick) if tick in (3, 5, 8, 10, 15, 20) else "" for tick in ticks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel(f"rms error to the converged solution\n(geometric mean over prompts, guidances and {', '.join(MAIN)})")
    axes[0][-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def accuracy(size: Size, out: Path, resume: bool) -> None:
    """The whole measurement."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    table = Table(out / "accuracy.csv", resume)
    solvers = entries(size)
    print(f"{len(solvers)} samplers, {len(size.schedulers)} schedulers, evaluations {', '.join(map(str, size.budgets))}")
    with torch.inference_mode():
        for problem in (lambda: gaussians(size.exact_noises), lambda: digits(size.exact_noises),
                        lambda: Emoji(size.prompts, size.guidances, size.noises, size.stride)):
            measure(problem(), size, solvers, table)
    plot(table, out / "accuracy.png")
    (out / "accuracy.md").write_text(report(table, size, time.perf_counter() - table.started))
    table.say(f"written: {out / 'accuracy.csv'}, accuracy.md, accuracy.png")
