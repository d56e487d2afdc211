"""The pack inside ComfyUI's own modules: names, nodes, paths of model classes, and what they refuse."""
from __future__ import annotations

import asyncio
import subprocess
import sys
import types

import pytest
import torch

from comfy_host import ROOT, Model, comfy_sampling, pack, sampling_of
from problems import reference_mixture
from samplers import FAMILIES, SAMPLERS

NAMES = [
    "lambda_2m", "lambda_3m", "lambda_2m_sde", "lambda_3m_sde", "lambda_v3", "lambda_amed", "lambda_amed_2m",
    "lambda_fitted"
]
SHOWN = ["multistep", "singlestep", "adaptive", "sde", "pc", "v3", "fitted", "amed"]
SAMPLER_NODES = ["LambdaSampler" + name.capitalize() for name in SHOWN]
NODES = {
    *SAMPLER_NODES, "LambdaMeasureModel", "LambdaTrainAmed", "LambdaTuneFitted", "LambdaTrainHypersolver",
    "LambdaLoadCalibration", "LambdaScheduler", "LambdaOptions",
    "LambdaCompareSamplers", "LambdaClassifierGuider"
}


def lists() -> list[list[str]]:
    import comfy.samplers
    return [comfy.samplers.KSampler.SAMPLERS, comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSAMPLER_NAMES]


def host():
    pack()
    return sys.modules["custom_nodes_x_lambda-solvers.nodes.host"]


def nodes() -> dict[str, type]:
    found = asyncio.run(pack().comfy_entrypoint().get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in found}


def test_loading_appends_our_names_once_and_leaves_everything_else_alone() -> None:
    sampling = comfy_sampling()
    import comfy.samplers  # noqa: F401
    if "custom_nodes_x_lambda-solvers" not in sys.modules:
        before = [list(names) for names in lists()]
        same = [id(names) for names in lists()]
        theirs = {name: value for name, value in vars(sampling).items() if "lambda" not in name}
        pack()
        assert [names[:len(old)] for names, old in zip(lists(), before)] == before
        assert [id(names) for names in lists()] == same
        assert not [name for name, value in theirs.items() if getattr(sampling, name) is not value]
    sys.modules["custom_nodes_x_lambda-solvers.nodes"].register()
    for names in lists():
        assert [names.count(name) for name in NAMES] == [1] * len(NAMES)
    assert len(NAMES) <= 10


def test_a_list_that_another_pack_has_replaced_gets_our_names_too() -> None:
    pack()
    import comfy.samplers
    kept = comfy.samplers.KSampler.SAMPLERS
    try:
        comfy.samplers.KSampler.SAMPLERS = [name for name in kept if name not in NAMES]
        sys.modules["custom_nodes_x_lambda-solvers.nodes"].register()
        assert comfy.samplers.KSampler.SAMPLERS[-len(NAMES):] == NAMES
    finally:
        comfy.samplers.KSampler.SAMPLERS = kept


@pytest.mark.parametrize("name", NAMES[:4])
def test_ksampler_s_function_is_ours(name: str) -> None:
    pack()
    import comfy.samplers
    denoiser, x = reference_mixture("ve")
    sampler = comfy.samplers.sampler_object(name)
    result = sampler.sampler_function(Model(denoiser, sampling_of("EPS")), x * 10,
                                      torch.tensor([10.0, 2.0, 0.4, 0.0]), extra_args={"seed": 3},
                                      callback=None, disable=True)
    assert result.isfinite().all() and result.dtype == x.dtype


def test_there_are_seventeen_nodes_in_two_categories() -> None:
    found = nodes()
    assert set(found) == NODES and len(found) == 17
    category = {name: node.GET_SCHEMA().category for name, node in found.items()}
    assert set(category.values()) == {"Lambda Solvers", "Lambda Solvers/special"}
    assert {name for name in SHOWN if category["LambdaSampler" + name.capitalize()] == "Lambda Solvers"} == {
        "multistep", "sde", "fitted"}
    assert {name for name in NODES - {*SAMPLER_NODES} if category[name] != "Lambda Solvers"} == {
        "LambdaOptions", "LambdaClassifierGuider", "LambdaTrainAmed"}


