"""The file's text: one member changes, every other byte stays."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, small_routes
from hypothesis import given, settings
from hypothesis import strategies as st

from parts.jsontext import pretty, scan_object, set_member
from parts.table import BUILT_IN, load_table, routes_schema

SCHEMA = routes_schema()
SHIPPED = (ROOT / "routes.json").read_bytes().decode()
HAND = '{ "a":1 ,\n\n\t"b" : {"x": 1e3,"y":[1,  2]},"c\\u0061": 123456789012345678901234567890 }\n'
SMALL = small_routes("http://127.0.0.1:1")
LAYOUTS = {
    "one line": json.dumps(SMALL),
    "minified": json.dumps(SMALL, separators=(",", ":")),
    "two spaces": json.dumps(SMALL, indent=2) + "\n",
    "tabs": json.dumps(SMALL, indent="\t"),
    "blank lines": "\n\n" + json.dumps(SMALL, indent=4).replace("\n", "\n\n") + "\n\n",
    "windows": json.dumps(SMALL, indent=2).replace("\n", "\r\n"),
    "space before colons": json.dumps(SMALL, separators=(" , ", " : ")),
    "shipped": SHIPPED,
}

some = settings(max_examples=30, deadline=None)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), names
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4)
)
somethings = values.filter(lambda value: value is not None)
objects = st.dictionaries(names, values, max_size=5)
layouts = st.fixed_dictionaries(
    {
        "indent": st.sampled_from([None, 0, 1, 4, "\t"]),
        "separators": st.sampled_from([(",", ":"), (" , ", " : "), (",", ":\n"), (", ", ": ")]),
        "ensure_ascii": st.booleans(),
    }
)


def shipped_table():
    return load_table(SHIPPED)


# --- scan_object ----


@some
@given(objects, layouts)
def test_a_scan_reads_what_json_reads_and_says_where_its_members_stand(thing, layout):
    text = json.dumps(thing, **layout)

    found, members, end = scan_object(text)

    assert found == thing
    assert [m.key for m in members] == list(thing)
    assert [json.loads(text[m.value : m.end]) for m in members] == list(thing.values())
    assert all(text[m.start] == '"' for m in members)
    assert end == len(text)


def test_a_scan_may_begin_inside_a_text():
    found, _, end = scan_object(HAND, HAND.index('{"x"'))

    assert found == {"x": 1000.0, "y": [1, 2]}
    assert HAND[:end].endswith("2]}")


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", '{"a"}', '{"a":}', '{"a":1,}', "{,}", '{"a":1 "b":2}', '{"a":NaN}', "{a:1}",
     '{"a":1', '{"a\n":1}', '{"a":Infinity}', '{"a":01}'],
)  # fmt: skip
def test_a_scan_refuses_what_json_refuses(text):
    with pytest.raises(ValueError):  # as json.loads does
        scan_object(text)


# --- set_member ----


@some
@given(objects, layouts, names, somethings)
def test_setting_a_member_is_the_same_change_as_in_a_dictionary(thing, layout, key, value):
    text = set_member(json.dumps(thing, **layout), (key,), value)

    assert json.loads(text) == {**thing, key: value}
    assert list(json.loads(text)) == list({**thing, key: value})


@some
@given(objects.filter(bool), layouts, st.data())
def test_dropping_a_member_is_the_same_change_as_in_a_dictionary(thing, layout, data):
    key = data.draw(st.sampled_from(list(thing)))

    text = set_member(json.dumps(thing, **layout), (key,), None)

    assert json.loads(text) == {k: v for k, v in thing.items() if k != key}


@some
@given(objects, objects, layouts, names, somethings)
def test_setting_a_member_two_levels_down_changes_nothing_else(thing, inner, layout, key, value):
    text = json.dumps({"before": thing, "in": inner, "after": thing}, **layout)

    changed = set_member(text, ("in", key), value)

    assert json.loads(changed) == {"before": thing, "in": {**inner, key: value}, "after": thing}


@some
@given(objects.filter(bool), layouts, names, somethings)
def test_a_member_made_and_dropped_gives_the_bytes_back(thing, layout, key, value):
    new = key + "!"
    text = json.dumps({k: v for k, v in {**thing, "stays": 1}.items() if k != new}, **layout)

    made = set_member(text, (new,), value)

    assert set_member(made, (new,), None) == text


@some
@given(objects.filter(bool), layouts, somethings, st.data())
def test_every_byte_outside_the_value_is_kept(thing, layout, value, data):
    text = json.dumps(thing, **layout)
    member = data.draw(st.sampled_from(scan_object(text)[1]))

    changed = set_member(text, (member.key,), value)

    assert changed.startswith(text[: member.value])
    assert changed.endswith(text[member.end :])


@some
@given(objects, layouts)
def test_setting_what_stands_there_already_changes_no_byte(thing, layout):
    text = json.dumps({**thing, "a": [1, 2]}, **layout)

    assert set_member(text, ("a",), [1, 2]) == text


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        (("a",), 2, HAND.replace('"a":1 ,', '"a":2 ,')),
        (("b", "x"), 7, HAND.replace("1e3", "7")),
        (("b", "y"), None, HAND.replace(',"y":[1,  2]', "")),
        (("b", "x"), None, HAND.replace('"x": 1e3,', "")),
        (("ca",), 5, HAND.replace("123456789012345678901234567890", "5")),
        (("nowhere",), None, HAND),
    ],
)
def test_big_numbers_odd_spaces_and_escaped_keys_stay_as_they_are(path, value, wanted):
    assert set_member(HAND, path, value) == wanted


# --- the house form ----


@some
@given(values)
def test_the_house_form_means_the_same(value):
    assert json.loads(pretty(value)) == value


@some
@given(st.lists(st.text("abcé ", min_size=1, max_size=20), max_size=200))
def test_a_list_of_words_is_wrapped_at_a_hundred_columns(words):
    lines = pretty({"categories": {"x": {"keywords": words}}}).split("\n")

    assert max(map(len, lines)) <= 100


def test_a_list_of_words_is_not_one_word_per_line():
    words = [f"word{n}" for n in range(100)]

    assert pretty(words).count("\n") < 15


def test_a_word_longer_than_a_line_has_a_line_of_its_own():
    lines = pretty(["x" * 150, "short", "y" * 150]).split("\n")

    assert [line.strip() for line in lines[1:-1]] == [f'"{"x" * 150}",', '"short",',
                                                      f'"{"y" * 150}"']  # fmt: skip


def test_the_shipped_file_is_in_the_house_form_with_one_newline_at_its_end():
    assert pretty(json.loads(SHIPPED)) + "\n" == SHIPPED


def test_the_shipped_file_keeps_accents_readable():
    assert "\\u" not in SHIPPED


# --- changes made and undone on real files ----


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_category_changed_and_changed_back_gives_the_shipped_bytes_back(name):
    old = json.loads(SHIPPED)["categories"][name]
    new = {"models": ["a/b"], "keywords": ["z"], "description": "Other"}

    changed = shipped_table().with_category(name, new, must_exist=True)

    assert changed != SHIPPED
    assert load_table(changed).with_category(name, old, must_exist=True) == SHIPPED


def test_a_long_list_added_by_a_call_is_in_the_house_form_too():
    new = {"models": ["glm-5"], "keywords": [f"keyword {n}" for n in range(200)]}

    made = shipped_table().with_category("verse", new, must_exist=False)

    assert pretty(json.loads(made)) + "\n" == made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_category_made_and_deleted_gives_the_bytes_of_a_hand_formatted_file_back(layout):
    table = load_table(LAYOUTS[layout])

    made = table.with_category("verse", {"models": ["a/b"]}, must_exist=False)

    assert json.loads(made)["categories"]["verse"] == {"models": ["a/b"]}
    assert load_table(made).without_category("verse") == LAYOUTS[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_changed_chain_leaves_the_rest_of_a_hand_formatted_file(layout):
    text = LAYOUTS[layout]
    at = text.index('"models"', text.index('"code"'))

    changed = load_table(text).with_category("code", {"models": ["a/b"]}, must_exist=True)

    assert changed.startswith(text[:at])
    assert changed.endswith(text[text.index("]", at) + 1 :])


def test_a_new_category_comes_last_and_the_order_of_the_others_stays():
    made = shipped_table().with_category("aaa", {"models": ["a/b"]}, must_exist=False)

    assert list(json.loads(made)["categories"]) == [*BUILT_IN, "aaa"]
