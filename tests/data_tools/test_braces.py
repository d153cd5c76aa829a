"""Brace patterns of --input: the names of bash, and limits."""

import time

import pytest

from data_tools.inputs.braces import expand_braces
from electra_ds.common.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("plain.txt", ["plain.txt"]),
        ("x-{000..002}.tar", ["x-000.tar", "x-001.tar", "x-002.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{10..0..5}", ["10", "5", "0"]),
        ("{a..e..2}", ["a", "c", "e"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("{a,{b,c}d,}", ["a", "bd", "cd", ""]),
        ("{{1..2},x}", ["1", "2", "x"]),
        ("{{a,b}}", ["{a}", "{b}"]),
        ("{a}", ["{a}"]),
        ("a{b", ["a{b"]),
        ("a}b{c,d}", ["a}bc", "a}bd"]),
        ("{1..a}", ["{1..a}"]),
    ],
)
def test_a_pattern_gives_the_names_of_bash(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    "pattern",
    [
        "{a,b}" * 24,
        "{0..999999999999}",
        "{1..1000}{1..1000}",
        "{a," * 2000 + "}" * 2000,
        "{a,b}" * 3000,
        "{" * 100_000,
    ],
    ids=["24 pairs", "a range", "two ranges", "nested", "many", "open"],
)
def test_a_small_pattern_with_many_names_is_refused_at_once(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="its braces give") as caught:
        expand_braces(pattern)
    assert time.monotonic() - start < 5 and len(str(caught.value)) < 400
