"""Suggestions for misspelled names."""

from electra_ds.common.suggestions import nearest


def test_the_most_similar_word_is_suggested():
    assert nearest("epoch", ["epochs", "seed"]) == "; did you mean 'epochs'?"
    assert nearest("xyz", ["epochs", "seed"]) == ""


def test_words_that_look_the_same_are_told_apart_by_escapes():
    suggested = nearest("gr\u00fcn", ["gru\u0308n", "rot"])
    assert r"'gru\u0308n'" in suggested and r"'gr\xfcn'" in suggested
