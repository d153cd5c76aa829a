"""Four small fine-tuning tasks with labels that depend on single words."""

import json
from pathlib import Path

import numpy as np
from run_folders import VOCABULARY

WORDS = VOCABULARY[5:305]


def write_tasks(folder: Path) -> Path:
    """Write tasks with labels that depend on single words: classes, pairs, words, choices."""
    random = np.random.default_rng(0)

    def text(size: int) -> list[str]:
        return [WORDS[i] for i in random.integers(0, len(WORDS), size)]

    def classes() -> dict:
        label, words = int(random.integers(2)), text(int(random.integers(3, 12)))
        words[int(random.integers(len(words)))] = ("ab", "cd")[label]
        return {"sentence": " ".join(words), "label": ("no", "yes")[label]}

    def pairs() -> dict:
        both = int(random.integers(2))
        return {
            "a": " ".join(["ab", *text(3)]),
            "b": " ".join(["ab" if both else "cd", *text(8)]),
            "label": 5 * both,
        }

    def words() -> dict:
        found = [WORDS[i] for i in random.integers(0, 10, random.integers(3, 9))]
        return {"words": found, "tags": ["B-early" if word < "af" else "O" for word in found]}

    def choices() -> dict:
        right, found = int(random.integers(2)), [text(int(random.integers(1, 5))) for _ in range(2)]
        found[right] = ["ab", *found[right]]
        found[1 - right] = ["cd", *found[1 - right]]
        return {"text": " ".join(text(3)), "options": [*map(" ".join, found)], "label": right}

    tasks = {
        "classes": (classes, {}),
        "pairs": (pairs, {"kind": "regression", "text_a": "a", "text_b": "b", "both_orders": True}),
        "words": (words, {"kind": "token_classification", "text_a": "words", "label": "tags"}),
        "choices": (choices, {"kind": "multiple_choice", "text_a": "text", "choices": "options"}),
    }
    folder.mkdir()
    for name, (make, description) in tasks.items():
        sizes = {"train": 200, "valid": 61, "test": 7}
        splits = {split: f"{name}-{split}.jsonl" for split in sizes}
        (folder / f"{name}.json").write_text(json.dumps({"splits": splits} | description))
        for split, file in splits.items():
            hidden = ("label", "tags") if split == "test" else ()
            rows = [
                {key: x for key, x in make().items() if key not in hidden}
                for _ in range(sizes[split])
            ]
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
