"""A real Stable Diffusion WebUI with this repository in its extensions/, asked by its API and in a browser.

WEBUI_PATH names its folder, WEBUI_PYTHON its Python; any SD 1.x checkpoint in its models folder serves. What
its samplers return is held against direct calls inside it, by tests/webui_probe.py.
"""
from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import environment
from comfyui_server import free_port
from test_webui import MEASURED, PLAIN, RULE, USED

sys.path.append(str(Path(__file__).parent / "browser"))
import interface  # noqa: E402

FLAGS = ["--skip-prepare-environment", "--skip-version-check", "--skip-install", "--skip-torch-cuda-test",
         "--api", "--server-name", "127.0.0.1"]
ON_CPU = {"Forge": ["--always-cpu"], "A1111": ["--use-cpu", "all", "--no-half", "--opt-sdp-attention"]}
CLOSED = "closed form of a cat"
PLOT = "x/y/z plot"
PANEL = "#script_txt2img_lambda_solvers_panel"
DEFAULTS = {"eta": "0.4", "first_step": "evaluate", "calibration": "as in the settings"}
PICTURES = environment.HOME / "browser" / "webui"
"""Where screenshots are left."""
FORGE = {"hr_additional_modules": ["Use same choices"], "styles": []}
"""Without these Forge's API stops at a second pass, or at an infotext."""


class Picture(NamedTuple):
    pixels: np.ndarray
    infotext: str


