"""A small task of questions of SQuAD's shape: the answer is a pair of words in a long context."""

import json
from pathlib import Path

import numpy as np
from run_folders import VOCABULARY

WORDS = VOCABULARY[5:305]
PAIR = ["ab", "cd"]


def article(*paragraphs: dict, title: str = "t") -> dict:
    return {"title": title, "paragraphs": list(paragraphs)}


def paragraph(context: str, *questions: dict) -> dict:
    return {"context": context, "qas": list(questions)}


def question(key: str, text: str, context: str, *answers: str, **values) -> dict:
    """A question with answers at their first place in the context; with none it is impossible."""
    found = [{"text": answer, "answer_start": context.index(answer)} for answer in answers]
    return {"id": key, "question": text, "answers": found, "is_impossible": not answers} | values


def write_file(path: Path, *paragraphs: dict) -> Path:
    path.write_text(json.dumps({"version": "x", "data": [article(*paragraphs)]}))
    return path


def write_spans(folder: Path) -> None:
    """Write the task `spans`: a third of the questions has no answer; contexts have 5 to 40 words."""
    random = np.random.default_rng(1)
    others = [word for word in WORDS if word not in PAIR]

    def made(number: int) -> dict:
        words = [others[i] for i in random.integers(0, len(others), random.integers(5, 40))]
        place = int(random.integers(len(words)))
        answers = []
        if number % 3:
            words[place:place] = PAIR
            answers = [" ".join(PAIR)]
        context = " ".join(words)
        asked = question(f"q{number}", "aa ba", context, *answers)
        return paragraph(context, asked)

    splits = {"train": 150, "valid": 45, "test": 10}
    for split, size in splits.items():
        paragraphs = [made(number) for number in range(size)]
        for each in paragraphs if split == "test" else ():
            del each["qas"][0]["answers"], each["qas"][0]["is_impossible"]
        write_file(folder / f"spans-{split}.json", *paragraphs)
    description = {
        "kind": "question_answering",
        "splits": {split: f"spans-{split}.json" for split in splits},
        "questions": {"no_answer": True, "max_answer_tokens": 4},
    }
    (folder / "spans.json").write_text(json.dumps(description))
