"""Translations are complete and of what the nodes say now, and every input and output has a tooltip."""
from __future__ import annotations

import asyncio
import re

import pytest

import locales
from comfy_host import pack

FILES = [(language, name) for language in ("en", "zh")
         for name in ("main.json", "nodeDefs.json", "settings.json")]
REMEDY = "put the texts into dev/zh.json and run `python dev/locales.py`"


@pytest.fixture(scope="module")
def contents() -> dict[str, dict[str, dict]]:
    english = locales.english()
    return {"en": english, "zh": locales.translated(english, locales.table())[0]}


def test_every_text_has_a_translation_and_no_translation_is_left_over() -> None:
    english = locales.english()
    assert locales.translated(english, locales.table())[1] == [], REMEDY
    assert locales.unused(english, locales.table()) == set(), "take these out of dev/zh.json"


@pytest.mark.parametrize("language, name", FILES)
def test_the_files_are_what_the_definitions_say(contents, language: str, name: str) -> None:
    found = (locales.LOCALES / language / name).read_text(encoding="utf-8")
    assert found == locales.written(
        contents[language][name]), f"locales/{language}/{name} is out of date: {REMEDY}"


def test_a_translation_keeps_the_places_of_the_numbers() -> None:
    for english, chinese in locales.table()["texts"].items():
        assert sorted(re.findall(r"{\w*}", english)) == sorted(re.findall(r"{\w*}", chinese)), english


def test_no_text_of_a_node_or_setting_has_a_sign_that_the_interface_would_interpret(contents) -> None:
    def words(content):
        return [content] if isinstance(content,
                                       str) else [word for part in content.values() for word in words(part)]
    for language in contents:
        for name in ("nodeDefs.json", "settings.json"):
            assert [word for word in words(contents[language][name]) if re.search("[{}@|]", word)] == []


def test_every_input_and_output_has_a_tooltip() -> None:
    for node in asyncio.run(pack().comfy_entrypoint().get_node_list()):
        schema = node.GET_SCHEMA()
        for entry in [*schema.inputs, *(schema.outputs or [])]:
            assert entry.tooltip, f"{schema.node_id}: {entry.id or entry.display_name} has no tooltip"
