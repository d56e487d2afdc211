"""The border to ComfyUI: what may fail there without a run, an image or another's sampler noticing."""
from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import types

import pytest
import torch

from comfy_host import ROOT, Model, pack, sampling_of
from processes import NEEDS_FORK
from test_panel import (  # noqa: F401  (nothing_run is a fixture)
    ABOUT, ask, custom, ksampler, lines, module, node, nothing_run, run, two_trajectories)

@pytest.fixture
def noted():
    metadata = module("status.metadata")
    metadata._noted.clear()
    yield lambda graph, name: graph[name].get("_meta", {}).get("lambda_solvers")
    metadata._noted.clear()


# --- an image is not lost -----------------------------------------------------------------------------------

def no_describing(guider):
    raise RuntimeError("no such weights")


FAULTS = {
    "a description": lambda monkeypatch: {"describe": no_describing}, "the graph's shape": lambda monkeypatch:
    monkeypatch.setattr(module("status.runs"), "model_chain", lambda *graph: {1: 2}["inputs"]),
    "the chain's JSON": lambda monkeypatch: monkeypatch.setattr(module("status.runs"), "model_chain", lambda *
                                                                graph: object()),
    "the connection": lambda monkeypatch: {"send": ConnectionError("gone")}, "what is running": lambda
    monkeypatch: monkeypatch.setattr(module("status.runs"), "get_progress_state", lambda: None),
    "a calibration's arrays": lambda monkeypatch: {"use": {"statistics": object()}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_fails_after_a_run_the_run_has_its_result_and_the_log_a_warning(fault, monkeypatch,
                                                                                 caplog) -> None:
    options = FAULTS[fault](monkeypatch) or {}
    sent = run(ksampler(), "5", 12, monkeypatch, **options)  # it asserts that the result is there
    assert not sent
    assert [record.levelname
            for record in caplog.records] == ["WARNING"] * len(caplog.records) and caplog.records
    assert all("its images are not concerned" in record.message and record.exc_info
               for record in caplog.records)


def test_a_line_that_cannot_be_shown_is_still_in_the_log_and_ends_nothing(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    run(ksampler(), "5", 12, monkeypatch, said="measured \ud800")  # half a character: no UTF-8
    assert "Lambda Solvers: measured \ud800" in caplog.messages


# --- who is told, and what ----------------------------------------------------------------------------------


def test_texts_and_runs_are_sent_to_the_one_who_queued_and_to_nobody_if_that_is_not_known(
        monkeypatch) -> None:
    assert run(ksampler(), "5", 12, monkeypatch, said="hello") == [
        ("hello", "5", "me"), ("lambda_solvers.run", {"node": "5"}, "me")]
    assert run(ksampler(), "5", 12, monkeypatch, said="hello", client=None) == []  # None would be everybody
    assert lines(ksampler())[0] == "count: model evaluations: 12 (last run)"


def test_a_text_has_nothing_that_the_interface_would_take_for_html_and_the_log_has_it_as_it_is(
        monkeypatch, caplog) -> None:
    """Frontend 1.32.9 puts progress texts into innerHTML; names of patches come from files and from other
    packs."""
    caplog.set_level(logging.INFO)
    calibration, name = module("library", "hosting"), '<img src=x onerror="alert(1)">'
    [fault] = calibration.faults({**ABOUT, "patches": [name]}, ABOUT)
    sent = run(ksampler(), "5", 12, monkeypatch, said=fault)[0][0]
    assert "<" not in sent and ">" not in sent and "img src=x onerror" in sent
    assert f"Lambda Solvers: {fault}" in caplog.messages and name in fault


# --- what others have ---------------------------------------------------------------------------------------

@pytest.fixture
def unregistered(monkeypatch):
    """ComfyUI's lists and functions without ours, and as they were afterwards."""
    pack()
    import comfy.samplers
    from comfy.k_diffusion import sampling
    ours = list(module("names", "hosting").NAMES)
    for name in ours:
        monkeypatch.delattr(sampling, f"sample_{name}")
    for where, name in ((comfy.samplers.KSampler, "SAMPLERS"), (comfy.samplers, "SAMPLER_NAMES"),
                        (comfy.samplers, "KSAMPLER_NAMES")):
        monkeypatch.setattr(where, name, [entry for entry in getattr(where, name) if entry not in ours])
    return types.SimpleNamespace(samplers=comfy.samplers, sampling=sampling,
                                 register=module("sampling").register)


@pytest.mark.parametrize("listed", [True, False])
def test_a_sampler_of_another_s_with_one_of_our_names_is_left_alone_and_named_in_the_log(
        unregistered, caplog, listed) -> None:
    theirs = lambda *args, **options: "theirs"  # noqa: E731
    unregistered.sampling.sample_lambda_2m = theirs
    if listed:
        unregistered.samplers.SAMPLER_NAMES.append("lambda_2m")
    try:
        unregistered.register()
        unregistered.register()
        assert unregistered.sampling.sample_lambda_2m is theirs
        assert unregistered.samplers.SAMPLER_NAMES.count("lambda_2m") == listed
        assert unregistered.samplers.KSAMPLER_NAMES.count("lambda_2m") == 0
        assert unregistered.samplers.KSampler.SAMPLERS.count("lambda_3m") == 1
        assert "named lambda_2m already" in caplog.text and "lambda_3m" not in caplog.text
        assert ask(ksampler(sampler_name="lambda_2m"))["lines"] == []  # nothing is said of what is not ours
        assert "lambda_2m" not in module("status.web").about()["names"] and "lambda_3m" in module(
            "status.web").about()["names"]
    finally:
        del unregistered.sampling.sample_lambda_2m


def test_a_name_that_another_pack_lists_and_runs_in_a_way_of_its_own_is_left_alone(unregistered,
                                                                                   caplog) -> None:
    unregistered.samplers.SAMPLER_NAMES.append("lambda_amed")
    unregistered.register()
    assert not hasattr(unregistered.sampling,
                       "sample_lambda_amed") and "named lambda_amed already" in caplog.text
    assert unregistered.samplers.SAMPLER_NAMES.count("lambda_amed") == 1


def test_the_pack_loaded_anew_is_there_once(caplog) -> None:
    pack()
    import comfy.samplers
    importlib.reload(sys.modules[f"{pack().__name__}.nodes"])
    assert [comfy.samplers.SAMPLER_NAMES.count(name)
            for name in module("names", "hosting").NAMES] == [1] * len(module("names", "hosting").NAMES)
    assert len(module("events", "hosting").listeners) == 2 and "already" not in caplog.text


def test_what_replaces_a_sampler_of_ours_later_is_not_taken_for_ours(monkeypatch) -> None:
    pack()
    from comfy.k_diffusion import sampling
    monkeypatch.setattr(sampling, "sample_lambda_2m", lambda *args, **options: None)
    assert ask(ksampler())["lines"] == []
    assert module("bench").parse("lambda_2m")[0].sampler.sampler_function is sampling.sample_lambda_2m


# --- imports ------------------------------------------------------------------------------------------------

LOADED = """
import os, sys
sys.path[:0] = ["dev", "tests", "."]
import comfy_host, environment
from problems import reference_mixture
comfy_host.comfy_sampling()
import asyncio, comfy.samplers, nodes, server, torch

def loads(missing):
    for name in missing:
        sys.modules[name] = None  # to import it is an ImportError
    pack = comfy_host.pack()
    assert len(asyncio.run(pack.comfy_entrypoint().get_node_list())) > 10
    denoiser, x = reference_mixture("ve")
    found = comfy.samplers.sampler_object("lambda_2m").sampler_function(
        comfy_host.Model(denoiser, comfy_host.sampling_of("EPS")), x * 10,
        torch.tensor([10.0, 2.0, 0.4, 0.0]), extra_args={"seed": 3}, disable=True)
    assert found.isfinite().all()
    events = sys.modules[pack.__name__ + ".hosting.events"]
    print("listeners", len(events.listeners), sys.modules[pack.__name__ + ".nodes.settings"].read("x"))

def samples(folder):
    import comfy.sample, folder_paths
    from comfy_models import IMAGE, Network, model, prompt
    folder_paths.models_dir = folder
    comfy_host.pack()
    latent = torch.zeros(1, *IMAGE)
    noise = comfy.sample.prepare_noise(latent, 7)
    with torch.inference_mode():
        for name in ("lambda_2m", "lambda_v3", "lambda_fitted", "lambda_amed"):
            for _ in range(2):
                found = comfy.sample.sample(model(Network()), noise, 5, 1.0, name, "karras", prompt(0.5),
                                            prompt(0.0), latent, seed=7, disable_pbar=True)
                assert 0.9 < found.std() < 1.1 and 0.3 < found.mean() < 0.7, name  # data are 0.5 +- 1
    kept = os.listdir(folder + "/solver_calibrations")
    print("files", sum(name.endswith(".safetensors") for name in kept))

for case in sys.argv[2:]:
    sys.stdout.flush()
    if not (copy := os.fork()):
        print("case", case)
        print("case", case, file=sys.stderr)
        samples(sys.argv[1]) if case == "library" else loads(case.split(","))
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(copy, 0)
"""
CASES = ("server", "aiohttp",
         "comfy_extras,comfy_extras.nodes_align_your_steps,comfy_extras.nodes_custom_sampler", "library")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """What a process says, on both its outputs, that loads the pack where these modules cannot be imported,
    and samples; and one that measures for its samplers."""
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path_factory.mktemp("models")), *CASES],
                          capture_output=True, text=True, cwd=ROOT, env={**os.environ}, timeout=300,
                          check=True)
    parts = [re.split("^case (.*)$", text, flags=re.MULTILINE) for text in (done.stdout, done.stderr)]
    out, err = (dict(zip(part[1::2], part[2::2])) for part in parts)
    return {case: (out[case], err[case]) for case in CASES}


