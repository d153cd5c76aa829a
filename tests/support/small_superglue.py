"""Small files in the shapes of SuperGLUE, with cases that are easily read wrongly."""

import json
from pathlib import Path

PASSAGE = "Zo\u00eb met The Bank\n@highlight\nBank of Oslo. Zo\u00eb paid"
ENTITIES = {"Zo\u00eb": [(0, 2), (42, 44)], "The Bank": [(8, 15)], "Bank of Oslo": [(28, 39)]}


def record(idx: int, text: str = "aa ab of ac", entities=((0, 1), (3, 4), (9, 10))) -> dict:
    spans = [{"start": start, "end": end} for start, end in entities]
    right = text[entities[idx % len(entities)][0] : entities[idx % len(entities)][1] + 1]
    return {
        "source": "x",
        "passage": {"text": text, "entities": spans},
        "qas": [{"query": "ba @placeholder bb", "idx": idx, "answers": [{"text": right}]}],
        "idx": idx,
    }


def multirc(idx: int) -> dict:
    questions = [
        {
            "question": f"a{'bc'[number]} ?",
            "idx": 2 * idx + number,
            "answers": [
                {"text": word, "idx": 10 * idx + 4 * number + place, "label": (idx + place) % 2}
                for place, word in enumerate(("ba", "bb", "bc"))
            ],
        }
        for number in range(2)
    ]
    return {"idx": idx, "version": 1.1, "passage": {"text": "ad ae af", "questions": questions}}


def wsc(idx: int) -> dict:
    target = {"span1_index": 0, "span1_text": "ab", "span2_index": 3, "span2_text": "he"}
    return {"idx": idx, "text": "ab ac ad he ae", "target": target, "label": idx % 2 == 0}


def wic(idx: int) -> dict:
    places = {"start1": 0, "end1": 2, "start2": 3, "end2": 5, "version": 1.1}
    texts = {"word": "ab", "sentence1": "ab ac", "sentence2": "ad ab"}
    return {**texts, **places, "idx": idx, "label": idx % 2 == 0}


ROWS = {
    "BoolQ": lambda i: {"question": "is it", "passage": "ab ac", "idx": i, "label": i % 2 == 0},
    "CB": lambda i: {
        "premise": "ab ac",
        "hypothesis": "ad",
        "label": ("neutral", "entailment", "contradiction")[i % 3],
        "idx": i,
    },
    "COPA": lambda i: {
        "premise": "ab ac",
        "choice1": "ad",
        "choice2": "ae af",
        "question": ("cause", "effect")[i % 2],
        "label": i % 2,
        "idx": i,
    },
    "MultiRC": multirc,
    "ReCoRD": record,
    "RTE": lambda i: {
        "premise": "ab ac",
        "hypothesis": "ad",
        "label": ("not_entailment", "entailment")[i % 2],
        "idx": i,
    },
    "WiC": wic,
    "WSC": wsc,
}
AX = {
    "AX-b": lambda i: {"sentence1": "ab", "sentence2": "ac", "idx": i, "label": "entailment"},
    "AX-g": lambda i: {"premise": "ab", "hypothesis": "ac", "idx": i, "label": "not_entailment"},
}
SIZES = {"train": 8, "val": 5, "test": 4}


def without_labels(value):
    """A row without labels and answers, as in the test files."""
    if isinstance(value, list):
        return [without_labels(each) for each in value]
    if not isinstance(value, dict):
        return value
    is_query = "query" in value
    hidden = {"label"} | ({"answers"} if is_query else set())
    return {key: without_labels(each) for key, each in value.items() if key not in hidden}


def write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_superglue_files(folder: Path) -> Path:
    """Write the folders of all eight tasks and both diagnostic sets."""
    for name, make in ROWS.items():
        for split, size in SIZES.items():
            rows = [make(number) for number in range(size)]
            rows = without_labels(rows) if split == "test" else rows
            write_lines(folder / name / f"{split}.jsonl", rows)
    for name, make in AX.items():
        write_lines(folder / name / f"{name}.jsonl", [make(number) for number in range(3)])
    return folder
