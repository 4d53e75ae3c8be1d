"""What changed between two texts, as it stands in a page."""

import re

import pytest
from markupsafe import escape

from rdpo.report.differences import difference


def test_words_of_one_side_alone_are_marked():
    found = difference("The cat sat on the mat.", "The old cat sat on a mat.")
    assert found.before == "The cat sat on <del>the</del> mat."
    assert found.after == "The <ins>old</ins> cat sat on <ins>a</ins> mat."


def test_nothing_is_marked_where_hardly_a_word_is_shared():
    found = difference("one two three four", "five six seven eight")
    assert (found.before, found.after, found.kept) == ("one two three four", "five six seven eight", 0.0)


@pytest.mark.parametrize("before", ["", "  a\n\n\tb <b>x</b> & y ", "</ins><script>1</script> same same same"])
@pytest.mark.parametrize("after", ["", "a b <del>x & z\n", "same same same \u202e <img src=x>"])
def test_without_its_marks_each_side_is_its_text_escaped(before, after):
    found = difference(before, after)
    for marked, text in ((found.before, before), (found.after, after)):
        assert re.sub("</?(ins|del)>", "", marked) == escape(text).replace("\u202e", "\\u202e")


def test_scripts_without_spaces_are_compared_by_character():
    assert difference("今日は晴れです", "今日は雨です").after == "今日は<ins>雨</ins>です"