@NEEDS_FORK
@pytest.mark.parametrize("missing", CASES[:2])
def test_what_only_the_interface_needs_may_be_missing_samplers_and_nodes_work_and_one_warning_names_it(
        missing, loaded) -> None:
    told, warned = loaded[missing]
    assert "listeners 0 None" in told, warned
    said = [line for line in warned.splitlines() if "Lambda Solvers" in line]
    assert len(said) == 1 and missing in said[0] and "Samplers and nodes work without them" in said[0]


def test_comfyui_s_scheduler_nodes_are_not_imported_but_looked_up(monkeypatch) -> None:
    """An interface that cannot find them says what it would say of another's: known after a run."""
    pack()
    import nodes
    assert lines(custom())[0] == "count: model evaluations: 10"
    monkeypatch.delitem(nodes.NODE_CLASS_MAPPINGS, "BasicScheduler")
    assert lines(custom())[0] == "count: set by a link: sigmas (model evaluations known after a run)"


@NEEDS_FORK
def test_without_comfyui_s_scheduler_nodes_the_interface_works(loaded) -> None:
    told, warned = loaded[CASES[2]]
    assert "listeners 2 None" in told, warned


@NEEDS_FORK
def test_every_kind_of_sampler_runs_and_measures_without_a_server(loaded) -> None:
    """ComfyUI's modules as a library: nobody to show a progress to."""
    told, warned = loaded["library"]
    assert "files 3" in told, warned


