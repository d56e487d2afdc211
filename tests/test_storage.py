"""Files that may come from anyone, and partials: what they say is safe to show, and what is written can be
read."""
from __future__ import annotations

import json
import os
import random
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from problems import reference_mixture
from samplers import Amed, CalibrationError, Statistics, fit_amed, refit_multistep
from samplers.learning import storage
from samplers.learning.storage import ABOUT, SHARE, Partial, digest, plain
from sealed import write_sealed
from test_amed import SIGMAS, noises
from test_calibrate import mixture, noise
from test_fitted import calibration

SCRIPT = "<img src=x onerror=alert(1)>"
HOSTILE = [SCRIPT, "a&#x3c;b", "line\nbreak", "nul\0", "\x1b[31m", "turned \u202e round", "x" * 201]
DESCRIPTION = {
    "model": "SD15-0123456789ab", "fingerprint": "0123456789ab", "conditions": "01234567",
    "patches": ["a", "b"], "guidance": 3.0, "strengths": [0.8], "distilled": [None, 3.5], "prompts": 12
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of each kind, with all that is ever said in one."""
    folder = tmp_path_factory.mktemp("files")
    found = refit_multistep(mixture(), noise(4, seed=3),
                            calibration(intervals=8, about={**DESCRIPTION, "fitted": True}), 4,
                            about=DESCRIPTION)
    found.save(folder / "statistics.safetensors")
    fit_amed(reference_mixture("ve")[0], noises(4), SIGMAS, held_out=1,
             about=DESCRIPTION).save(folder / "amed.safetensors")
    return {path.stem: path for path in folder.iterdir()}


KINDS = {"statistics": Statistics, "amed": Amed}


def parts(path: Path) -> tuple[dict, dict]:
    """Tensors and metadata, without the seal, as problems.write_sealed takes them."""
    with safe_open(path, framework="numpy") as file:
        return ({name: file.get_tensor(name) for name in file.keys()},
                {name: text for name, text in file.metadata().items() if name != "seal"})


def places(value, where=()):
    """The way to every value that is not a list or an object."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*where, key))
    else:
        yield where


def with_value(value, where, new):
    if not where:
        return new
    changed = value.copy()
    changed[where[0]] = with_value(value[where[0]], where[1:], new)
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_of_a_file_is_refused_if_it_is_not_plain_and_nothing_of_it_is_repeated(
        tmp_path, files, kind: str) -> None:
    tensors, metadata = parts(files[kind])
    about = json.loads(metadata["about"])
    everywhere = list(places(about))
    assert len(everywhere) > 20
    for where in everywhere:
        for new in HOSTILE if isinstance(where[-1], str) or "patches" in where else HOSTILE[:1]:
            write_sealed(tmp_path / "x.safetensors", tensors,
                         {**metadata, "about": json.dumps(with_value(about, where, new))})
            with pytest.raises(
                    CalibrationError,
                    match=f"about.{where[0]}.* is .*: it must be .*: measure again, or get it anew"
            ) as refused:
                KINDS[kind].load(tmp_path / "x.safetensors")
            assert not set(str(refused.value)) & set("<>&\n\0\x1b\u202e")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [float("inf"), 1e300, 10**400, [], {}, [[[1.0]]], True, None, "1"])
def test_a_number_is_a_finite_number(tmp_path, files, kind: str, new) -> None:
    tensors, metadata = parts(files[kind])
    about = {**json.loads(metadata["about"]), "guidance": new}
    text = json.dumps(about).replace("Infinity", "1e999")
    write_sealed(tmp_path / "x.safetensors", tensors, {**metadata, "about": text})
    with pytest.raises(CalibrationError, match="about.guidance is .*: it must be a finite number"):
        KINDS[kind].load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_file_cannot_speak_either(tmp_path, files, kind: str) -> None:
    """Its format, names of tensors, and what is no JSON."""
    tensors, metadata = parts(files[kind])
    for broken in ((tensors, {**metadata, "format": f"{metadata['format'].rpartition(' ')[0]} {SCRIPT}"
                              }), (tensors, {"format": SCRIPT}), ({**tensors, SCRIPT: np.zeros(1)}, metadata),
                   ({SCRIPT: np.zeros(1)}, metadata), (tensors, {**metadata, "about": SCRIPT}),
                   (tensors, {**metadata, "about": json.dumps([SCRIPT])})):
        write_sealed(tmp_path / "x.safetensors", *broken)
        with pytest.raises(CalibrationError) as refused:
            KINDS[kind].load(tmp_path / "x.safetensors")
        assert not set(str(refused.value)) & set("<>&")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_damaged_anywhere_is_refused_or_still_what_it_was(tmp_path, files, kind: str) -> None:
    whole, path = files[kind].read_bytes(), tmp_path / "x.safetensors"
    expected, chance, refused = KINDS[kind].load(files[kind]), random.Random(0), 0
    for _ in range(300):
        changed = bytearray(whole)
        changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            found = KINDS[kind].load(path)
        except CalibrationError:
            refused += 1
            continue
        assert digest(found.arrays()) == digest(expected.arrays()) and found.about == expected.about
    assert refused > 250