def test_a_family_s_node_has_one_widget_for_every_option_and_one_socket_for_any_calibration() -> None:
    found = nodes()
    for name in SHOWN:
        family, node = FAMILIES[name], found["LambdaSampler" + name.capitalize()]
        assert node.GET_SCHEMA().description
        inputs = {name: spec for kind in node.INPUT_TYPES().values() for name, spec in kind.items()}
        assert set(inputs) == {*family.options, *(["calibration", "measure"] if family.stand_ins else [])
                               } - set(family.stand_ins)
        if family.stand_ins:
            assert inputs["calibration"][0] == "LAMBDA_CALIBRATION" and "calibration" in node.INPUT_TYPES(
            )["optional"]
        for name, option in family.options.items():
            if option.stand_in is not None:
                continue
            said = inputs[name][1]
            assert said["default"] == option.default and option.help in said["tooltip"]
            assert said.get("advanced", False) == option.advanced
            if option.choices:
                assert list(said.get("options", inputs[name][0])) == list(option.choices)
            elif option.kind is not bool:
                assert (said["min"], said["max"]) == (option.low, option.high)


def own(name: str):
    """What stands under a name in the pack's own samplers."""
    return getattr(sys.modules["custom_nodes_x_lambda-solvers.samplers"], name)


def test_a_calibration_of_the_wrong_kind_is_refused_by_what_it_is_and_what_is_needed() -> None:
    found = nodes()
    statistics, trained = own("Statistics").constant(), own("Amed").untrained()
    options = {
        key: option.default for key, option in FAMILIES["v3"].options.items() if option.stand_in is None
    }
    with pytest.raises(
            ValueError, match=
            "is AMED of a model, and DPM-Solver-v3 .Lambda. needs statistics: connect what Measure Model "
            "makes"
    ):
        found["LambdaSamplerV3"].execute(calibration=trained, **options)
    with pytest.raises(
            ValueError,
            match="is statistics of a model, and AMED .Lambda. needs AMED: connect what Train AMED makes"):
        found["LambdaSamplerAmed"].execute(calibration=statistics)
    names = [entry.id for entry in found["LambdaTuneFitted"].GET_SCHEMA().inputs]
    with pytest.raises(ValueError, match="is AMED of a model.*needs statistics"):
        found["LambdaTuneFitted"].execute(**{**dict.fromkeys(names), "calibration": trained})
    [sampler] = found["LambdaSamplerV3"].execute(calibration=statistics, **options).args
    assert sampler.extra_options["statistics"] is statistics


def test_a_model_carries_one_calibration_of_each_kind() -> None:
    nodes()
    socket = sys.modules["custom_nodes_x_lambda-solvers.nodes.calibration_socket"]
    model = types.SimpleNamespace(found={})
    model.clone, model.set_attachments = lambda: model, model.found.__setitem__
    statistics, trained = own("Statistics").constant(), own("Amed").untrained()
    for calibration in (statistics, trained, trained):
        assert socket.attached(model, calibration) is model
    assert list(model.found.values()) == [statistics, trained]


@pytest.mark.parametrize("name", SHOWN)
def test_a_node_s_sampler_runs_with_its_options(name: str) -> None:
    node = nodes()["LambdaSampler" + name.capitalize()]
    family = sys.modules["custom_nodes_x_lambda-solvers.samplers"].FAMILIES[name]  # the pack's own
    options = {key: option.default for key, option in family.options.items() if option.stand_in is None}
    [sampler] = node.execute(**options).args
    denoiser, x = reference_mixture("flow")
    model = Model(denoiser, sampling_of("CONST"))
    function = host().sampler_function(family) if family.stand_ins else sampler.sampler_function
    result = function(model, x, torch.tensor([1.0, 0.8, 0.4, 0.0]), extra_args={"seed": 3}, callback=None,
                      disable=True, **sampler.extra_options, **family.stand_ins)
    assert result.isfinite().all()


@pytest.mark.parametrize(("kind", "path", "sigmas"), [
    ("EPS", "ve", [14.6, 0.0]), ("CONST", "flow", [1.0, 0.5, 0.0])])
def test_an_adaptive_run_goes_to_the_model_s_lowest_level(kind: str, path: str, sigmas: list[float]) -> None:
    sampling, (denoiser, x), asked = sampling_of(kind), reference_mixture(path), []

    def model(x, sigma):
        asked.append(float(sigma[0]))
        return denoiser(x, sigma)

    options = {key: option.default for key, option in FAMILIES["adaptive"].options.items()}
    [sampler] = nodes()["LambdaSamplerAdaptive"].execute(**options).args
    sampler.sampler_function(Model(model, sampling), x * sigmas[0], torch.tensor(sigmas),
                             extra_args={"seed": 3}, callback=None, disable=True, **sampler.extra_options)
    assert asked[-1] == min(asked) == pytest.approx(sampling.sigma_min) and len(asked) > 15


