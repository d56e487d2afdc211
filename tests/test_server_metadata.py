"""Which calibration made an image, read from the image that a real ComfyUI server has written."""
from __future__ import annotations

import asyncio
import contextlib
import json

import aiohttp
import pytest
from PIL import Image

from samplers import FAMILIES, Statistics
from samplers.learning.storage import digest
from test_server import Graph
from test_server_compare import comparison
from test_server_v3 import files, measure

KEY, EVENT = "lambda_solvers", "lambda_solvers.run"


def written(server, nodes: dict) -> tuple[dict, dict]:
    """The prompt in the image that a workflow saves, and what of it is on which node; checked for all
    else."""
    asked = json.loads(json.dumps(nodes))
    run = server.run(nodes)
    assert run.status == "success", run.error
    [shown] = [
        image for output in run.outputs.values() for image in output.get("images", [])
        if image["type"] == "output"
    ]
    with Image.open(server.file(shown)) as image:
        prompt = json.loads(image.info["prompt"])
    noted = {name: node["_meta"][KEY] for name, node in prompt.items() if KEY in node.get("_meta", {})}
    assert {name: {key: node[key] for key in ("class_type", "inputs")} for name, node in prompt.items()} == \
        {name: {key: node[key] for key in ("class_type", "inputs")} for name, node in asked.items()}
    return prompt, noted


def saved(graph: Graph, prefix: str = "a") -> dict:
    nodes = json.loads(json.dumps(graph.nodes))
    nodes["save"] = {
        "class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": prefix},
        "_meta": {"title": "Save"}
    }
    nodes["decode"] = {
        "class_type": "VAEDecode", "inputs": {"samples": graph.latent, "vae": [graph.checkpoint, 2]}
    }
    return nodes


def of(folder, kind: type = Statistics) -> dict:
    """What a note says of the one file there."""
    [name] = files(folder)
    return {"name": name.removesuffix(".safetensors"), "digest": digest(kind.load(folder / name).arrays())}


def test_the_name_and_digest_are_in_the_image_when_measured_found_kept_and_sent_again(
        server, folder) -> None:
    graph = Graph("panda").counted().ksampler("lambda_v3")
    node = graph.latent[0]
    prompt, noted = written(server, saved(graph))
    assert noted == {node: {"version": noted[node]["version"], "calibrations": [of(folder)]}}
    spent = len(graph.evaluations(server))

    for nodes in (saved(graph, "b"), json.loads(json.dumps(prompt)) | {"save": saved(graph, "c")["save"]}):
        again, kept = written(server, nodes)  # as a new workflow, and as the image itself has it
        assert kept == {node: {**noted[node], "cached": True}}
        assert again["save"]["_meta"]["title"] == "Save" and len(graph.evaluations(server)) == spent

    prompt[node]["inputs"]["seed"] = 8
    prompt["save"]["inputs"]["filename_prefix"] = "d"
    assert written(server, prompt)[1] == noted and len(graph.evaluations(server)) == spent + 8

    prompt[node]["inputs"]["sampler_name"] = "lambda_2m"  # which uses none, whatever the image said
    assert written(server, prompt)[1] == {}
    assert written(server, saved(Graph("panda").ksampler("dpmpp_2m")))[1] == {}


def test_with_a_custom_guider_inside_a_subgraph_and_with_what_is_given(server, folder) -> None:
    graph = Graph("panda")
    sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=5, denoise=1.0), 0]
    guider = [
        graph.add("CFGGuider", model=graph.model, positive=graph.positive, negative=graph.negative, cfg=3.0),
        0
    ]
    options = {
        name: option.default for name, option in FAMILIES["v3"].options.items() if option.stand_in is None
    }
    sampler = [graph.add("LambdaSamplerV3", measure="saved only", calibration=measure(graph), **options), 0]
    node = graph.add("SamplerCustomAdvanced", noise=[graph.add("RandomNoise", noise_seed=3), 0],
                     guider=guider, sampler=sampler, sigmas=sigmas, latent_image=graph.latent)
    graph.latent = ["4:1", 0]
    nodes = saved(graph)
    nodes["4:1"] = nodes.pop(node)
    nodes["1:9"] = nodes.pop(sampler[0])
    nodes["4:1"]["inputs"]["sampler"] = ["1:9", 0]
    _, noted = written(server, nodes)
    assert list(noted) == ["4:1"] and [entry["name"] for entry in noted["4:1"]["calibrations"]] == ["given"]
    assert files(folder) == []


def test_texts_and_runs_reach_the_client_that_queued_and_no_other(server, folder) -> None:
    async def queue() -> tuple:
        async with aiohttp.ClientSession() as session, session.ws_connect(
                f"{server.url}/ws?clientId=another") as other:
            run = await server._run(saved(Graph("panda").ksampler("lambda_v3", seed=11)), None, None)
            heard = []
            with contextlib.suppress(asyncio.TimeoutError):
                while True:
                    heard.append((await other.receive(timeout=1.0)).data)
            return run, heard

    run, heard = asyncio.run(queue())
    assert run.status == "success" and any("measuring" in text for text in run.texts)
    assert heard and not [data for data in heard if isinstance(data, bytes) or EVENT in data]


def test_on_the_node_of_the_workflow_that_has_made_the_sampling_node(server, folder) -> None:
    graph = Graph("panda")
    node = graph.add("TestKSamplerInside", model=graph.model, positive=graph.positive,
                     negative=graph.negative, latent_image=graph.latent, seed=3, sampler_name="lambda_v3")
    graph.latent = [node, 0]
    for prefix in ("e", "f"):
        _, noted = written(server, saved(graph, prefix))
        assert list(noted) == [node] and noted[node]["calibrations"] == [of(folder)]


@pytest.mark.parametrize("samplers, calibrated", [("lambda_v3\nlambda_fitted", True),
                                                  ("euler\nlambda_2m", False)])
def test_compare_samplers_notes_all_that_its_samplers_used(server, folder, samplers: str,
                                                           calibrated: bool) -> None:
    graph = comparison(Graph("panda"), samplers=samplers, evaluations="5")
    graph.nodes["save"] = {
        "class_type": "SaveImage", "inputs": {"images": [graph.compare, 0], "filename_prefix": "g"}
    }
    _, noted = written(server, graph.nodes)
    assert set(noted) == ({graph.compare} if calibrated else set())
    if calibrated:
        assert {entry["name"] for entry in noted[graph.compare]["calibrations"]
                } == {name.removesuffix(".safetensors") for name in files(folder)}
        assert len(files(folder)) == 2
