"""Measurements, side by side in one run: `python dev/benchmark.py overhead` (ratios, never absolute times).

overhead     time, peak memory and operations per step without the model's own, ours against ComfyUI's; and
             what the hypersolver adds to a step of Stable Diffusion XL
gpu          kernels, waits, time and memory of a step on a graphics card: see card.py
stochastic   distance of 10^4 images to the data, ours against ComfyUI's SDE samplers: minutes; and of the
             emoji model's images to converged ones (--images, --seconds)
distribution distance of the emoji model's images to converged ones, few evaluations (--images, --seconds)
table        writes the table of all samplers in docs/solvers.md, with a figure of each: a quarter of an hour
classifier   how often the emoji model's images have the colour they are led to (--images: 64)
hypersolver  trains the emoji model's anew: an hour or more
the others   error to the converged solution at equal model evaluations (see accuracy/__init__.py)
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment  # noqa: E402

SHAPES = {"image 1x4x128x128": (1, 4, 128, 128), "video 1x16x13x64x64": (1, 16, 13, 64, 64)}
PAIRS = [  # label, our name and options, ComfyUI's function and options
    ("2M / dpmpp_2m", ("dpmpp_2m", {}), ("sample_dpmpp_2m", {})),
    ("3M / dpmpp_3m_sde, eta 0", ("dpmpp_3m", {}), ("sample_dpmpp_3m_sde", {"eta": 0.0})),
    ("2M SDE / dpmpp_2m_sde", ("dpmpp_2m_sde", {"eta": 1.0, "corrector": "off"}),
     ("sample_dpmpp_2m_sde", {})),
    ("3M SDE / dpmpp_3m_sde", ("dpmpp_3m_sde", {"eta": 1.0}), ("sample_dpmpp_3m_sde", {})),
]
STEPS = 20
ROUNDS = 15  # timed, in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "gpu", "stochastic", "distribution", "classifier",
                                         "table", "hypersolver", "quick", "steps", "ours", "few", "hyper",
                                         "accuracy", "best"])
    parser.add_argument("--out", type=Path, default=environment.HOME / "accuracy",
                        help="a folder (default .dev/accuracy)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                        help="of gpu; cpu is its dry run")
    parser.add_argument("--against", type=Path,
                        help="the folder of a run of the same size: print how far they are apart")
    parser.add_argument("--images", type=int, default=1000,
                        help="of the emoji model, as distributions (default 1000, which is hours)")
    parser.add_argument("--seconds", type=float, default=280,
                        help="after which no more of them are begun; the next run goes on (default 280)")
    options = parser.parse_args()
    environment.enter("test")
    sys.path += [str(environment.ROOT), str(environment.ROOT / "tests")]
    if options.what == "overhead":
        overhead()
    elif options.what == "gpu":
        import card
        card.report(options.device)
        hypersolver()
    elif options.what == "stochastic":
        from accuracy.distribution import stochastic_emoji
        from accuracy.stochastic import stochastic
        stochastic()
        stochastic_emoji(options.out, options.images, options.seconds)
    elif options.what == "table":
        from accuracy.table import table
        table(options.out)
    elif options.what == "classifier":
        from accuracy.classifier import classifier
        classifier(options.images)
    elif options.what == "distribution":
        from accuracy.distribution import distribution
        distribution(options.out, options.images, options.seconds)
    elif options.what == "hypersolver":
        from accuracy.hypersolver import train
        train(options.out)
    else:
        from accuracy import accuracy
        accuracy(options.what, options.out, options.against)


def overhead() -> None:
    import torch
    from comfy_host import Model, comfy_sampling, sampling_of
    from samplers import k_diffusion_sampler

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampling = comfy_sampling()
    print(f"ours / ComfyUI's, {device}, {STEPS} steps, median of {ROUNDS} runs in turn; latents = peak "
          "memory in latents\n\n"
          "| shape | samplers | time | operations on latents a step | latents |\n|---|---|---|---|---|")
    for shape_name, shape in SHAPES.items():
        answer = torch.zeros(shape, device=device)
        model = Model(lambda x, sigma: answer, sampling_of("EPS"))
        x = torch.randn(shape, device=device) * 14.6
        levels = (14.5 * 2 ** (-9 * i / (STEPS - 1)) for i in range(STEPS))
        sigmas = torch.tensor([*levels, 0.0], device=device)
        usual = {"extra_args": {"seed": 1}, "disable": True}
        for label, (name, ours), (function, theirs) in PAIRS:
            runs = [lambda: k_diffusion_sampler(name, **ours)(model, x, sigmas, **usual),
                    lambda: getattr(sampling, function)(model, x, sigmas, **usual, **theirs)]
            times = [[seconds(run, device) for run in runs] for _ in range(ROUNDS + 1)][1:]
            ratio = statistics.median(a / b for a, b in times)
            traces = [trace(run, x) for run in runs]
            operations = " / ".join(f"{t.operations / STEPS:.1f}" for t in traces)
            latents = " / ".join(f"{t.peak / x.numel() / x.element_size():.1f}" for t in traces)
            print(f"| {shape_name} | {label} | {ratio:.2f} | {operations} | {latents} |", flush=True)
    hypersolver()
    if device == "cuda":
        waits(runs)


SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048,
    "adm_in_channels": 2816, "use_linear_in_transformer": True, "use_spatial_transformer": True,
    "num_head_channels": 64, "num_heads": -1, "num_classes": "sequential", "legacy": False}
"""ComfyUI's U-Net in the sizes of Stable Diffusion XL."""


def hypersolver() -> None:
    """What a step of the hypersolver adds: operations, counted on tensors without content, and memory."""
    import torch
    from comfy.ldm.modules import attention
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init
    from measure import Trace
    from samplers.learning.hypersolver import VIEWS, Conditions, Network, views
    from samplers.schedule import Level
    from torch.utils.flop_counter import FlopCounterMode

    def flops(call) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    shape = SHAPES["image 1x4x128x128"]
    attention.optimized_attention = attention.attention_pytorch  # its others ask how much memory is free
    with torch.device("meta"):
        unet = UNetModel(**SDXL, dtype=torch.float32, device="meta", operations=disable_weight_init)
        network, told = Network(shape[1]), torch.empty(1, len(Conditions._fields))
        one = flops(lambda: unet(torch.empty(shape), torch.empty(1), context=torch.empty(1, 77, 2048),
                                 y=torch.empty(1, 2816)))
        added = flops(lambda: network(torch.empty(1, VIEWS, *shape[1:]), network.modulation(told)))
    x, network = torch.zeros(shape), Network(shape[1]).begun()
    with torch.no_grad(), Trace() as seen:
        network(views(x, Level(0.0, 1.0, 1.0), [x, x, x]), network.modulation(torch.zeros(told.shape)))
    print(f"\nhypersolver at {'x'.join(map(str, shape))}: {added / 1e9:.2f} GFLOP a step, "
          f"{100 * added / one:.3f} % of SDXL's U-Net for one condition ({one / 1e12:.2f} TFLOP); at most "
          f"{seen.peak / 2**20:.0f} MiB beside the latents")


def seconds(run, device: str) -> float:
    import torch
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def trace(run, x):
    from measure import Trace
    with Trace(least=x.numel(), device=x.device.type) as seen:
        run()
    return seen


def waits(runs) -> None:
    """Name every wait for the GPU in one run of ours (of the last pair)."""
    import torch
    torch.cuda.set_sync_debug_mode("warn")
    try:
        runs[0]()
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    main()