class WebUI:
    """A client of the API, with the folder where the WebUI keeps what is its user's."""

    def __init__(self, port: int, data: Path) -> None:
        self.address, self.data = f"http://127.0.0.1:{port}/", data

    def __call__(self, name: str, **body: Any) -> Any:
        request = urllib.request.Request(f"{self.address}sdapi/v1/{name}",
                                         json.dumps(body).encode() if body else None,
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as fault:
            raise RuntimeError(fault.read().decode()) from None

    def pictures(self, kind: str = "txt2img", **body: Any) -> list[Picture]:
        job = {"prompt": CLOSED, "negative_prompt": "dog", "seed": 11, "steps": 4, "width": 64, "height": 64,
               "scheduler": "Karras", "cfg_scale": 2.0}
        answer = self(kind, **{**job, **body})
        return [Picture(pixels(base64.b64decode(image)), text)
                for image, text in zip(answer["images"], json.loads(answer["info"])["infotexts"])]

    def picture(self, **body: Any) -> Picture:
        return self.pictures(**body)[0]

    def run(self) -> dict:
        """What the probe saw of the last run."""
        return torch.load(max((self.data / "runs").iterdir()), weights_only=True)

    def started(self, process: subprocess.Popen) -> WebUI:
        for _ in range(400):
            try:
                self("samplers")
                return self
            except (urllib.error.URLError, RuntimeError):  # the page comes before the API
                assert process.poll() is None, (self.data / "log").read_text()[-4000:]
                time.sleep(1)
        raise AssertionError((self.data / "log").read_text()[-4000:])

    def interrupted(self, when: Callable[[dict], bool], **body: Any) -> Picture:
        """A job that is interrupted once its progress is so."""
        made: list[Picture] = []
        job = threading.Thread(target=lambda: made.append(self.picture(**body)))
        job.start()
        while job.is_alive() and not when(self("progress?skip_current_image=true")):
            time.sleep(0.1)
        self("interrupt", now=True)
        job.join()
        return made[0]


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def panel(eta: float = 0.4, first_step: str = "evaluate", rule: str = "auto") -> dict:
    return {"alwayson_scripts": {"Lambda Solvers": {"args": [eta, first_step, rule]}}}


def value(label: str, picture: Picture) -> str:
    """What an infotext says."""
    return picture.infotext.partition(f", {label}: ")[2].partition(",")[0]


def told(picture: Picture) -> dict[str, str]:
    """What an infotext says of our options."""
    labels = ("Sampler", "Lambda eta", "Lambda first step", RULE, USED)
    return {label: value(label, picture) for label in labels if f", {label}: " in picture.infotext}


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    """With a data folder of its own, this repository and the probe as its extensions."""
    root = os.environ.get("WEBUI_PATH")
    if not root:
        pytest.skip("NO REAL WEBUI WAS RUN: WEBUI_PATH names no folder of one (and WEBUI_PYTHON no Python)")
    kind = "Forge" if (Path(root) / "modules_forge").is_dir() else "A1111"
    data, port = tmp_path_factory.mktemp("webui"), free_port()
    for folder in ("extensions/probe/scripts", "models/Lora"):
        (data / folder).mkdir(parents=True)
    environment.link_to(data / "extensions" / "lambda-solvers", environment.ROOT)
    (data / "extensions/probe/scripts/probe.py").write_text(
        (environment.ROOT / "tests" / "webui_probe.py").read_text())
    of = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_"
    save_file({f"{of}up.weight": torch.ones(320, 1), f"{of}down.weight": torch.ones(1, 320)},
              data / "models" / "Lora" / "stripes.safetensors")
    with (data / "log").open("w") as log:
        process = subprocess.Popen(
            [os.environ.get("WEBUI_PYTHON", "python"), "launch.py", *FLAGS, *ON_CPU[kind],
             "--port", str(port), "--data-dir", str(data),
             "--ckpt-dir", str(Path(root) / "models" / "Stable-diffusion"),
             "--gradio-allowed-path", root], cwd=root, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield WebUI(port, data).started(process)
    finally:
        process.kill()
        process.wait()


# --- samplers -----------------------------------------------------------------------------------------------

def test_every_sampler_is_listed(webui) -> None:
    assert {*PLAIN, *MEASURED} <= {entry["name"] for entry in webui("samplers") if entry["aliases"]}


@pytest.mark.parametrize("name", PLAIN)
def test_on_the_checkpoint_a_sampler_returns_what_a_direct_call_does(webui, name: str) -> None:
    picture, run = webui.picture(prompt="a cat", sampler_name=name), webui.run()
    assert (run["latents"] - run["direct"]).abs().max() <= 1e-4 and run["latents"].std() > 0.1
    assert run["counted"] == 4 and not run["moved"]
    assert f"Sampler: {name}, Schedule type: Karras" in picture.infotext
    assert list(told(picture)) == ["Sampler"]


@pytest.mark.parametrize("name", MEASURED)
def test_a_model_is_measured_once_and_sampled_as_by_a_direct_call(webui, name: str) -> None:
    first, asked = webui.picture(sampler_name=name), webui.run()["asked"]
    again, run = webui.picture(sampler_name=name), webui.run()
    assert np.array_equal(first.pixels, again.pixels) and first.infotext == again.infotext
    assert asked > 50 > run["asked"] and not run["moved"]
    assert (run["latents"] - run["direct"]).abs().max() <= 1e-4
    file = webui.data / "models" / "solver_calibrations" / f"{value(USED, again).split()[0]}.safetensors"
    assert file.is_file() and value(RULE, again) == "auto"


@pytest.mark.parametrize("sampler, options, said", [
    ("Lambda 2M SDE", {"eta": 0.35, "first_step": "afs"}, "Lambda eta: 0.35, Lambda first step: afs"),
    ("Lambda 3M", {"first_step": "afs"}, "Lambda first step: afs"),
    ("Lambda v3", {"rule": "every prompt"}, "Lambda calibration: every prompt"),
])
def test_what_the_panel_says_is_sampled_and_stands_in_the_infotext(webui, sampler, options, said) -> None:
    picture, run = webui.picture(sampler_name=sampler, **panel(**options)), webui.run()
    assert said in picture.infotext and (run["latents"] - run["direct"]).abs().max() <= 1e-4


def test_an_image_of_a_batch_is_that_of_its_seed(webui) -> None:
    webui.picture(sampler_name="Lambda 2M SDE", seed=12)
    alone = webui.run()["latents"]
    for how in ({"batch_size": 2}, {"n_iter": 2}):
        webui.picture(sampler_name="Lambda 2M SDE", **how)
        torch.testing.assert_close(webui.run()["latents"][-1:], alone, rtol=0, atol=1e-4)
        assert (webui.run()["latents"] - webui.run()["direct"]).abs().max() <= 1e-4


@pytest.mark.parametrize("sampler", ["Lambda 3M", "Lambda v3"])
def test_both_passes_of_hires_fix_and_image_to_image_are_sampled_as_by_direct_calls(webui, sampler) -> None:
    picture = webui.picture(sampler_name=sampler, enable_hr=True, hr_scale=1.5, denoising_strength=0.6,
                            hr_upscaler="Latent", hr_cfg=3.0, **FORGE)
    run = webui.run()
    assert picture.pixels.shape == (96, 96, 3) and run["sigmas"][0] < 10
    assert (run["latents"] - run["direct"]).abs().max() <= 1e-4
    start = encoded(picture)
    for denoising in (0.5, 1.0):
        webui.pictures("img2img", sampler_name=sampler, init_images=[start], denoising_strength=denoising)
        assert (webui.run()["latents"] - webui.run()["direct"]).abs().max() <= 1e-4


def test_a_mask_keeps_what_it_covers_and_is_not_measured_with(webui) -> None:
    before = webui.picture(sampler_name="Lambda 2M", seed=5)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    masked = {"init_images": [encoded(before)], "denoising_strength": 0.8, "mask": encoded(mask),
              "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
    [after] = webui.pictures("img2img", sampler_name="Lambda 2M", **masked)
    changed = np.abs(after.pixels.astype(int) - before.pixels).max(2)
    assert changed[:, 32:].max() <= 2 < changed[:, :32].max()
    with pytest.raises(RuntimeError, match="a mask"):
        webui.pictures("img2img", sampler_name="Lambda v3", cfg_scale=9.0, **masked)


def encoded(picture: Any) -> str:
    file = io.BytesIO()
    image = Image.fromarray(picture.pixels) if isinstance(picture, Picture) else picture
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# --- interruption -------------------------------------------------------------------------------------------

def test_interrupted_a_run_ends_with_what_it_had(webui) -> None:
    job = {"sampler_name": "Lambda 3M", "prompt": f"slowly, {CLOSED}", "steps": 60}
    picture = webui.interrupted(lambda told: told["state"]["sampling_step"] >= 2, **job)
    assert picture.pixels.shape == (64, 64, 3) and 2 < webui.run()["asked"] < 60


def test_interrupted_a_measurement_stops_and_the_next_job_goes_on_from_there(webui) -> None:
    job = {"sampler_name": "Lambda v3", "prompt": f"slowly, {CLOSED}", "cfg_scale": 6.0, "width": 160,
           "height": 160}
    webui.interrupted(lambda told: "evaluation 20 of" in str(told["textinfo"]), **job)
    before = webui.run()["asked"]
    webui.picture(**job)
    resumed = webui.run()["asked"]
    webui.picture(**{**job, "cfg_scale": 12.0})
    assert 4 < resumed < webui.run()["asked"] and before < webui.run()["asked"]


# --- infotext -----------------------------------------------------------------------------------------------

JOBS = [{"sampler_name": "Lambda 2M SDE", **panel(eta=0.35, first_step="afs")},
        {"sampler_name": "Lambda Fitted", **panel(first_step="afs")},
        {"sampler_name": "Lambda AMED 2M", "steps": 3, **panel()}]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["sampler_name"])
def test_the_api_makes_the_same_picture_of_its_infotext(webui, job: dict) -> None:
    made = webui.picture(**job)
    answer = webui("txt2img", infotext=made.infotext, **FORGE)
    assert np.array_equal(pixels(base64.b64decode(answer["images"][0])), made.pixels)
    assert json.loads(answer["info"])["infotexts"][0] == made.infotext


# --- the plot, LoRAs ----------------------------------------------------------------------------------------

def test_the_plot_varies_an_option(webui) -> None:
    script = next(one for one in webui("script-info") if one["name"] == PLOT and not one["is_img2img"])
    axes = script["args"][0]["choices"]
    arguments = [axes.index("Lambda eta"), "0.2, 0.9", [], 0, "", [], 0, "", []]
    arguments += [argument["value"] or argument["label"] == "Include Sub Images"
                  for argument in script["args"][len(arguments):]]
    pictures = webui.pictures(sampler_name="Lambda 2M SDE", script_name=PLOT, script_args=arguments)
    assert {value("Lambda eta", picture) for picture in pictures[1:]} == {"0.2", "0.9"}


def test_a_lora_changes_which_model_it_is_and_its_strength_may_be_near(webui) -> None:
    def file(lora: str) -> str:
        return value(USED, webui.picture(sampler_name="Lambda v3", prompt=f"{CLOSED} {lora}")).split()[0]

    plain, with_it, nearly, less = map(file, ("", *(f"<lora:stripes:{much}>" for much in (1, 0.95, 0.4))))
    assert len({plain, with_it, less}) == 3 and nearly == with_it and file("") == plain
    assert {name.split("-")[1] for name in (with_it, less)} == {plain.split("-")[1]}  # of one checkpoint


# --- training -----------------------------------------------------------------------------------------------

TRAIN = "lambda solvers: train hypersolver"


def test_a_hypersolver_is_trained_by_the_script_and_used_for_the_picture_and_later_ones(webui) -> None:
    lines = "\n".join(f"{much} {what}" for what in ("cats", "houses") for much in ("no", "two", "all", "ten"))
    job = {"sampler_name": "Euler", "steps": 2, "width": 128, "height": 128}
    trained = webui.picture(**job, script_name=TRAIN, script_args=[lines, 2, 1.0, 4.0, 2, 2, 200])
    first = webui.run()
    assert value("Sampler", trained) == "Lambda Fitted" and "hypersolver1-4" in value(USED, trained)
    again, run = webui.picture(**{**job, "sampler_name": "Lambda Fitted"}), webui.run()
    assert np.array_equal(again.pixels, trained.pixels) and value(USED, again) == value(USED, trained)
    assert first["asked"] > 200 > run["asked"] and not run["moved"]
    assert (run["latents"] - run["direct"]).abs().max() <= 1e-4


# --- in a browser -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def page(webui):
    if interface.CHROMIUM is None:
        pytest.skip("NO BROWSER TEST WAS RUN: no Chromium")
    with interface.browser() as running:
        page = running.new_page(viewport={"width": 1500, "height": 1500}, locale="en-US")
        page.route(lambda url: not url.startswith((webui.address, "data:", "blob:")),
                   lambda route: route.abort())
        page.goto(webui.address)
        page.wait_for_selector("#txt2img_prompt textarea", timeout=180_000)
        page.wait_for_timeout(5000)  # its scripts
        yield page


def show(page, name: str) -> None:
    """A picture of the panel as it is."""
    page.locator(PANEL).scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def paste(page, infotext: str) -> None:
    page.fill("#txt2img_prompt textarea", infotext)
    page.click("#paste")
    page.wait_for_timeout(4000)


def shows(page, expected: dict[str, str]) -> None:
    """The panel is set to this, at once or on a busy machine within a minute."""
    interface.until("the panel is set", lambda: shown(page) == expected, lambda: (shown(page), expected), 60)


def shown(page) -> dict[str, str]:
    """What the panel is set to."""
    def widget(name: str, kind: str):
        return page.locator(f"#script_txt2img_lambda_solvers_{name} input{kind}")

    return {"eta": widget("eta", "[type=number]").input_value(),
            **{name: widget(name, ":checked").get_attribute("value")
               for name in ("first_step", "calibration")}}


def generated(page) -> Picture:
    before = page.locator("#txt2img_gallery img").evaluate_all("found => found.map((img) => img.src)")
    page.click("#txt2img_generate")
    page.wait_for_function("""(before) => { const img = document.querySelector("#txt2img_gallery img")
        return img && !before.includes(img.src) && img.complete
               && document.querySelector("#html_info_txt2img").innerText.includes("Steps: ") }""", arg=before,
                           timeout=180_000)
    page.wait_for_timeout(1000)
    source = page.locator("#txt2img_gallery img").first.get_attribute("src")
    return Picture(pixels(page.request.get(urllib.parse.urljoin(page.url, source)).body()),
                   page.inner_text("#html_info_txt2img"))


def test_the_panel_is_closed_and_says_what_it_is_for(page) -> None:
    assert not page.locator("#script_txt2img_lambda_solvers_eta").is_visible()
    show(page, "panel_closed")
    page.locator(f"{PANEL} .label-wrap").first.click()
    page.wait_for_timeout(1500)
    assert page.locator("#script_txt2img_lambda_solvers_eta").is_visible()
    show(page, "panel_open")
    shows(page, DEFAULTS)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["sampler_name"])
def test_a_pasted_infotext_sets_the_panel_and_makes_the_same_picture(webui, page, job: dict) -> None:
    made = webui.picture(**job)
    paste(page, made.infotext)
    eta, first_step, rule = job["alwayson_scripts"]["Lambda Solvers"]["args"]
    measured = job["sampler_name"] in MEASURED
    shows(page, {"eta": f"{eta:g}", "first_step": first_step,
                 "calibration": rule if measured else "as in the settings"})
    show(page, f"pasted {job['sampler_name']}")
    again = generated(page)
    assert np.array_equal(again.pixels, made.pixels)
    assert told(again) == told(made) != {}


def test_a_pasted_infotext_without_our_options_sets_the_panel_back(webui, page) -> None:
    paste(page, webui.picture(sampler_name="Lambda 2M SDE", **panel(eta=0.5)).infotext)
    paste(page, webui.picture(sampler_name="Euler").infotext)
    shows(page, DEFAULTS)


def test_what_a_measurement_came_to_stands_below_the_picture(webui, page) -> None:
    paste(page, webui.picture(sampler_name="Lambda v3").infotext.replace("CFG scale: 2.0", "CFG scale: 3.5"))
    generated(page)
    assert "statistics saved: " in page.inner_text("#html_log_txt2img")
    show(page, "measured")


def test_the_script_that_trains_says_what_it_costs_before_it_starts(page) -> None:
    page.locator("#script_list input").first.click()
    page.get_by_role("option", name="Lambda Solvers: train hypersolver").or_(page.locator(
        "#script_list li", has_text="Lambda Solvers: train hypersolver")).first.click()
    images = page.locator("[id$=lambda_solvers_train_hypersolver_images] input[type=number]").first
    interface.until("it is shown", images.is_visible, seconds=30)
    images.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    page.screenshot(path=PICTURES / "training.png")
    assert images.input_value() == "2"
    assert page.get_by_text("about 2 images of 20 steps for each image").first.is_visible()
    prompts = page.locator("[id$=lambda_solvers_train_hypersolver_prompts] textarea").first.input_value()
    assert len(prompts.splitlines()) == 100