@pytest.mark.parametrize(("more", "message"), [
    ({}, "has no seal, so nothing tells .*: measure again, or get it anew"),
    ({"seal": "0" * 16}, "does not hold what was written: its seal is broken"),
    ({"sea1": "0" * 16}, "its header has names that no file has"),
])
def test_a_file_without_its_seal_is_refused(tmp_path, files, more: dict, message: str) -> None:
    tensors, metadata = parts(files["statistics"])
    save_file(tensors, tmp_path / "x.safetensors", metadata | more)
    with pytest.raises(CalibrationError, match=message):
        Statistics.load(tmp_path / "x.safetensors")
    write_sealed(tmp_path / "x.safetensors", tensors, metadata)
    assert Statistics.load(tmp_path / "x.safetensors").about == Statistics.load(files["statistics"]).about


def test_a_file_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch, caplog) -> None:
    """As on Windows while another process reads it."""
    def refuse(*paths) -> None:
        raise PermissionError(13, "it is being used by another process")

    Statistics.constant().save(tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        calibration(intervals=4).save(tmp_path / "x.safetensors", overwrite=True)
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_cannot_be_kept_is_said_once_and_tried_again(tmp_path, monkeypatch, caplog) -> None:
    """As on Windows while a virus scanner reads the file, or on a disk that is full for a while."""
    def refuse(*paths) -> None:
        raise PermissionError(13, "it is being used by another process")

    partial = Partial(tmp_path / "x.part", "lambda-solvers partial 1", torch.zeros(1), {}, 0.0)
    partial.write({"x": torch.zeros(2)}, 1, at_once=True)
    with monkeypatch.context() as there:
        there.setattr(os, "replace", refuse)
        for done in (2, 3):
            partial.write({"x": torch.ones(2)}, done, at_once=True)
    assert partial.read()[1] == 1 and len(caplog.records) == 1
    assert "goes on, but if it is cut short it starts again from what was kept before" in caplog.text
    partial.write({"x": torch.ones(2)}, 4, at_once=True)
    kept, following = partial.read()
    assert following == 4 and kept["x"].tolist() == [1.0, 1.0]
    partial.remove()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="needs root, to be nobody")
def test_a_folder_that_cannot_be_looked_into_keeps_nothing_and_stops_no_measurement(tmp_path, caplog) -> None:
    (tmp_path / "shut").mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        partial = Partial(tmp_path / "shut" / "x.part", "lambda-solvers partial 1", torch.zeros(1), {}, 0.0)
        assert partial.read() == ({}, 0)
        partial.write({"x": torch.zeros(2)}, 1, at_once=True)
        assert "x.part cannot be written" in caplog.text
        partial.remove()
    finally:
        os.seteuid(0)


def test_what_is_not_known_is_left_out_and_everything_that_is_written_is_known(tmp_path, files) -> None:
    tensors, metadata = parts(files["statistics"])
    about = json.loads(metadata["about"])
    more = {
        **about, "comment": SCRIPT, SCRIPT: 1, "refits": {**about["refits"], SCRIPT: about["refits"]["4"]}
    }
    more["refits"]["4"] = {**more["refits"]["4"], "more": [SCRIPT]}
    write_sealed(tmp_path / "x.safetensors", tensors, {**metadata, "about": json.dumps(more)})
    assert Statistics.load(tmp_path / "x.safetensors").about == about == Statistics.load(
        files["statistics"]).about
    assert Amed.load(files["amed"]).about.keys() | about.keys() <= ABOUT.keys()
    for name in KINDS:
        loaded = KINDS[name].load(files[name])
        assert {**DESCRIPTION, **{key: loaded.about[key] for key in DESCRIPTION}} == DESCRIPTION