IMPORTED = (
    "import importlib.util, sys; sys.path[:0] = sys.argv[2:];s = "
    "importlib.util.spec_from_file_location('pack', sys.argv[1] + '/__init__.py', "
    "submodule_search_locations=[sys.argv[1]]);m = importlib.util.module_from_spec(s); sys.modules['pack'] = "
    "m; s.loader.exec_module(m);print(hasattr(m, 'comfy_entrypoint'))")


@pytest.mark.parametrize(
    "content, part",
    [({"comfy/__init__.py": "",
       "comfy/samplers.py": "import gone_from_torch"}, "No module named 'gone_from_torch'"),
     ({"comfy/__init__.py": ""}, "No module named 'comfy.samplers'"),
     ({"comfy/__init__.py": "", "comfy/samplers.py": "from comfy import gone"}, "cannot import name 'gone'"),
     ({"comfy/__init__.py": "", "comfy/samplers.py": ""}, "No module named 'comfy_api'"), ])
def test_an_import_that_fails_inside_comfyui_is_raised_so_that_comfyui_says_so(tmp_path, content,
                                                                               part) -> None:
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(ROOT), str(tmp_path)], capture_output=True, text=True,
        cwd=tmp_path)
    assert done.returncode == 1 and part in done.stderr


def test_install_goes_on_where_the_folder_cannot_be_made(tmp_path) -> None:
    there = tmp_path / "custom_nodes" / "lambda-solvers"
    there.mkdir(parents=True)
    (there / "install.py").write_text((ROOT / "install.py").read_text())
    (tmp_path / "models").write_text("a file, for once")
    done = subprocess.run([sys.executable, str(there / "install.py")], capture_output=True, text=True)
    assert done.returncode == 0 and "solver_calibrations cannot be made" in done.stdout, done.stderr


