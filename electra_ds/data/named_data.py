"""The values of --data: one data for the whole run, or NAME=D for each data of its phases."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable, shortened
from electra_ds.common.suggestions import nearest
from electra_ds.config.phases import NAME, PhaseConfig
from electra_ds.data.dataset import Data, open_data

Given = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
NAMED = re.compile(rf"({NAME.strip('^$')})=(.+)", re.DOTALL)


def open_named(given: Given, phases: Sequence[PhaseConfig]) -> dict[str, Data]:
    """Open the values of --data by name; the key is "" for a value without a name.

    given: one value; or values, each D or NAME=D; or a mapping NAME -> D.
    phases: of the run. The names are compared with them before any data is opened.
    Raises UserError for a phase without data, a name that no phase uses, a name that is given
    twice, names in a run without phases, and as `open_data`.
    """
    values = _by_name(given, bool(phases))
    data_names(values, phases)
    return {name: open_data(value) for name, value in values.items()}


def data_names(known: Iterable[str], phases: Sequence[PhaseConfig]) -> list[str]:
    """Return the name of the data of each phase; [""] for a run without phases.

    known: names of the data; "" stands for the only one, which every phase uses.
    Raises UserError for a phase without data, and for a name that no phase uses.
    """
    given = list(known)
    if not phases:
        return [""]
    if given == [""]:
        return [""] * len(phases)
    names = [phase.data_name for phase in phases]
    missing = [phase for phase in phases if phase.data_name not in given]
    if missing:
        phase = missing[0]
        raise UserError(
            f"the phase {phase.name} has no data: give --data {phase.data_name}=D, or one --data D "
            f"for all phases; there is --data for {', '.join(given)}"
        )
    for name in given:
        if name not in names:
            raise UserError(
                f"--data {name}=...: no phase uses it{nearest(name, names)}; the phases use "
                f"{', '.join(dict.fromkeys(names))}"
            )
    return names


def _by_name(given: Given, has_phases: bool) -> dict[str, str | Path]:
    """Name -> value, "" for a value without a name."""
    if isinstance(given, Mapping):
        if not has_phases:
            raise UserError(
                f"data for {shortened(', '.join(given))}, but the run has no phases: give one data"
            )
        return dict(given)
    listed = [given] if isinstance(given, str | Path) else list(given)
    named: dict[str, str | Path] = {}
    for value in listed:
        name, path = _split(value, has_phases)
        if name in named:
            if name:
                raise UserError(f"--data {name}=... was given twice; expected each name once")
            hint = "a name for each, such as short=D" if has_phases else "one, or a MIX.json"
            raise UserError(f"--data D was given twice; expected {hint}")
        named[name] = path
    if len(named) > 1 and "" in named:
        raise UserError(
            f"--data {printable(str(named['']))} has no name, but others have; expected NAME=D for "
            "each, or one --data D for all phases"
        )
    return named


def _split(value: str | Path, has_phases: bool) -> tuple[str, str | Path]:
    """(name, value) of NAME=D; ("", value) of another value."""
    match = NAMED.fullmatch(value) if isinstance(value, str) else None
    if match is None or (not has_phases and os.path.exists(value)):
        return "", value
    if not has_phases:
        raise UserError(
            f"--data {shortened(value)}: the run has no phases that could use data named "
            f"{match[1]}; expected --data {printable(match[2])}"
        )
    return match[1], match[2]
