"""Rules of the repository that no other test would notice."""
from __future__ import annotations

import ast
import asyncio
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from PIL import Image

import slow
from accuracy import table
from comfy_host import pack
from samplers import SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
TRACKED = [
    ROOT / name
    for name in subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                               check=True, capture_output=True, text=True).stdout.splitlines()
    if (ROOT / name).is_file()
]
PYTHON = [path for path in TRACKED if path.suffix == ".py"]
README, SOLVERS, DEVELOPMENT = ((ROOT / name).read_text(encoding="utf-8")
                                for name in ("README.md", "docs/solvers.md", "docs/development.md"))


def published() -> list[Path]:
    """What the registry's archive holds: tracked files that .comfyignore does not name."""
    left_out = [line.rstrip("/") for line in (ROOT / ".comfyignore").read_text().splitlines() if line]
    return [path for path in TRACKED if path.relative_to(ROOT).parts[0] not in left_out]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_python_files_are_plain_ascii() -> None:
    assert [path for path in PYTHON if not path.read_text(encoding="utf-8").isascii()] == []


LONGEST = 50
"""Of a function, in lines, its documentation apart."""


def test_functions_are_short() -> None:
    long = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                told = len((ast.get_docstring(node, clean=False) or "").splitlines())
                if (lines := node.end_lineno - node.lineno + 1 - told) > LONGEST:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines}")
    assert long == []


def test_the_solvers_know_nothing_of_comfyui_and_need_only_what_it_installs() -> None:
    known = {*sys.stdlib_module_names, "torch", "numpy", "scipy", "torchsde", "tqdm", "safetensors", "einops"}
    for path in (ROOT / "samplers").rglob("*.py"):
        assert imports(path) <= known, path


def test_modules_import_downwards_only() -> None:
    order = [
        "schedule", "clocks", "tensors", "model", "phi", "integrand", "solver", "score_sde", "noise",
        "denoisers", "sample",
        *(f"learning.{name}" for name in (
            "storage", "record", "hypersolver", "statistics", "fitted", "predictor", "amed", "course",
            "gauss_newton", "measure", "train_amed", "refit", "train_hypersolver")),
        "catalogue", "families", "k_diffusion", "classifier", "__init__"
    ]
    for path in (ROOT / "samplers").rglob("*.py"):
        folder = path.relative_to(ROOT / "samplers").parts[:-1]
        own = ".".join([*folder, path.stem])
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = ".".join([*folder[:len(folder) + 1 - node.level], node.module])
                assert order.index(imported) < order.index(own), f"{own} imports {imported}"


def test_the_archive_is_small_and_has_no_tests_and_starts_no_processes() -> None:
    files = published()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files:
            packed.write(path, path.relative_to(ROOT))
    assert len(archive.getvalue()) < 1_000_000
    assert {"__init__.py", "nodes/host.py", "samplers/solver.py", "LICENSE", "pyproject.toml"} <= {
        path.relative_to(ROOT).as_posix() for path in files}
    for path in files:
        assert path.relative_to(ROOT).parts[0] not in ("dev", "docs", "tests", ".ci")
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"subprocess|os\.system|\beval\(|\bexec\(|__import__|pickle|requests|urllib",
                                 text), path


def test_nothing_is_required_at_run_time() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(line.startswith("#") or not line.strip() for line in lines)


def test_the_table_of_solvers_is_what_its_command_writes() -> None:
    """Every sampler with its equation and source, as the catalogue has them, and a figure that was
    measured."""
    found, names = table.rows(SOLVERS), list(SAMPLERS)
    figures = [row[table.FIGURE] for row in found]
    assert found == [table.row(SAMPLERS[name], figure) for name, figure in zip(names, figures, strict=True)]
    assert all(re.fullmatch(r"\d+\.\d\d( \(\d+\))?", figure) for figure in figures)
    assert all(f"| ({number}) |" in SOLVERS for number in table.EQUATIONS)


def test_the_readme_is_one_screen_and_all_that_documents_link_to_is_there() -> None:
    assert len(README.encode()) <= 8192
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_example_without_comfyui_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", DEVELOPMENT, re.S)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_every_node_has_a_help_page_that_explains_its_widgets() -> None:
    for node in asyncio.run(pack().comfy_entrypoint().get_node_list()):
        page = ROOT / "web" / "docs" / f"{node.GET_SCHEMA().node_id}.md"
        text = page.read_text(encoding="utf-8")
        for name, (kind, *_) in (spec for specs in node.INPUT_TYPES().values() for spec in specs.items()):
            if isinstance(kind,
                          list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") and name != "cfg":
                assert f"`{name}`" in text, f"{page.name} does not explain {name}"


def test_every_help_page_has_an_equation_a_picture_and_says_when_to_use_the_node() -> None:
    pages = sorted((ROOT / "web" / "docs").glob("*.md"))
    pictures = {ROOT / "web" / "docs" / "pictures" / f"{page.stem}.webp" for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.search(r"\n\n    .*(=|min ).*\n", text), f"{page.name} has no equation"
        assert "Use it " in text, f"{page.name} does not say when to use the node"
        words, picture = re.search(r"\n\n!\[(.+)\]\((.+)\)\n", text).groups()
        assert picture == f"pictures/{page.stem}.webp" and words[0].isupper(), page
        with Image.open(page.parent / picture) as image:
            assert image.width > 500 and len(
                image.convert("L").getcolors()) > 20, f"{page.name}: {image.size}"
    assert pictures == {path for path in published()
                        if path.parent.name == "pictures"}, "run python dev/pictures.py"


def test_what_only_the_long_run_tests_has_a_test_in_every_run() -> None:
    """tests/slow.py names a test that exists and is not slow itself, or leaves some of its own cases."""
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for key, sibling in slow.SLOW.items():
        kept = slow.function(key) if sibling == "other cases" else sibling
        assert f"def {slow.function(key)}(" in code and f"def {kept}(" in code, key
        assert ("[" in key) if sibling == "other cases" else kept not in map(slow.function, slow.SLOW) or any(
            slow.function(other) == kept and "[" in other for other in slow.SLOW), key
    for key in slow.BOTH_ENDS:
        assert f"def {slow.function(key)}(" in code, key