# --- the calibration in the image's metadata ----------------------------------------------------------------


def test_the_calibration_of_a_run_is_noted_in_the_prompt_that_comfyui_writes_into_the_image(
        monkeypatch, noted, tmp_path) -> None:
    drawn, storage = two_trajectories(), sys.modules[f"{pack().__name__}.samplers.learning.storage"]
    drawn = module("kinds", "hosting").Statistics(drawn.lam, **drawn.curves(), root=drawn.root)
    digest = storage.digest(drawn.arrays())
    drawn.save(tmp_path / "a.safetensors")
    assert storage.digest(type(drawn).load(
        tmp_path / "a.safetensors").arrays()) == digest and len(digest) == 12
    graph, unused = (ksampler(sampler_name="lambda_v3") for _ in range(2))
    run(graph, "5", 12, monkeypatch, family="dpm_solver_v3", statistics=drawn, use={"statistics": drawn})
    assert noted(graph, "5") == {
        "version": module("status.metadata").version(), "calibrations": [{"name": "file", "digest": digest}]
    }
    assert noted(graph, "1") is None and graph["5"]["inputs"] == unused["5"]["inputs"]
    assert f"note: the last run used file, digest {digest}" in lines(graph)
    plain = ksampler()
    run(plain, "5", 12, monkeypatch)
    assert plain == ksampler()  # nothing was used, and nothing is written
    assert not any("digest" in line for line in lines(plain))


def test_a_digest_tells_other_names_shapes_and_values_apart() -> None:
    digest, one = module("events", "hosting").digest, two_trajectories().arrays()
    others = [{**one, "l": one["l"] + 1e-9}, {**one, "l": one["l"][:, None]},
              {("k" if name == "l" else name): value for name, value in one.items()}]
    assert len({digest(one), *map(digest, others)}) == 4
    assert digest({name: value.astype(">f8") for name, value in one.items()}) == digest(one)


def test_a_node_that_samples_several_times_notes_every_calibration_once(monkeypatch, noted) -> None:
    graph, first, second = ksampler(), two_trajectories(), module("kinds", "hosting").Statistics.constant()
    for used in (first, second, first):
        run(graph, "5", 12, monkeypatch, use={"statistics": used})
    assert len(noted(graph, "5")["calibrations"]) == 2


def test_a_node_that_another_has_made_while_running_notes_on_that_one(monkeypatch, noted) -> None:
    graph = ksampler()
    run(graph, "5.0.0.2", 12, monkeypatch, use={"statistics": two_trajectories()}, made_by="5")
    assert noted(graph, "5") and not module("status.runs")._runs
    inside = {"4:1": ksampler()["5"]}  # in a subgraph of the interface, which sends it so
    run(inside, "4:1", 12, monkeypatch, use={"statistics": two_trajectories()})
    assert noted(inside, "4:1")


def test_a_kept_result_is_noted_anew_in_the_next_prompt_and_what_came_with_a_prompt_is_not_believed(
        monkeypatch, noted) -> None:
    queued = module("status.metadata").queued
    graph = ksampler()
    run(graph, "5", 12, monkeypatch, use={"statistics": two_trajectories()})
    said = noted(graph, "5")
    again = queued({"prompt": ksampler() | {"20": node("SaveImage", images=["5", 0])}, "number": 3})["prompt"]
    assert noted(again, "5") == {**said, "cached": True}
    # it was not kept after all
    run(again, "5", 12, monkeypatch, use={"statistics": module("kinds", "hosting").Statistics.constant()})
    assert "cached" not in noted(again, "5") and noted(again, "5")["calibrations"] != said["calibrations"]
    other = json.loads(json.dumps(graph))  # as the image has it, with another model
    other["1"]["inputs"]["ckpt_name"] = "b.safetensors"
    assert noted(queued({"prompt": other})["prompt"], "5") is None
    assert queued({"prompt": {"1": {"class_type": "A", "inputs": {"a": ["1", 0]}}}})  # it goes round
    assert queued({}) == {} and queued({"prompt": {"5": {"_meta": {"title": "A"}}}
                                        }) == {"prompt": {"5": {"_meta": {"title": "A"}}}}


