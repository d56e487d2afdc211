"""`python dev/abuse.py`, in short, and what it found."""
from __future__ import annotations

import random

import pytest

from abuses import CAMPAIGNS
from abuses.names import hosting
from processes import NEEDS_FORK
from samplers import Statistics


@NEEDS_FORK
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_short_campaign_finds_no_fault(tmp_path, name: str) -> None:
    found = CAMPAIGNS[name](tmp_path, random.Random(1), 0.0)
    assert found.faults == [] and max(found.figures.values()) > 2


@pytest.fixture
def store(tmp_path):
    return hosting(tmp_path)


@pytest.mark.parametrize("name", ["con", "CON.x", "nul .b", "a/lpt1", "COM\u00b9", "dot.", "space /b", "a./b",
                                  "\ud800", "\u202ea", "line\nbreak", "", " /a", "a//b"])
def test_a_name_that_some_system_cannot_hold_is_refused(store, name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be a file in solver_calibrations: .*such as con"):
        store.place(name)


@pytest.mark.parametrize("name", ["a", "a b", "console", "common/nullable", "\u00e9\u6f22", "v1.2", "com10"])
def test_a_plain_name_is_a_file_of_the_folder(store, tmp_path, name: str) -> None:
    Statistics.constant().save(store.place(name))
    assert store.names() == [f"{name}.safetensors"] and store.place(name).is_relative_to(tmp_path)


def test_a_name_below_a_file_is_refused(store) -> None:
    Statistics.constant().save(store.place("a"))
    for name in ("a.safetensors/b", "a.safetensors/b/c"):
        with pytest.raises(ValueError, match="leads through a file: choose another folder"):
            store.place(name)
