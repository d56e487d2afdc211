"""Compare Samplers in a real ComfyUI server: counted, cached, cancelled, and honest about what failed."""
from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from test_server import Graph, looks_like_an_image

REFERENCE = 40


def comparison(graph: Graph, **changes) -> Graph:
    """The node at the end of a graph, with its table and choice shown as text."""
    inputs = dict(model=graph.model, positive=graph.positive, negative=graph.negative,
                  latent_image=graph.latent, cfg=3.0, seed=7, samplers="euler\nlambda_2m",
                  schedulers="karras", evaluations="4, 6", error=0.3, denoise=1.0,
                  reference_evaluations=REFERENCE, vae=[graph.checkpoint, 2])
    node = graph.add("LambdaCompareSamplers", **{**inputs, **changes})
    graph.shown = [graph.add("PreviewAny", source=[node, slot]) for slot in (2, 3)]
    graph.pictures = [graph.add("PreviewImage", images=[node, slot]) for slot in (0, 1)]
    graph.compare = node
    return graph


def run(graph: Graph, server, watch=None):
    """What happened, the table's rows, the whole table, and the choice."""
    ran = server.run(graph.nodes, watch)
    if ran.status != "success":
        return ran, [], "", ""
    table, cheapest = (ran.outputs[node]["text"][0] for node in graph.shown)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
            if line.startswith("| ")][1:]
    return ran, rows, table, cheapest


def test_everything_is_counted_and_the_reference_is_made_once(server) -> None:
    graph = comparison(Graph("panda").counted(), evaluations="4, 8",
                       samplers="euler\nheun\nlambda_2m\nlambda_2m_sde\nlambda/dpmpp_2m")
    ran, rows, table, cheapest = run(graph, server)
    assert ran.status == "success", ran.error
    assert len(rows) == 10 and {row[0]: row[5]
                                for row in rows}["lambda_2m_sde"] == "stochastic: goes to another image"
    assert {(row[0], row[2], row[3]) for row in rows} >= {("euler", "4", "4"), ("heun", "3", "2"),
                                                          ("heun", "7", "4"), ("lambda_2m", "8", "8")}
    spent = sum(int(row[2]) for row in rows)
    assert spent == 4 * (4 + 8) + 3 + 7
    made = int(re.search(r"Reference: (\d+) evaluations", table)[1])
    doubt = float(re.search(r"with half as many is ([0-9.]+) away", table)[1])
    counted = len(graph.evaluations(server))
    assert made <= REFERENCE and made + 10 < counted - spent <= made + REFERENCE // 2 and doubt < 0.1
    errors = {(row[0], row[2]): float(row[4]) for row in rows}
    assert errors["lambda_2m", "8"] == errors["lambda/dpmpp_2m", "8"] < errors["euler", "8"] < errors["euler",
                                                                                                      "4"]
    assert table.startswith(cheapest) and re.search(r"\(within 0.3\)|nothing is within 0.3", cheapest)
    assert any(
        re.fullmatch(r"\d+ of 10: heun, karras, 4 evaluations; \d+ s left", text) for text in ran.texts)
    before, timed = (text for text in ran.texts if text.startswith("as long as"))
    cost = f"as long as {round(counted / 20)} images of 20 steps"
    assert before == f"{cost}, and more where a sampler measures or trains first"
    assert re.fullmatch(rf"{cost}, about \d+ (seconds|minutes)", timed)
    assert ran.texts[-1] == cheapest and ran.progress[-1][0] == ran.progress[-1][1] == counted
    plot, sheet = (Image.open(server.file(ran.outputs[node]["images"][0])).convert("RGB")
                   for node in graph.pictures)
    assert plot.size == (1000, 600) and ran.outputs[graph.compare]["images"]
    assert len(sheet.getcolors(10**7)) > 1000

    graph.nodes[graph.compare]["inputs"] |= {"samplers": "deis", "vae": [graph.checkpoint, 2]}
    ran, rows, _, _ = run(graph, server)
    assert ran.status == "success" and len(graph.evaluations(server)) == counted + 4 + 8
    graph.nodes[graph.compare]["inputs"]["seed"] = 8
    run(graph, server)
    assert len(graph.evaluations(server)) > counted + 2 * (4 + 8) + 30


def test_a_fine_run_has_no_error_left(server) -> None:
    graph = comparison(Graph("panda"), samplers="lambda_2m", schedulers="exponential", evaluations="40",
                       vae=None)
    _, rows, _, _ = run(graph, server)
    assert float(rows[0][4]) < 0.02


def test_v3_is_calibrated_by_its_own_rule_and_its_measurement_is_not_counted(base,
                                                                             server) -> None:
    folder = base / "models" / "solver_calibrations"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    graph = comparison(Graph("panda").counted(), samplers="lambda_v3", seed=3)
    ran, rows, table, _ = run(graph, server)
    assert ran.status == "success", ran.error
    assert [row[2] for row in rows] == ["4", "6"] and [path.suffix
                                                       for path in folder.glob("*.*")] == [".safetensors"]
    assert [bool(re.search("calibrated first with 108 evaluations, not counted", row[5]))
            for row in rows] == [True, False]


@pytest.mark.parametrize("samplers, error", [("lambda_2m", 10.0), ("lambda_v3\nlambda_fitted", 1e-3),
                                             ("lambda_amed", 10.0), ("dpm_2, s_noise=1.0", 10.0),
                                             ("lambda_2m_sde", 10.0)])
