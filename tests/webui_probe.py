"""A script for the extensions/ of a real WebUI: what a sampler of ours returned there, beside a direct call.

"closed form" in a prompt answers in place of the checkpoint's network, at no cost, or "slowly". This runs in
the WebUI's Python, where the pack is loaded as lambda_solvers_pack.
"""
import importlib.util
import sys
import time
from pathlib import Path

import torch
from modules import paths, scripts

FORGE = importlib.util.find_spec("modules_forge") is not None
RUNS = Path(paths.data_path) / "runs"
OPTIONS = {"Lambda eta": "eta", "Lambda first step": "first_step"}
asked = []


class Probe(scripts.Script):
    def title(self):
        return "Probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process_before_every_sampling(self, p, *args, **kwargs):
        if "closed form" in p.prompt:
            answered(p, slowly if "slowly" in p.prompt else closed_form)
        if hasattr(p.sampler, "solver") and not hasattr(p.sampler, "probed"):
            p.sampler.func, p.sampler.probed = probed(p, p.sampler.func), True


def answered(p, function):
    """function(x, sigma, texts) in place of the network, for this job."""
    if FORGE:
        unet = p.sd_model.forge_objects.unet.clone()
        unet.set_model_unet_function_wrapper(
            lambda network, told: function(told["input"], told["timestep"], told["c"]["c_crossattn"]))
        p.sd_model.forge_objects.unet = unet
    else:
        p.sampler.model_wrap.forward = lambda x, sigma, cond: function(x, sigma, cond["c_crossattn"][0])


def closed_form(x, sigma, texts):
    """Data near two values, around what the prompt says."""
    asked.append(len(x))
    mean, sigma = texts.mean((1, 2))[:, None, None, None], sigma[:, None, None, None]
    return mean + torch.tanh((x - mean) / (sigma.square() + 0.3))


def slowly(x, sigma, texts):
    time.sleep(0.1)
    return closed_form(x, sigma, texts)


def probed(p, own):
    """The function of a sampler, which leaves what it returned in the folder RUNS."""

    def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
        start, random = x.clone(), torch.random.get_rng_state()
        asked.clear()
        try:
            found = own(model, x, sigmas, extra_args, callback, disable)
        except BaseException:
            keep({"asked": len(asked)})
            raise
        entry = {"asked": len(asked), "counted": model.step, "sigmas": sigmas.tolist(),
                 "latents": found.cpu(), "moved": not torch.equal(random, torch.random.get_rng_state())}
        if model.mask is None:
            entry["direct"] = direct(p, start, sigmas, extra_args).cpu()
        keep(entry)
        return found

    return run


def keep(entry):
    RUNS.mkdir(exist_ok=True)
    torch.save(entry, RUNS / f"{len([*RUNS.iterdir()]):03d}.pt")


def direct(p, x, sigmas, extra):
    """What the solver makes of the same noise as it is called in a program: the network alone is asked, with
    the guidance and the options that the infotext says."""
    pack = sys.modules["lambda_solvers_pack.samplers"]
    told = torch.stack([several[0].schedules[0].cond for several in extra["cond"].batch])
    free = torch.stack([one[0].cond for one in extra["uncond"]])
    scale = p.hr_cfg if getattr(p, "is_hr_pass", False) and hasattr(p, "hr_cfg") else p.cfg_scale

    def denoise(x, sigma, seed):
        x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        if FORGE:
            without, having = forge(p, x, sigma, torch.cat([free, told])).chunk(2)
        else:
            image = torch.cat([extra["image_cond"]] * 2)
            having, without = p.sampler.model_wrap(
                x, sigma, cond={"c_crossattn": [torch.cat([told, free])], "c_concat": [image]}).chunk(2)
        return without + (having - without) * scale

    said = p.extra_generation_params
    options = {option: said[label] for label, option in OPTIONS.items() if label in said}
    if file := said.get("Lambda calibration file"):
        own = said["Lambda calibration"] == "every prompt"
        options |= calibration(pack, f"{file.split('; ')[-1].split()[0]}.safetensors", own)
    function = pack.k_diffusion_sampler(p.sampler.solver.name, p.sampler.path, **options)
    levels = sigmas[:-1] if len(sigmas) > 2 and sigmas[-2] == 0 else sigmas
    first = p.iteration * p.batch_size
    seeds = p.all_seeds[first:first + p.batch_size]
    return function(denoise, x.float(), levels, {"seed": seeds}, disable=True)


def forge(p, x, sigma, texts):
    """What Forge's network answers, or what is there in its place."""
    unet = p.sd_model.forge_objects.unet
    if answer := unet.model_options.get("model_function_wrapper"):
        return answer(None, {"input": x, "timestep": sigma, "c": {"c_crossattn": texts}})
    return unet.model.apply_model(x, sigma, c_crossattn=texts)


def calibration(pack, name, own):
    """The solver's option that holds a saved file, as the prompt that was measured uses it, or another."""
    found = pack.load_calibration(Path(paths.models_path) / "solver_calibrations" / name)
    if hasattr(found, "for_another_prompt"):
        return {"statistics": found if own else found.for_another_prompt()}
    return {"trained": found}
