"""`python dev/benchmark.py gpu`: what a step costs beside the model, every sampler against ComfyUI's equal.

The model is a stand-in of one multiplication, so what is seen is the sampler's own: kernels launched, times
that the host waits for the card, time and memory. On the CPU (`--device cpu`, smaller latents) the same table
tells operators instead of kernels, the noise's on the host among them, and reads of numbers for waits.
"""
from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple

import numpy as np
import torch
from torch import Tensor

import environment
from comfy_host import Model, comfy_sampling, sampling_of
from comfyui_server import Server
from measure import Trace, Work, work
from problems import needed
from samplers import SAMPLERS, Statistics, k_diffusion_sampler
from samplers.learning.hypersolver import Conditions, Network, views
from samplers.noise import BrownianNoise
from samplers.schedule import PATHS, Level
from test_server import Graph

EQUALS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dpmpp_1m": ("euler", {}), "dpmpp_2m": ("dpmpp_2m", {}), "dpmpp_3m": ("dpmpp_3m_sde", {"eta": 0.0}),
    "dpm_1m": ("euler", {}), "dpm_2m": ("ipndm_v", {"max_order": 2}), "dpm_3m": ("ipndm_v", {"max_order": 3}),
    "uni_pc_bh1": ("uni_pc", {}), "uni_pc_bh2": ("uni_pc_bh2", {}),
    "dpmpp_2s": ("seeds_2", {"eta": 0.0}), "dpmpp_3s": ("seeds_3", {"eta": 0.0}),
    "dpm_2s": ("dpm_2", {}), "dpm_3s": ("heunpp2", {}), "dpmpp_fast": ("dpm_fast", {}),
    "dpm_fast": ("dpm_fast", {}), "dpm_adaptive_12": ("dpm_adaptive", {"order": 2}),
    "dpm_adaptive_23": ("dpm_adaptive", {"order": 3}), "rk45": ("dpm_adaptive", {"order": 3}),
    "pc": ("euler_ancestral", {}), "dpmpp_sde": ("euler_ancestral", {}),
    "dpmpp_2s_sde": ("seeds_2", {}), "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}), "ddim": ("euler", {}), "ddpm": ("euler_ancestral", {}),
    "analytic_dpm": ("euler_ancestral", {}),
    "dpm_solver_v3": ("res_multistep", {}), "fitted": ("dpmpp_2m", {}), "fitted_chosen": ("dpmpp_2m", {}),
    "ipndm": ("ipndm", {}), "heun": ("heun", {}), "amed": ("dpm_2", {}), "amed_euler": ("dpm_2", {}),
    "amed_dpm_2": ("dpm_2", {}), "amed_ipndm": ("ipndm", {}), "amed_dpmpp_2m": ("dpm_2", {}),
    "amed_dpmpp_3m": ("dpm_2", {}),
}
"""Of every sampler ComfyUI's of the same work; where it has none, the one of as many evaluations that is
nearest. On a card those that draw their noise there."""

IMAGES = (4, 64, 64), (4, 128, 128)
VIDEO = (16, 21, 90, 160)
SMALL = (4, 16, 16), (4, 32, 32), (16, 3, 8, 8)
FEW, MANY = 8, 16  # steps of two runs, whose difference is what a step costs


@dataclass
class Subject:
    """A sampler, ours or theirs: run(model, x, steps)."""

    call: Callable[..., Tensor]
    adaptive: bool = False
    ends: bool = False  # called with the schedule's ends, ComfyUI's dpm_fast and dpm_adaptive

    def run(self, model: Callable, x: Tensor, steps: int) -> Tensor:
        levels = [14.5 * 2 ** (-9 * i / (steps - 1)) for i in range(steps)]
        usual = {"extra_args": {"seed": 1}, "disable": True, "callback": lambda shown: None}
        if self.adaptive:
            usual["rtol"] = 0.5**steps
        if self.ends:
            how = {} if self.adaptive else {"n": steps}
            return self.call(model, x, levels[-1], levels[0], **how, **usual)
        return self.call(model, x, torch.tensor([*levels, 0.0], device=x.device), **usual)


