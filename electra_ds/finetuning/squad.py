"""The tasks SQuAD 1.1 and 2.0: names, official files, and the folder that contains them."""

from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError

# Name -> version in the official file names.
VERSIONS = {"squad": "v1.1", "squad2": "v2.0"}
SQUAD: dict[str, dict[str, Any]] = {
    name: {
        "name": name,
        "kind": "question_answering",
        "splits": {"train": f"train-{version}.json", "valid": f"dev-{version}.json"},
        "questions": {"no_answer": name == "squad2"},
    }
    for name, version in VERSIONS.items()
}
# Spellings without the characters other than letters and digits.
ALIASES = {
    "squad1": "squad",
    "squad11": "squad",
    "squadv1": "squad",
    "squadv11": "squad",
    "squad20": "squad2",
    "squadv2": "squad2",
    "squadv20": "squad2",
}


def squad_folder(name: str, data: Path | None) -> Path:
    """Return the folder with the official files of a task.

    name: squad or squad2. data: a folder with a folder SQuAD (or SQUAD, squad2, SQuAD-v2.0, ...), or
    the folder of the files. Raises UserError, with the paths that were looked for, if no folder has
    the training file.
    """
    files = list(SQUAD[name]["splits"].values())
    if data is None or not data.is_dir():
        given = "none is given" if data is None else f"{data} is not a folder"
        raise UserError(
            f"task {name}: --data: {given}; expected a folder with SQuAD/{files[0]} and "
            f"SQuAD/{files[1]}, the official files"
        )
    plain = {child: "".join(filter(str.isalnum, child.name.lower())) for child in data.iterdir()}
    folders = sorted(
        child
        for child, short in plain.items()
        if child.is_dir() and (short in SQUAD or short in ALIASES)
    )
    looked_for = [folder / files[0] for folder in [*folders, data]]
    for path in looked_for:
        if path.is_file():
            return path.parent
    if not folders:
        looked_for.insert(0, data / "SQuAD" / files[0])
    raise UserError(
        f"task {name}: found none of {', '.join(map(str, looked_for))}; expected the official files "
        f"{files[0]} and {files[1]}; download them, or give --data the folder that contains SQuAD/"
    )
