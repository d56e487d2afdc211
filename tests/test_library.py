"""ComfyUI's modules as a library: no server, nobody to show a progress to, and samplers that measure all
the same."""
from __future__ import annotations

import os
import subprocess
import sys

import environment

CODE = """
import sys
sys.path[:0] = ["dev", "tests", "."]
import comfy_host
comfy_host.comfy_sampling()
import comfy.sample, folder_paths, torch
folder_paths.models_dir = sys.argv[1]
from comfy_models import IMAGE, Network, model, prompt
comfy_host.pack()
latent = torch.zeros(1, *IMAGE)
noise = comfy.sample.prepare_noise(latent, 7)
with torch.inference_mode():
    for name in ("lambda_2m", "lambda_v3", "lambda_fitted", "lambda_amed"):
        for _ in range(2):
            found = comfy.sample.sample(model(Network()), noise, 5, 1.0, name, "karras", prompt(0.5),
                                        prompt(0.0), latent, seed=7, disable_pbar=True)
            assert 0.9 < found.std() < 1.1 and 0.3 < found.mean() < 0.7, name  # data are 0.5 +- 1
"""


def test_every_kind_of_sampler_runs_without_a_server(tmp_path) -> None:
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], check=True, cwd=environment.ROOT,
                   env={**os.environ}, timeout=300)
    assert len(list(tmp_path.glob("solver_calibrations/*.safetensors"))) == 3
