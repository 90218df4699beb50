"""Languages as people, managers and clients write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.languages import ENGLISH, parse_language

SAME = [
    ("French", "fr", "FR", "fr-CA", "fr_FR", "fra", "français", "french", " French "),
    ("German", "de", "de-AT", "Deutsch", "deu"),
    ("English", "en", "en-US", "en-GB", "eng"),
    ("Chinese (Simplified)", "Simplified Chinese", "ChineseSimplified", "Chinese_Simplified", "zh-CN"),
    ("Chinese (Traditional)", "Traditional Chinese", "ChineseTraditional", "zh-TW", "zh-HK", "zh-Hant"),
    ("Portuguese (Brazil)", "Brazilian Portuguese", "pt-BR", "Portuguese", "pt"),
    ("Japanese", "ja", "ja-JP", "日本語"),
    ("Norwegian", "no", "nb", "nb-NO"),
    ("Spanish", "es", "es-MX", "Español"),
    *(("Czech", "cs"), ("Korean", "ko"), ("Polish", "pl"), ("Russian", "ru"), ("Italian", "it")),
]


@pytest.mark.parametrize("texts", SAME, ids=lambda texts: texts[0])
def test_one_language_however_it_is_written(texts):
    found = {text: parse_language(text) for text in texts}
    assert len(set(found.values())) == 1, {text: str(one and one.code) for text, one in found.items()}
    assert None not in found.values()


def test_two_languages_are_never_one():
    found = [parse_language(texts[0]) for texts in SAME]
    assert len(set(found)) == len(SAME)
    for one in found:
        assert [other for other in found if one.fits(other)] == [one]


@pytest.mark.parametrize("text", ["SymAllLanguages", "symalllanguages", " SYMALLLANGUAGES "])
def test_all_languages_fit_everybody(text):
    every = parse_language(text)
    assert every.is_all
    assert every == parse_language("all languages")
    for texts in SAME:
        assert every.fits(parse_language(texts[0]))
        assert parse_language(texts[0]).fits(every)


NONE = [*("xx", "und", "mul", "zxx", "123", "neutral", "default", "none", "unknown", "en-", "{}", "fr-a")]
NONE += ["fr;q=1", "", "  ", "fr fr", "x" * 65, "fr, de", "French\x00", "Frrrench German"]


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_language_is_none(text):
    assert parse_language(text) is None


def test_words_turned_round_never_make_it_another_language():
    assert parse_language("Serbian Latin") == parse_language("Serbian")
    assert parse_language("Latin") != parse_language("Serbian")


def test_a_language_shows_as_it_was_written():
    assert str(parse_language("fr-CA")) == "fr-CA"
    assert parse_language("en-US") == ENGLISH
    assert ENGLISH != "English"
    assert hash(parse_language("en-US")) == hash(ENGLISH)


@given(st.text(max_size=80))
def test_no_text_breaks_it(text):
    found = parse_language(text)
    assert found is None or found.fits(found)
