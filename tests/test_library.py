"""ComfyUI's modules as a library: no server, nobody to show a progress to, and samplers that measure all
the same."""
from __future__ import annotations

import os
import subprocess
import sys

import environment

CODE = """
import importlib.util, sys
sys.path[:0] = ["dev", "tests", "."]
import comfy_host, environment
from accuracy import Emoji
import comfy.sample, folder_paths, torch
folder_paths.models_dir = sys.argv[1]
pack = comfy_host.pack()
emoji = Emoji(("panda",), (3.0,), 1)
positive, negative = (emoji.clip.encode_from_tokens_scheduled(emoji.clip.tokenize(words))
                      for words in ("panda", ""))
latent = torch.zeros(1, 3, 32, 32)
noise = comfy.sample.prepare_noise(latent, 7)
with torch.inference_mode():
    for name in ("lambda_2m", "lambda_v3", "lambda_fitted", "lambda_amed"):
        for _ in range(2):
            found = comfy.sample.sample(emoji.model, noise, 3, 3.0, name, "karras", positive, negative,
                                        latent, seed=7, disable_pbar=True)
            assert found.isfinite().all() and 0.2 < found.std() < 1.5, name
"""


def test_every_kind_of_sampler_runs_without_a_server(tmp_path) -> None:
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], check=True, cwd=environment.ROOT,
                   env={**os.environ}, timeout=300)
    assert len(list(tmp_path.glob("solver_calibrations/*.safetensors"))) == 3
