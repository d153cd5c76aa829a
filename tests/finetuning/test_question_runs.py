"""Questions through the engine: learning, ranks, resuming, predictions, export."""

import json

import numpy as np
import pytest
import torch
from running import read_json, run_cli
from small_questions import paragraph, question, write_file

from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.finetuning.answers import decode_answers
from electra_ds.finetuning.batches import collate, encode
from electra_ds.finetuning.examples import read_examples
from electra_ds.finetuning.predict import classifier, predict
from electra_ds.finetuning.tasks import load_task
from electra_ds.interop.checkpoints import read_checkpoint
from electra_ds.interop.export import export
from electra_ds.interop.load_model import load_pretrained
from electra_ds.model.weights import load_true_state

SUITES = ["spans", "spans-modern", "spans-deberta"]


def seed_of(suites, name, ranks="one"):
    return suites / ranks / name / "spans" / "seed-0"


def test_pairs_of_words_in_long_contexts_are_found(suites):
    for name in SUITES:
        scores = read_json(seed_of(suites, name) / "result.json")["scores"]["valid"]
        assert scores["f1"] == scores["best_f1"] > 0.9, name
        texts = read_json(seed_of(suites, name) / "predictions-valid.json")
        odds = read_json(seed_of(suites, name) / "null_odds-valid.json")
        assert list(texts) == list(odds) == [f"q{number}" for number in range(45)]
        assert all((texts[key] == "") == (odds[key] > scores["best_f1_threshold"]) for key in texts)
    report = (suites / "one" / "spans" / "report.md").read_text()
    threshold = read_json(seed_of(suites, "spans") / "result.json")["scores"]["valid"]
    assert "Scores x 100; thresholds as they are." in report
    assert f"| best_f1_threshold | {threshold['best_f1_threshold']:.1f} |" in report


def test_two_ranks_answer_like_one(suites):
    one, two = (read_json(seed_of(suites, "spans", n) / "result.json") for n in ("one", "two"))
    # The loss falls from 3 to 0.1, which amplifies differences in rounding.
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)
    assert one["scores"]["valid"] == pytest.approx(two["scores"]["valid"], abs=1e-2)
    for file in ("predictions-test.json", "predictions-valid.json"):
        first, second = (read_json(seed_of(suites, "spans", n) / file) for n in ("one", "two"))
        assert first == second and set(first.values()) == {"", "ab cd"}


def test_an_interrupted_seed_of_questions_resumes_bit_for_bit(suites):
    files = [
        f"{kind}-{split}.json"
        for kind in ("predictions", "null_odds")
        for split in ("valid", "test")
    ]
    for file in [*files, "predictions-valid.tsv"]:
        whole, cut = (seed_of(suites, name) / file for name in ("spans", "spans-cut"))
        assert whole.read_bytes() == cut.read_bytes(), file


def test_predict_writes_the_answers_of_finetune_as_tsv_and_in_the_official_shape(suites, tmp_path):
    seed = seed_of(suites, "spans")
    written = predict(seed, tmp_path / "p.tsv", split="valid")
    assert (tmp_path / "p.tsv").read_text() == (seed / "predictions-valid.tsv").read_text()
    assert written.scores == read_json(seed / "result.json")["scores"]["valid"]
    # The threshold is that of dev; the file has no answers.
    file = suites / "tasks" / "spans-test.json"
    predict(seed.parent, tmp_path / "p.json", file)
    assert (tmp_path / "p.json").read_text() == (seed / "predictions-test.json").read_text()


def test_the_official_tasks_run_with_the_shipped_recipe(suites, tmp_path):
    """With shorter rows. One file has questions of version 1.1, the other one of 2.0."""
    data = tmp_path / "SQuAD"
    data.mkdir()
    context = "aa ab ac ad ae"
    asked = [question(str(n), "ab", context, "ac ad") for n in range(4)]
    for split in ("train", "dev"):
        write_file(data / f"{split}-v1.1.json", paragraph(context, *asked))
        none = question("none", "ab", context)
        write_file(data / f"{split}-v2.0.json", paragraph(context, *asked, none))
    out = tmp_path / "out"
    sets = ("--set", "train.max_length=24", "--set", "train.keep=none")
    command = ("finetune", suites / "model", "tiny", "--tasks", "SQuAD1.1,squad-2.0", *sets)
    done = run_cli(*command, "--data", tmp_path, "--out", out)
    assert "| squad | valid | f1 |" in done.stdout and "| squad2 | valid | best_f1 |" in done.stdout
    assert set(read_json(out / "squad/seed-0/predictions-valid.json")) == set("0123")
    assert not (out / "squad/seed-0/null_odds-valid.json").exists()
    assert "none" in read_json(out / "squad2/seed-0/null_odds-valid.json")


@pytest.mark.parametrize("name", SUITES)
@torch.no_grad()
def test_an_exported_model_has_equal_logits_and_gives_our_spans(suites, tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    seed, out = seed_of(suites, name), tmp_path / "out"
    export(seed, out)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(out).eval().double()
    assert type(model).__name__.endswith("ForQuestionAnswering")
    assert type(model).__name__ == read_json(out / "config.json")["architectures"][0]
    stock = transformers.AutoTokenizer.from_pretrained(out)
    source = read_checkpoint(seed)
    task = load_task(str(suites / "tasks" / "spans.json"), None)
    module = classifier(source.model, task)
    load_true_state(module, source.weights)
    module.eval().double()
    tokenizer = load_tokenizer(seed / "tokenizer")
    examples = read_examples(task, "valid")
    encoded = encode(examples, task, tokenizer, 32)
    short = 0
    for row in encoded:
        example = examples[row.window.example]
        ours = module(collate([row], 0, task.kind), predict=True)
        inputs = stock(example.text_a, example.text_b, return_tensors="pt")
        if row.window.size < len(row.window.spans):  # one of several windows
            inputs = {"input_ids": torch.tensor([row.ids])}
            if name == "spans":
                segments = [0] * row.second_start + [1] * (len(row.ids) - row.second_start)
                inputs["token_type_ids"] = torch.tensor([segments])
        else:
            assert inputs["input_ids"][0].tolist() == row.ids
        theirs = torch.stack(model(**inputs).to_tuple(), -1)[0]
        assert float((ours - theirs).abs().max()) <= 1e-5
        if row.window.size == len(row.window.spans):
            short += 1
            alone = row._replace(window=row.window._replace(example=0))
            (answer,) = decode_answers(task, [example], [alone], [ours.numpy()])
            assert answer.text == span_of_stock(inputs, theirs.numpy(), example.text_b, 4)
    assert short > 5
    # An exported model is a model to start from.
    state = load_pretrained(out).state
    assert all(torch.equal(state[key], source.weights[key]) for key in state)


def span_of_stock(inputs, logits: np.ndarray, context: str, longest: int) -> str:
    """The best span by the outputs of transformers alone."""
    places = [n for n, text in enumerate(inputs.sequence_ids(0)) if text == 1]
    pairs = [(a, b) for a in places for b in places if 0 <= b - a < longest]
    first, last = max(pairs, key=lambda pair: logits[pair[0], 0] + logits[pair[1], 1])
    return context[inputs.token_to_chars(first).start : inputs.token_to_chars(last).end]


def test_the_card_of_an_exported_model_prints_an_answer(suites, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    export(seed_of(suites, "spans-modern"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card and "| labels | start, end |" in card
    code = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace('"out"', json.dumps(str(tmp_path / "out")))
    )
    printed = []
    exec(code, {"print": printed.append})
    assert printed[0] and printed[0] in "The second text."
