"""Suggestions for misspelled names."""

from electra_ds.common.suggestions import nearest, other_form_of_file


def test_the_most_similar_word_is_suggested():
    assert nearest("epoch", ["epochs", "seed"]) == "; did you mean 'epochs'?"
    assert nearest("xyz", ["epochs", "seed"]) == ""


def test_words_that_look_the_same_are_told_apart_by_escapes():
    suggested = nearest("gr\u00fcn", ["gru\u0308n", "rot"])
    assert r"'gru\u0308n'" in suggested and r"'gr\xfcn'" in suggested


def test_the_name_of_a_file_in_another_form_is_found_in_its_folder(tmp_path):
    (tmp_path / "gru\u0308n.txt").write_text("x")
    hint = other_form_of_file(tmp_path / "gr\u00fcn.txt")
    assert ascii("gru\u0308n.txt") in hint and "another Unicode form" in hint
    for missing in ("rot.txt", "r\u00f6t.txt", "no/gr\u00fcn.txt", "gr\u00fcn\0"):
        assert other_form_of_file(tmp_path / missing) == ""