def ours(name: str, device: str) -> Subject:
    adaptive = SAMPLERS[name].evaluations_per_step is None
    options = needed(name)
    if "noise_device" in SAMPLERS[name].options:
        options["noise_device"] = "gpu" if device == "cuda" else "cpu"

    def call(*arguments: Any, rtol: float | None = None, **usual: Any) -> Tensor:
        least = rtol and max(rtol, 1e-5)
        own = options if rtol is None else {**options, "rtol": least, "atol": least}
        return k_diffusion_sampler(name, **own)(*arguments, **usual)

    return Subject(call, adaptive)


def theirs(name: str, device: str) -> Subject:
    sampling = comfy_sampling()
    function, options = EQUALS[name]
    if function.startswith("uni_pc"):
        from comfy.extra_samplers import uni_pc
        found = {"uni_pc": uni_pc.sample_unipc, "uni_pc_bh2": uni_pc.sample_unipc_bh2}[function]
    else:
        on_card = getattr(sampling, f"sample_{function}_gpu", None) if device == "cuda" else None
        found = on_card or getattr(sampling, f"sample_{function}")
    adaptive = function == "dpm_adaptive"
    return Subject(lambda *arguments, **usual: found(*arguments, **usual, **options), adaptive,
                   adaptive or function == "dpm_fast")


class StandIn:
    """D = x / 2 at every level: one launch a call, which is not counted."""

    def __init__(self) -> None:
        self.calls = 0
        self.model = Model(self, sampling_of("EPS"))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return x * 0.5


class Cost(NamedTuple):
    """Of one model evaluation; and waits of a whole run of MANY steps."""

    launches: float
    waits: float
    run: int


def cost(subject: Subject, x: Tensor) -> Cost:
    """From the difference of two runs, so that what a run costs once is not counted."""
    counted: list[tuple[Work, int]] = []
    for steps in (FEW, FEW, MANY):  # the first one warms up
        stand_in = StandIn()
        counted.append((work(lambda: subject.run(stand_in.model, x, steps), x.device.type), stand_in.calls))
    (few, calls), (many, more) = counted[1:]
    launches, waits = ((b - a) / (more - calls) for a, b in zip(few, many))
    return Cost(launches - 1.0, waits, many.waits)


def milliseconds(subjects: list[Subject], x: Tensor, rounds: int) -> list[float]:
    """Of a model evaluation: the median of runs in turn. An adaptive solver's tolerance is that of FEW steps:
    bfloat16 is not exact enough for that of MANY."""
    found: list[list[float]] = [[] for _ in subjects]
    for _ in range(rounds + 1):
        for subject, times in zip(subjects, found):
            stand_in, start = StandIn(), time.perf_counter()
            subject.run(stand_in.model, x, FEW if subject.adaptive else MANY)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start) / stand_in.calls)
    return [statistics.median(times[1:]) for times in found]


def peak(subject: Subject, x: Tensor) -> float:
    """The most memory of a run beside x, in latents like x."""
    size = x.numel() * x.element_size()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject.run(StandIn().model, x, FEW)
        return (torch.cuda.max_memory_allocated() - before) / size
    with Trace(least=x.numel()) as seen:
        subject.run(StandIn().model, x, FEW)
    return seen.peak / size


def noise(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (14.5 * torch.randn((1, *shape), generator=generator)).to(device, dtype)


def table(device: str, names: list[str], rounds: int = 5) -> None:
    small, large, video = (*IMAGES, VIDEO) if device == "cuda" else SMALL
    counted, read = ("kernels", "waits") if device == "cuda" else ("operators", "numbers read")
    timed = [(small, torch.float16), (large, torch.float16), (video, torch.bfloat16)]
    heads = [f"ms, {'x'.join(map(str, shape))} {str(dtype)[6:]}" for shape, dtype in timed]
    print("ours / ComfyUI's, for one model evaluation without the model\n\n| ours | ComfyUI's | "
          f"{counted}, float32 | {counted}, float16 | {read} | {read} in {MANY} steps | peak, latents | "
          f"{' | '.join(heads)} |\n|{'---|' * (7 + len(heads))}")
    for name in names:
        both = [ours(name, device), theirs(name, device)]
        costs = {dtype: [cost(subject, noise(small, device, dtype)) for subject in both]
                 for dtype in (torch.float32, torch.float16)}
        cells = [" / ".join(f"{one.launches:.3g}" for one in costs[dtype]) for dtype in costs]
        for of in ("waits", "run"):
            cells.append(" / ".join(f"{getattr(one, of):.3g}" for one in costs[torch.float32]))
        cells.append(" / ".join(f"{peak(one, noise(large, device, torch.float32)):.3g}" for one in both))
        cells += [" / ".join(f"{ms:.3g}" for ms in milliseconds(both, noise(shape, device, dtype), rounds))
                  for shape, dtype in timed]
        print(f"| {name} | {EQUALS[name][0]} | {' | '.join(cells)} |", flush=True)


def hypersolver(device: str) -> None:
    """What the network of one step takes, at every size of latents."""
    print("\n| hypersolver at | ms a step |\n|---|---|")
    for shape in (*IMAGES, VIDEO) if device == "cuda" else SMALL:
        x = noise(shape, device, torch.float32)
        network = Network(len(x[0])).begun().to(device)
        told = torch.zeros(1, len(Conditions._fields), device=device)
        times = []
        with torch.no_grad():
            for _ in range(6):
                start = time.perf_counter()
                network(views(x, Level(0.0, 1.0, 1.0), [x, x, x]), network.modulation(told))
                if x.is_cuda:
                    torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - start))
        print(f"| {'x'.join(map(str, shape))} | {statistics.median(times[1:]):.3g} |")


