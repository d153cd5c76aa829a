"""The values of --data: one for the whole run, or NAME=D for each data of its phases."""

import pytest

from electra_ds.common.errors import UserError
from electra_ds.config.phases import PhaseConfig
from electra_ds.data import named_data
from electra_ds.data.named_data import data_names, open_named

PHASES = [
    PhaseConfig(name="short", steps=1),
    PhaseConfig(name="long", steps=1),
    PhaseConfig(name="end", steps=1, data="long"),
]


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """Values that were opened; nothing is read."""
    values = []
    monkeypatch.setattr(named_data, "open_data", lambda value: values.append(value) or value)
    return values


def refusal(given, phases=PHASES):
    with pytest.raises(UserError) as error:
        open_named(given, phases)
    return str(error.value)


@pytest.mark.parametrize(
    "given", [["short=A", "long=B"], ["long=B", "short=A"], {"short": "A", "long": "B"}]
)
def test_a_phase_uses_the_data_of_its_field_or_of_its_name(given, opened):
    found = open_named(given, PHASES)
    assert found == {"short": "A", "long": "B"} and sorted(opened) == ["A", "B"]
    assert data_names(found, PHASES) == ["short", "long", "long"]


def test_every_phase_uses_a_single_data_without_a_name(tmp_path):
    for given in ("A", ["A"], tmp_path, "https://host/D?a=b", "./a=b"):
        found = open_named(given, PHASES)
        assert data_names(found, PHASES) == [""] * 3
    assert open_named("A", []) == {"": "A"} and data_names([""], []) == [""]


def test_a_folder_with_an_equals_sign_is_data_of_a_run_without_phases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert open_named(["a=b"], []) == {"": "a=b"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["short=A"], "the phase long has no data: give --data long=D"),
        (
            ["short=A", "long=B", "lang=C"],
            "--data lang=...: no phase uses it; did you mean 'long'?",
        ),
        (
            ["short=A", "short=B", "long=C"],
            "--data short=... was given twice; expected each name once",
        ),
        (["A", "B"], "was given twice; expected a name for each"),
        (["A", "long=B"], "--data A has no name"),
    ],
)
def test_data_that_do_not_fit_the_phases_are_refused_before_any_is_opened(given, words, opened):
    assert words in refusal(given) and not opened


def test_names_in_a_run_without_phases_are_refused(opened):
    assert "the run has no phases" in refusal(["short=A"], [])
    assert "the run has no phases" in refusal({"short": "A"}, [])
    assert "was given twice; expected one" in refusal(["A", "B"], [])
    assert not opened