@pytest.mark.parametrize("text", [*HOSTILE, "Cache.<lambda> of nodes"])
def test_what_other_packs_call_their_patches_is_written_so_that_it_loads(tmp_path, text: str) -> None:
    Statistics.constant().save(tmp_path / "x.safetensors")
    patched = Statistics(*(getattr(Statistics.constant(), name) for name in ("lam", "l", "s", "b")),
                         about={"patches": [text]})
    patched.save(tmp_path / "y.safetensors")
    assert Statistics.load(tmp_path / "y.safetensors").about == {"patches": [plain(text)]}
    assert plain(plain(text)) == plain(text)


def test_a_file_larger_than_any_of_ours_is_not_read_nor_written(tmp_path, monkeypatch) -> None:
    Statistics.constant().save(tmp_path / "x.safetensors")
    size = (tmp_path / "x.safetensors").stat().st_size
    monkeypatch.setattr(storage.read_checked, "__defaults__", (storage.SHARED._replace(largest=size - 1),))
    with pytest.raises(CalibrationError,
                       match=f"has {size} bytes: files of lambda-solvers statistics 1 have at most"):
        Statistics.load(tmp_path / "x.safetensors")
    monkeypatch.setattr(storage.write_checked, "__defaults__", (storage.SHARED._replace(largest=size - 1),))
    with pytest.raises(CalibrationError,
                       match="y.safetensors would have .* bytes: .*fewer samples or intervals"):
        Statistics.constant().save(tmp_path / "y.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]  # nor is a part of it left
    monkeypatch.undo()
    save_file({f"t{k}": np.zeros(1) for k in range(storage.MOST + 1)}, tmp_path / "z.safetensors",
              {"format": "lambda-solvers statistics 1"})
    with pytest.raises(CalibrationError, match="has tensors that no file of lambda-solvers statistics has"):
        Statistics.load(tmp_path / "z.safetensors")


@pytest.mark.parametrize(
    "change", [{"losses": {"trained": {"training": [1.0]}}}, {"losses": {"trained": {"held out": [1.0] * 4}}},
               {"losses": {"trained": {"training": [1.0] * 4}, "untrained": {"held out": [1.0] * 4}}}])
def test_errors_that_cannot_be_drawn_are_refused(tmp_path, files, change: dict) -> None:
    tensors, metadata = parts(files["amed"])
    write_sealed(tmp_path / "x.safetensors", tensors,
                 {**metadata, "about": json.dumps({**json.loads(metadata["about"]), **change})})
    with pytest.raises(CalibrationError,
                       match="about.losses must have 4 errors of the same images in every part"):
        Amed.load(tmp_path / "x.safetensors")


def test_a_refit_without_its_errors_is_refused(tmp_path, files) -> None:
    tensors, metadata = parts(files["statistics"])
    for selection in ([], [1.0], None):
        told = {"prompts": 1, **({} if selection is None else {"selection": selection})}
        write_sealed(tmp_path / "x.safetensors", tensors,
                     {**metadata, "about": json.dumps({"refits": {"4": told}})})
        with pytest.raises(CalibrationError,
                           match="about.refits.4 does not say the two errors of its selection: refit again"):
            Statistics.load(tmp_path / "x.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_new_files_have_here(tmp_path, mask: int) -> None:
    before = os.umask(mask)
    try:
        Statistics.constant().save(tmp_path / "x.safetensors")
        Statistics.constant().save(tmp_path / "x.safetensors", overwrite=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_writing_what_is_kept_takes_its_share_of_the_time_and_no_more(tmp_path, monkeypatch) -> None:
    """On a slow disk, with evaluations that take no time to speak of."""
    clock, writes = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(path, write, overwrite):
        clock[0] += 1.5
        writes.append(clock[0])

    monkeypatch.setattr(storage, "write_whole", slow)
    partial = Partial(tmp_path / "x.part", "lambda-solvers partial 1", torch.zeros(1), {}, 2.0)
    for done in range(10_000):
        clock[0] += 0.1
        partial.write({"x": torch.zeros(2)}, done)
    assert len(writes) > 5 and 1.5 * (len(writes) - 1) <= SHARE * clock[0] * 1.05
    partial.write({"x": torch.zeros(2)}, 0, at_once=True)  # cancelled: whatever it takes
    assert writes[-1] == clock[0]