def test_a_prompt_with_strange_metadata_loses_no_image(monkeypatch, caplog) -> None:
    graph = ksampler()
    graph["5"]["_meta"] = "KSampler"
    run(graph, "5", 12, monkeypatch, use={"statistics": two_trajectories()})
    assert "its images are not concerned" in caplog.text and graph["5"]["_meta"] == "KSampler"


@pytest.mark.parametrize("came, name", [("given", "given"), ("attached", "attached"), ("saved", "folder/one"),
                                        ("measured", "model-cfg3"), ("not written", "measured")])
def test_a_calibration_is_known_by_where_it_came_from(monkeypatch, came: str, name: str, tmp_path) -> None:
    calibration, store, found = module("library", "hosting"), module("store", "hosting"), two_trajectories()
    told = {**ABOUT, "model": "model", "any": "any-1"}
    monkeypatch.setattr(module("nobody"), "description", lambda guider: told)
    monkeypatch.setattr(module("nobody"), "conditions", lambda run: contextlib.nullcontext())
    monkeypatch.setattr(calibration, "warn", lambda *run: None)
    monkeypatch.setattr(calibration, "choice", lambda *run: ("folder/one.safetensors", found)
                        if came == "saved" else None)
    monkeypatch.setattr(store, "partial", lambda name: None)
    (tmp_path / "a file").touch()
    where = tmp_path / ("a file" if came == "not written" else "") / "model-cfg3.safetensors"
    monkeypatch.setattr(store, "spare", lambda name, content: where)
    one = {name: lambda *run: 1 for name in ("cost", "images", "sampled")}
    kind = types.SimpleNamespace(option="statistics", type=type(found), attachment="a", noun="statistics",
                                 makes="", **one, name=lambda about: "", about=lambda run: {},
                                 suited=lambda found, about: (found, about["channels"]),
                                 measure=lambda *run: found)
    model = Model(lambda x, sigma: x, sampling_of("EPS"))
    model.inner_model.model_patcher.get_attachment = lambda name: found if came == "attached" else None
    monkeypatch.setattr(module("guided_run").Run, "apart", lambda self: contextlib.nullcontext())
    asked = module("guided_run").Run(model, torch.zeros(1, 3), torch.tensor([1.0, 0.0]), {}, {})
    assert calibration.calibration_for(kind, asked, found if came == "given" else None,
                                       "auto") == (name, found, (found, 3))


# --- requests that nobody sends by mistake ------------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf"), -10**400, 2.1**64])
def test_numbers_that_no_workflow_has_are_refused(value) -> None:
    """Python's JSON reads them all, and a schedule of them ended in an error of the server's."""
    for graph in (ksampler(cfg=value),
                  custom(
                      scheduler=node("KarrasScheduler", steps=5, sigma_max=value, sigma_min=0.03, rho=7.0))):
        with pytest.raises(ValueError, match="must be from -1.8"):
            module("status.web").checked({"node": "5", "graph": graph})
    assert module("status.web").checked({"node": "5", "graph": ksampler(seed=2**64 - 1)})


def test_a_refusal_does_not_repeat_all_that_was_sent() -> None:
    with pytest.raises(ValueError) as fault:
        module("status.web").checked({"node": "5", "graph": ksampler(model=["x" * 10**6])})
    assert len(str(fault.value)) < 300


def test_no_memory_is_kept_of_languages_that_are_asked_for() -> None:
    for k in range(50):
        assert lines(ksampler(), locale=f"made up {k}") == lines(ksampler())
    assert module("status.web").translations.cache_info().currsize == 1
