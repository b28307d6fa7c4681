"""Licenses are copied as plain checked strings, or not at all."""

import logging

import pytest

from optimum_otprune.checkpoints.card.base_card import LICENSES, checked_base_card, read_base_card
from tests.hostile import HOSTILE


def test_license_name_link_and_languages_are_read():
    card = "---\nlicense: other\nlicense_name: my-license-1.0\nlicense_link: LICENSE\nlanguage:\n- en\n- no\n---\n# x"
    assert read_base_card(card) == {
        "license": "other",
        "license_name": "my-license-1.0",
        "license_link": "LICENSE",
        "language": ["en", "no"],
    }


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# no front matter",
        "---\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: [mit, bsd]\n---\n",
    ],
)
def test_a_card_that_names_no_license_gives_none(card):
    assert read_base_card(card) == {}


def test_one_license_in_a_list_and_upper_case_are_understood():
    assert read_base_card("---\nlicense: [MIT]\nlanguage: de\n---\n") == {"license": "mit", "language": ["de"]}


def test_a_license_that_the_hub_does_not_list_is_kept_as_a_name():
    assert checked_base_card({"license": "House-License-2"}) == {"license": "other", "license_name": "House-License-2"}


@pytest.mark.parametrize("yaml", ["a: [", "a: &x [*y]", "? [a, b] : c\n- d", "[" * 5000, "a: b: c"])
def test_a_front_matter_that_is_no_yaml_is_told_and_says_nothing(yaml, caplog):
    with caplog.at_level(logging.WARNING):
        assert read_base_card(f"---\n{yaml}\n---\n") == {}
    assert "no license is copied" in caplog.text


def test_python_objects_in_yaml_are_strings_at_most():
    card = "---\nlicense: !!python/object/apply:os.system ['true']\nlanguage: !!python/name:os.system\n---\n"
    assert read_base_card(card) == {"license": "other", "license_name": "true"}


def test_hostile_values_are_left_out():
    for text in HOSTILE:
        checked = checked_base_card({"license": text, "license_link": text, "license_name": text, "language": [text]})
        assert checked.get("license", "mit") in LICENSES
        assert all(
            value.isprintable() and not set(value) & set("<>`|[]()\n")
            for value in map(str, [*checked, checked.get("license_name", "")])
        )