def same_noise(device: str) -> str:
    """Whether a seed draws the same noise for latents on the card, and how far the images are apart."""
    if device == "cpu":
        return "noise on the CPU and on the card: needs a card. Open"
    x, path = noise(IMAGES[0], "cpu", torch.float32), PATHS["ve"]
    drawn = [BrownianNoise(like, 7)(path.level(10.0), path.level(1.0)).cpu() for like in (x, x.to(device))]
    run = k_diffusion_sampler("dpmpp_2m_sde")
    levels, extra = torch.tensor([14.5, 5.0, 2.0, 1.0, 0.3, 0.0]), {"seed": 7}
    images = [run(lambda x, sigma: x * 0.5, x.to(at), levels.to(at), extra, disable=True).cpu()
              for at in ("cpu", device)]
    apart = float((images[0] - images[1]).abs().max() / images[0].std())
    return (f"noise on the CPU and on the card: {'equal' if torch.equal(*drawn) else 'NOT EQUAL'}; images of "
            f"dpmpp_2m_sde at most {apart:.1e} of their spread apart")


def hosted(device: str) -> str:
    """In a real server: the model in bfloat16 against float32, and outside the card against on it."""
    ways = {"float32": ["--fp32-unet"], "bfloat16": ["--bf16-unet"]}
    if device == "cuda":
        ways["offloaded"] = ["--fp32-unet", "--novram"]
    images, curves = {}, {}
    for name, arguments in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            base = environment.base_directory(Path(folder))
            environment.link_to(base / "custom_nodes" / "doubles", environment.ROOT / "tests" / "doubles")
            with Server(environment.ensure(), base, *arguments) as server:
                images[name] = Graph.emoji("panda").ksampler("lambda_v3").samples(server)
            [file] = base.glob("models/solver_calibrations/*.safetensors")
            curves[name] = Statistics.load(file)
    whole, half = curves["float32"], curves["bfloat16"]
    apart = ", ".join(f"{name} {np.sqrt(np.mean((getattr(whole, name) - getattr(half, name)) ** 2)):.2g}"
                      for name in ("l", "s", "b"))
    rms = {name: float((image - images["float32"]).square().mean().sqrt()) for name, image in images.items()}
    return (f"the emoji model measured in bfloat16 and in float32: {apart} apart (rms over lam); images of "
            f"lambda_v3, 8 steps, {rms['bfloat16']:.2g} apart (rms)\n\na run beside an offloaded model: "
            + (f"its image is {rms['offloaded']:.2g} from that of one on the card" if device == "cuda" else
               "needs a card. Open"))


def report(device: str) -> None:
    """The whole of it; SystemExit where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu: PyTorch sees no CUDA device here. Run this on a machine with a graphics card, "
                         "or the dry run on smaller latents: python dev/benchmark.py gpu --device cpu")
    torch.set_num_threads(1)
    print(torch.cuda.get_device_name() if device == "cuda" else "a dry run on the CPU: no card was used",
          f"PyTorch {torch.__version__}\n", sep=", ")
    table(device, list(SAMPLERS))
    hypersolver(device)
    print("", same_noise(device), hosted(device), sep="\n\n", flush=True)