def test_sampler_and_sigmas_make_the_image_of_the_cell_that_was_chosen(base, server, samplers,
                                                                       error) -> None:
    """With the very calibration that it had, though another was saved since, which serves it as well."""
    folder = base / "models" / "solver_calibrations"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    graph = comparison(Graph("panda"), samplers=samplers, evaluations="3", schedulers="gits:1.20",
                       error=error, seed=21)
    graph.custom([graph.compare, 4], [graph.compare, 5], seed=21)
    graph.pictures.append(graph.add("PreviewImage", images=graph.image()))
    ran, rows, _, verdict = run(graph, server)
    assert ran.status == "success", ran.error
    assert ("nothing is within" in verdict) == (error < 0.1)
    _, sheet, image = (Image.open(server.file(ran.outputs[node]["images"][0])).convert("RGB")
                       for node in graph.pictures)
    cell, best = image.resize((168, 168), Image.Resampling.LANCZOS), min(float(row[4]) for row in rows)
    row = [row[0] for row in rows].index(next(row[0] for row in rows if float(row[4]) == best))
    lines = [line for line in samplers.splitlines() if line in {row[0] for row in rows}]
    top = 16 + 220 + 54 + 220 * lines.index(rows[row][0])
    shown, wanted = np.asarray(sheet, int)[top:top + 168], np.asarray(cell, int)
    apart = min(abs(shown[:, x:x + 168] - wanted).max() for x in range(shown.shape[1] - 167))
    assert apart <= 1  # a sheet is rounded down once more as it is saved
    assert verdict.count(rows[row][0])


def test_cells_that_fail_say_why_and_the_others_run(server) -> None:
    graph = comparison(Graph("panda"), samplers="lambda_2m\neuler", schedulers="kl_optimal, karras",
                       evaluations="1, 4", seed=5)
    ran, rows, _, cheapest = run(graph, server)
    assert ran.status == "success", ran.error
    failed = {(row[0], row[1], row[2]): row[5] for row in rows if not row[4]}
    assert "every sigma must be a finite number" in failed["lambda_2m", "kl_optimal", "of 1"]
    assert failed["euler", "kl_optimal",
                  "of 1"] == "failed: kl_optimal makes no schedule of 1 steps: [nan, 0.0]"
    assert len(rows) == 8 and len(failed) == 2 and cheapest.split()[0] in ("lambda_2m", "euler", "nothing")


def test_img2img_has_a_reference_for_every_start(server) -> None:
    graph = Graph("panda").ksampler("lambda_2m", steps=12)
    ran, rows, table, _ = run(
        comparison(graph, samplers="lambda_2m", evaluations="4, 6", denoise=0.5, seed=9), server)
    assert ran.status == "success", ran.error
    assert table.count("Reference: ") == 2 and all("starts at sigma" in row[5] for row in rows)
    assert all(float(row[4]) < 0.3 for row in rows)


def test_flow_models_and_batches_and_masks_are_compared(server) -> None:
    graph = Graph("red heart").through("TinyEmojiAsFlow")
    graph.latent = [graph.add("EmptyLatentImage", width=256, height=256, batch_size=2), 0]
    mask = graph.add("SolidMask", value=1.0, width=256, height=256)
    graph.latent = [graph.add("SetLatentNoiseMask", samples=graph.latent, mask=[mask, 0]), 0]
    ran, rows, table, _ = run(comparison(graph, schedulers="simple", evaluations="6, 12"), server)
    assert ran.status == "success", ran.error
    errors = {(row[0], row[2]): float(row[4]) for row in rows}
    assert errors["lambda_2m", "12"] < errors["lambda_2m", "6"] and errors["lambda_2m",
                                                                           "12"] < errors["euler", "12"]
    assert float(re.search(r"with half as many is ([0-9.]+) away", table)[1]) < 0.1


def test_cancel_leaves_a_working_server_and_the_finished_reference(server) -> None:
    cancelled = []

    async def watch(server, ran):
        if "1 of 4" in "".join(ran.texts[-1:]) and not cancelled:
            cancelled.append(True)
            await server.interrupt()

    graph = comparison(Graph("strawberry").counted().through("TestSlowModel", seconds=0.02))
    ran, *_ = run(graph, server, watch)
    assert ran.status == "interrupted" and cancelled
    spent = len(graph.evaluations(server))
    ran, rows, *_ = run(graph, server)
    assert ran.status == "success" and len(graph.evaluations(server)) - spent == sum(
        int(row[2]) for row in rows) == 20
    assert looks_like_an_image(Graph("red heart").ksampler("euler").samples(server))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"samplers": "eular"}, "unknown sampler 'eular'"), ({"schedulers": "karas"}, "unknown 'karas'"),
     ({"schedulers": "gits:2"}, "write gits: and one of 0.80"),
     ({"evaluations": "5, many"}, "'many' is out of range: write whole numbers from 1 to 1000")])
def test_what_cannot_be_read_is_refused_before_anything_runs(server, changes: dict,
                                                             message: str) -> None:
    graph = comparison(Graph("panda").counted(), **changes)
    ran, *_ = run(graph, server)
    assert ran.status == "error" and message in ran.error["exception_message"]
    assert not (server.base / "output" / f"{graph.counter}.count").exists()


def test_a_model_with_a_step_cache_is_compared_too(server) -> None:
    graph = comparison(
        Graph("panda").through("EasyCache", reuse_threshold=0.2, start_percent=0.15, end_percent=0.95,
                               verbose=False))
    ran, rows, *_ = run(graph, server)
    assert ran.status == "success", ran.error
    assert len(rows) == 4 and all(float(row[4]) > 0 for row in rows), rows