def test_a_node_refuses_what_the_server_let_through() -> None:
    node = nodes()["LambdaSamplerMultistep"]
    with pytest.raises(ValueError, match="rule = 'heun' is out of range: choose one of midpoint, taylor"):
        node.execute(order=2, prediction="data", rule="heun", lower_order_final="auto")


@pytest.mark.parametrize("node, name, values", [
    ("LambdaSamplerFitted", "measure", {"choose_levels": True}),
    ("LambdaOptions", "threshold", {"sampler": "euler", "quantile": 1.0, "bound": 1.0}),
    ("LambdaScheduler", "clock", {"model": None, "steps": 3, "rho": 1.0, "denoise": 1.0, "sigma_max": 0.0,
                                  "sigma_min": 0.0, "to_zero": True, "values": ""})])
def test_a_choice_that_there_is_not_is_refused_by_its_name(node: str, name: str, values: dict) -> None:
    if "sampler" in values:
        values = {**values, "sampler": comfy_sampling() and sampler_of(values["sampler"])}
    with pytest.raises(ValueError, match=f"{name} = 'Auto' is no choice: choose one of "):
        nodes()[node].execute(**values, **{name: "Auto"})


def sampler_of(name: str):
    import comfy.samplers
    return comfy.samplers.ksampler(name)


def test_no_seed_of_ours_is_changed_by_the_interface() -> None:
    """It would draw another for every run, unless told: then nothing goes on where it was cut short."""
    seeds = [spec for node in nodes().values() for kind in node.INPUT_TYPES().values()
             for name, spec in kind.items() if name in ("seed", "noise_seed")]
    assert len(seeds) == 5 and all(spec[1]["control_after_generate"] is False for spec in seeds)


@pytest.mark.parametrize(("classes", "path"), [(["EPS"], "ve"), (["V_PREDICTION"], "ve"), (["EDM"], "ve"),
                                               (["X0"], "ve"), (["COSMOS_RFLOW"], "ve"), (["CONST"], "flow")])
def test_the_path_follows_from_the_model_s_sampling_class(classes: list[str], path: str) -> None:
    assert host().path_of(sampling_of(*classes)) == path


@pytest.mark.parametrize("classes",
                         [["IMG_TO_IMG"], ["IMG_TO_IMG_FLOW", "CONST"], ["IMG_TO_IMG_VELOCITY", "CONST"],
                          ["V_PREDICTION_DDPM", "EPS"], ["SomethingNew"]])
