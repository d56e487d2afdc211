"""What a registry publishes: its configuration, the rules it runs, an archive that works alone. The rest:
dev/package.py."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import environment
from comfy_host import comfy_sampling
from comfyui_server import Server
from test_nodes import NAMES, SAMPLER_NODES
from test_server import Graph, looks_like_an_image
from test_tree import ROOT, published


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A ComfyUI base directory with the unpacked archive, the tiny checkpoint, and nothing else of this
    repository."""
    base = environment.base_directory(tmp_path_factory.mktemp("alone"))
    (base / "custom_nodes" / "lambda-solvers").unlink()
    archive = base / "node.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
        for path in published():
            content.write(path, path.relative_to(ROOT))
    with zipfile.ZipFile(archive) as content:
        content.extractall(base / "custom_nodes" / "lambda-solvers")
    environment.link_to(base / "custom_nodes" / "doubles", ROOT / "tests" / "doubles")
    return base


def test_the_registry_s_parser_reads_the_configuration() -> None:
    comfy_sampling()  # ComfyUI's folder is on the path from here on
    from comfy_config.config_parser import extract_node_configuration
    config = extract_node_configuration(str(ROOT))
    assert config.project.name == "lambda-solvers" and re.fullmatch(r"\d+\.\d+\.\d+", config.project.version)
    assert config.project.license.file == "LICENSE" and config.project.description
    assert config.project.dependencies == []
    # one unknown value empties them
    assert config.project.supported_os and not config.project.supported_accelerators  # none was run on yet
    assert config.project.supported_comfyui_version == ">=0.3.75"
    assert config.project.requires_python == ">=3.10"
    assert config.tool_comfy.publisher_id and config.tool_comfy.display_name


def test_the_registry_s_ruff_rules_find_nothing() -> None:
    """S102 exec, S307 eval, E702 statements in one line: in the archive, and in what it leaves out."""
    found = subprocess.run([
        sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--select", "S102,S307,E702",
        str(ROOT)
    ], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


WIDEST = 110
"""Of a line, in characters."""


def test_no_line_is_wider_than_agreed() -> None:
    found = subprocess.run([
        sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--select", "E501",
        "--line-length",
        str(WIDEST),
        str(ROOT)
    ], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_what_the_archive_leaves_out_are_whole_folders_and_nothing_it_needs() -> None:
    kept = {path.relative_to(ROOT).as_posix() for path in published()}
    assert {
        "README.md", "requirements.txt", "install.py", "pyproject.toml", "web/docs/LambdaCompareSamplers.md"
    } <= kept
    assert not [name for name in kept if re.match(r"(dev|docs|tests|\.ci|\.dev)/|\.git", name)]


def test_the_archive_works_alone(alone) -> None:
    with Server(environment.ensure(), alone) as server:
        info = server.get("/object_info")
        assert {*SAMPLER_NODES, "LambdaCompareSamplers", "LambdaMeasureModel"} <= set(info)
        assert set(NAMES) <= set(info["KSampler"]["input"]["required"]["sampler_name"][0])
        ours, theirs = (Graph("panda").ksampler(name).samples(server) for name in ("lambda_2m", "dpmpp_2m"))
        assert looks_like_an_image(ours)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
        templates = server.get("/workflow_templates")["lambda-solvers"]
        assert {path.stem for path in (ROOT / "example_workflows").glob("*.json")} == set(templates)
        assert not re.search("IMPORT FAILED.*lambda-solvers", server.log.read_text())
    shutil.rmtree(alone / "custom_nodes" / "lambda-solvers")
    left = {
        path.relative_to(alone).parts[0] for path in alone.rglob("*") if "solver_calibrations" in path.parts
    }
    assert left <= {"models"}
