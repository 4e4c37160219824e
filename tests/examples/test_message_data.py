"""Translation pairs out of Django's catalogues."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

import pytest

from tests.examples.test_examples import example

message_data = example("message_data")
KNOWN = {
    "Log out": "Abmelden",
    "March": "März",
    "Set password": "Passwort setzen",
    "Views by namespace %(name)s": "Views in Namespace %(name)s",
}


def test_known_pairs_with_case_and_placeholders():
    splits = message_data.load_messages("de")
    pairs = dict(pair for part in splits for pair in part)
    assert len(pairs) > 600
    for source, target in KNOWN.items():
        assert pairs[source] == target


@pytest.mark.parametrize("language", ["de", "ja", "ar"])
def test_usable_pairs_only(language, capsys):
    pairs = message_data.translations(language)
    assert len(pairs) > 400
    assert all(isinstance(target, str) and target != source for source, target in pairs.items())
    assert all(3 <= len(source) <= 200 for source in pairs)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_message_is_in_two_splits(seed):
    splits = message_data.load_messages("de", seed)
    parts = [{pair.source for pair in part} for part in splits]
    assert sum(map(len, parts)) == len(set().union(*parts)) == sum(map(len, splits))
    assert all(len(part) > 80 for part in parts)
    assert len(parts[0]) > 400
    assert splits == message_data.load_messages("de", seed)
    assert splits.train != message_data.load_messages("de", seed + 1).train


def test_catalogues_by_hand(tmp_path, monkeypatch):
    """A package with one catalogue: a plural, a fuzzy entry and an untranslated one are not used."""
    folder = tmp_path / "django" / "conf" / "locale" / "xx" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (tmp_path / "django" / "__init__.py").touch()
    entries = {"Yes": "Jes", "No%(x)s": "Ne%(x)s", "Untranslated": "", "Same": "Same", "ab": "cd", "z" * 201: "long"}
    text = "".join(f'msgid "{source}"\nmsgstr "{target}"\n\n' for source, target in entries.items())
    text += 'msgid "one file"\nmsgid_plural "%d files"\nmsgstr[0] "a"\nmsgstr[1] "b"\n\n'
    text += '#, fuzzy\nmsgid "Perhaps"\nmsgstr "Eble"\n'
    head = 'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=UTF-8\\n"\n\n'
    (folder / "django.po").write_text(head + text, encoding="utf-8")
    monkeypatch.setattr(message_data, "_django", lambda: tmp_path / "django")
    assert message_data.translations("xx") == {"Yes": "Jes", "No%(x)s": "Ne%(x)s"}
    assert message_data.languages() == ["xx"]


def test_splits_by_size():
    pairs = [message_data.Pair(str(number), str(-number)) for number in random.Random(0).sample(range(1000), 100)]
    splits = message_data.split(pairs)
    assert [len(part) for part in splits] == [70, 15, 15]
    assert sorted(pair for part in splits for pair in part) == sorted(pairs)


def test_names_of_languages():
    assert {"de", "pt_BR", "zh_Hans"} <= set(message_data.languages())
    assert "en" not in message_data.languages()
    assert message_data.language_name("de") == "German"
    assert message_data.language_name("pt_BR") == "Portuguese (Brazil)"
    assert message_data.language_name("not a language") == "not a language"


def test_unknown_language_names_those_that_there_are():
    with pytest.raises(ValueError, match=r"no messages in 'klingon'; it has af, .*de, .*zh_Hant"):
        message_data.load_messages("klingon")


@pytest.mark.parametrize("missing", ["django", "babel"])
def test_a_missing_package_is_one_sentence_with_the_command(missing, monkeypatch):
    if missing == "django":
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    else:
        monkeypatch.setitem(__import__("sys").modules, "babel.messages.pofile", None)
    with pytest.raises(RuntimeError) as error:
        message_data.load_messages("de")
    assert f"`pip install {missing}`" in str(error.value)
    assert re.search(r"\n", str(error.value)) is None


def test_nothing_but_the_standard_library_and_babel_is_imported():
    text = Path(message_data.__file__).read_text()
    imported = re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)
    assert set(imported) <= {"__future__", "contextlib", "importlib", "io", "random", "pathlib", "typing", "babel"}