def test_a_class_that_cannot_work_is_refused_by_name(classes: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{classes[0]}.*Choose one of ComfyUI's own samplers"):
        host().path_of(sampling_of(*classes))


def test_scaled_noise_of_newer_flow_models_scales_what_stochastic_solvers_add() -> None:
    function = host().sampler_function(SAMPLERS["dpmpp_2m_sde"])
    x, sigmas = torch.ones(1, 3, 4, 4), torch.tensor([0.9, 0.7, 0.5])
    runs = [
        function(Model(lambda x, sigma: x * 0, sampling_of("CONST", **scale)), x, sigmas,
                 extra_args={"seed": 3}, disable=True) for scale in ({}, {"noise_scale": 8.0})
    ]
    quiet = function(Model(lambda x, sigma: x * 0, sampling_of("CONST")), x, sigmas, extra_args={"seed": 3},
                     disable=True, s_noise=0.0)
    torch.testing.assert_close(runs[1] - quiet, 8 * (runs[0] - quiet))


def test_the_environment_says_what_a_listed_sampler_does_without_statistics(monkeypatch) -> None:
    pack()
    settings = sys.modules["custom_nodes_x_lambda-solvers.nodes.settings"]
    assert settings.rule() == "auto"
    monkeypatch.setenv("LAMBDA_SOLVERS_CALIBRATION", "")  # as if it were not set
    assert settings.rule() == "auto"
    monkeypatch.setenv("LAMBDA_SOLVERS_CALIBRATION", "saved only")
    assert settings.rule() == "saved only"
    for value in ("sometimes", "never"):  # which was one
        monkeypatch.setenv("LAMBDA_SOLVERS_CALIBRATION", value)
        with pytest.raises(ValueError, match=f"LAMBDA_SOLVERS_CALIBRATION is '{value}': choose one of auto, "
                                             "every prompt, saved only$"):
            settings.rule()


def test_an_empty_latent_gets_the_shape_that_comfyui_gives_it_newer_ones_by_their_ratio(monkeypatch) -> None:
    pack()
    import comfy.sample
    seen = []

    def newer(model, latent_image, downscale_ratio_spacial=None):
        seen.append(downscale_ratio_spacial)
        return latent_image

    latent = {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8, "batch_index": [3]}
    model = type(
        "Patcher", (), {
            "get_model_object": lambda self, name: type("Format",
                                                        (), {"latent_channels": 16, "latent_dimensions": 2})
        })()
    assert host().latent_for(model, latent).shape == (1, 16, 8, 8)  # 0.3.75 knows channels alone
    monkeypatch.setattr(comfy.sample, "fix_empty_latent_channels", newer)
    host().latent_for(model, latent)
    host().latent_for(model, {"samples": latent["samples"]})
    assert seen == [8, None]


def test_half_precision_latents_are_sampled_in_float32() -> None:
    function = host().sampler_function(SAMPLERS["dpmpp_2m"])
    seen = set()

    def denoiser(x, sigma):
        seen.add(x.dtype)
        return x * 0.5

    result = function(Model(denoiser, sampling_of("EPS")),
                      torch.ones(1, 3, 4, 4).half(), torch.tensor([9.0, 1.0, 0.0]), disable=True)
    assert seen == {torch.float32} and result.dtype == torch.float16


def test_the_folder_imports_without_comfyui() -> None:
    """Managers, test runners and registries import the pack where there is no ComfyUI."""
    code = (
        "import importlib.util, sys; s = importlib.util.spec_from_file_location('pack', sys.argv[1] + "
        "'/__init__.py');m = importlib.util.module_from_spec(s); s.loader.exec_module(m); assert not "
        "hasattr(m, 'comfy_entrypoint')"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True,
                   cwd="/" if sys.platform != "win32" else None)


def test_install_makes_the_folder_for_calibrations_and_nothing_else(tmp_path) -> None:
    there = tmp_path / "custom_nodes" / "lambda-solvers"
    there.mkdir(parents=True)
    (there / "install.py").write_text((ROOT / "install.py").read_text())
    for _ in range(2):
        subprocess.run([sys.executable, str(there / "install.py")], check=True, cwd=there)
    made = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if "custom_nodes" not in p.parts)
    assert made == ["models", "models/solver_calibrations"]


def patcher_of(network: torch.nn.Module):
    model = types.SimpleNamespace(diffusion_model=network)
    return types.SimpleNamespace(model=model, get_additional_models_with_key=lambda key: [])


@pytest.mark.parametrize("calls", [[[1, 0]], [[0, 1]], [[1], [0]], [[0], [1]], [[0]], [[0, 0, 1]]])
def test_the_middle_block_is_seen_for_the_conditional_half_however_conds_are_evaluated(
        calls: list[list[int]]) -> None:
    """All in one call, in either order, one after the other, without guidance, and two areas of one
    prompt."""
    pack()
    MiddleBlock = sys.modules["custom_nodes_x_lambda-solvers.nodes.middle_block"].MiddleBlock  # noqa: N806

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle_block = torch.nn.ModuleList([torch.nn.Identity()])

        def forward(self, x, timesteps, transformer_options=None):
            for block in self.middle_block:  # as ComfyUI does: the container itself is never called
                x = block(x)
            return x

    network, x = Network(), torch.randn(3, 4, 2, 2)
    patcher = patcher_of(network)
    marks = {0: x, 1: x + 100}
    with MiddleBlock(patcher) as block:
        for order in calls:
            network(torch.cat([marks[which] for which in order]), None,
                    transformer_options={"cond_or_uncond": order})
        torch.testing.assert_close(block.features(), x)
    network(x + 5, None, transformer_options={"cond_or_uncond": [0]})
    torch.testing.assert_close(block.features(), x)  # no longer looking
    assert not network._forward_pre_hooks and not network.middle_block[0]._forward_hooks


def test_a_transformer_has_no_middle_block() -> None:
    pack()
    watching = sys.modules["custom_nodes_x_lambda-solvers.nodes.middle_block"].MiddleBlock
    block = watching(patcher_of(torch.nn.Linear(2, 2)))
    with block:
        assert not block.exists and block.features() is None
