"""Multiple choice: descriptions, choices and labels, batches, learning, predictions, export."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import run_folders
import torch
import transformers
from running import read_json
from stock_folders import run_card, stock_model

from electra_ds import load
from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.finetuning.batches import TaskBatch, collate, encode
from electra_ds.finetuning.examples import Example, read_examples
from electra_ds.finetuning.model import Classifier
from electra_ds.finetuning.predict import logits_of, predict
from electra_ds.finetuning.tasks import Task
from electra_ds.interop.export import export
from electra_ds.interop.load_model import load_pretrained

CHOICE = {"kind": "multiple_choice", "text_a": "q"}
TASK = Task(name="t", splits={"train": "x.tsv"}, choices="c", **CHOICE)


def result(folder) -> dict:
    return read_json(next(folder.glob("*/seed-0/result.json")))


# ---------------------------------------------------------------------------------------- reading


def test_choices_are_columns_or_a_list_and_labels_are_numbers_or_names(own_task):
    rows = "q\tA\tB\tend\tlabel\nwhy\tx\ty\tz\t1\nhow\tu\tv\tw\t0\n"
    task = own_task({"t.tsv": rows}, choices=["A", "B", "end"], **CHOICE)
    assert read_examples(task, "train")[0][:4] == ("0", "why", ["x", "y", "z"], 1)
    assert task.metrics == ["accuracy"] and task.labels is None
    lines = [
        {"q": "why", "s": "It", "c": ["is x", "is y", "z"], "answer": "C"},
        {"q": "how", "s": "", "c": ["u", "v"], "answer": "A"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    values = CHOICE | {"text_b": "s", "choices": "c", "label": "answer", "labels": list("ABC")}
    task = own_task({"t.jsonl": text}, **values)
    first, second = read_examples(task, "train")
    assert first[1:4] == ("why", ["It is x", "It is y", "It z"], 2)
    assert second[2:4] == (["u", "v"], 0)


@pytest.mark.parametrize(
    "row, part",
    [
        ({"c": ["a", "b"], "label": 2}, "unknown label '2'; expected one of '0', '1'"),
        ({"c": ["a", "b"], "label": "b"}, "unknown label 'b'"),
        ({"c": ["a"], "label": 0}, "c: found 1 choices; expected 2 to 1000"),
        ({"c": "ab", "label": 0}, "c: found 'ab'; expected a list of choices"),
        ({"c": ["a", None], "label": 0}, "c: found None; expected text"),
        ({"label": 0}, "no column 'c'"),
    ],
)
def test_a_row_without_its_choices_is_refused(own_task, row, part):
    text = (
        json.dumps({"q": "x", "c": ["a", "b", "c"], "label": 2})
        + "\n"
        + json.dumps(row | {"q": "x"})
    )
    task = own_task({"t.jsonl": text}, choices="c", **CHOICE)
    with pytest.raises(UserError) as error:
        read_examples(task, "train")
    assert f"t.jsonl:2: {part}" in str(error.value)


@pytest.mark.parametrize(
    "values, part",
    [
        ({"kind": "multiple_choice"}, "choices and kind multiple_choice belong together"),
        ({"choices": ["a", "b"]}, "choices and kind multiple_choice belong together"),
        (CHOICE | {"choices": ["a"]}, "expected at least two columns"),
        (CHOICE | {"choices": "c", "text_b": "s", "both_orders": True}, "multiple_choice has none"),
        (CHOICE | {"choices": "c", "metrics": ["f1"]}, "'f1' is not a metric of multiple_choice"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(own_task, values, part):
    with pytest.raises(UserError, match=part):
        own_task({"t.tsv": "q\ta\tb\n"}, **values)


# ------------------------------------------------------------------------------- batches and scores


def examples() -> list[Example]:
    texts = [("aa ab", ["ac", "ad ae af"]), ("ba", ["bb", "bc", "bd be"]), ("ca cb", ["cc", "cd"])]
    return [Example(str(i), a, b, len(b) - 1) for i, (a, b) in enumerate(texts)]


@torch.no_grad()
def test_scores_of_choices_do_not_depend_on_the_batch_and_its_layout(tmp_path):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    encoded = encode(examples(), TASK, tokenizer, 16)
    assert [len(x.choices) for x in encoded] == [2, 3, 2]
    model = run_folders.config().model
    module = Classifier(model, 1, False, False).start(model, None, 0).eval()
    alone = logits_of(module, TASK.kind, encoded, 0)
    assert [len(row) for row in alone] == [2, 3, 2]
    for packed in (False, True):
        batch = collate(encoded, 0, TASK.kind, packed)
        logits = module(batch, predict=True)
        assert logits.shape == (3, 3) and torch.isinf(logits[[0, 2], 2]).all()
        for row, wanted in zip(logits.numpy(), alone, strict=True):
            assert np.abs(row[: len(wanted)] - wanted).max() < 1e-5
        losses = [-torch.tensor(row).log_softmax(0)[-1] for row in alone]
        assert module(batch).total == pytest.approx(float(sum(losses)), rel=1e-5)
    pair = encode(
        [Example("0", "ba", "bc", 0)],
        Task(name="p", splits={"train": "x"}, labels=["a", "b"]),
        tokenizer,
        16,
    )
    assert pair[0].ids == encoded[1].choices[1].ids  # each choice is a pair


def test_absent_choices_and_empty_batches_have_no_gradient(tmp_path):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    model = run_folders.config().model
    module = Classifier(model, 1, False, False).start(model, None, 0)
    module(collate(encode(examples(), TASK, tokenizer, 16), 0, TASK.kind)).total.backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    module.zero_grad()
    batch = collate([], 0, TASK.kind)
    assert isinstance(batch, TaskBatch) and batch.weights.sum() == 0
    loss = module(batch).total
    loss.backward()
    assert loss == 0 and all(not parameter.grad.any() for parameter in module.parameters())


def test_choices_are_cut_one_by_one(tmp_path):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    long = Example("0", "aa " * 30, ["ab", "ac " * 30], 0)
    (found,) = encode([long], TASK, tokenizer, 12)
    assert [len(choice.ids) for choice in found.choices] == [12, 12] and found.longest == 12
    assert found.left_out == (30 + 1 + 3 - 12) + (30 + 30 + 3 - 12) and len(found.ids) == 24


# ------------------------------------------------------------------------------------------- suites


def test_the_right_choice_is_learned_and_two_ranks_train_like_one(suites):
    one, two = suites / "one" / "choices", suites / "two" / "choices"
    assert result(one)["scores"]["valid"]["accuracy"] > 0.9
    assert result(one)["train_loss"] == pytest.approx(result(two)["train_loss"], rel=1e-4)
    tables = [
        [line.split("\t")[1] for line in next(path.glob("*/*/predictions-test.tsv")).open()]
        for path in (one, two)
    ]
    assert tables[0] == tables[1] and set(tables[0][1:]) <= {"0", "1"}


def test_an_interrupted_seed_resumes_bit_for_bit_and_packed_batches_train_alike(suites):
    whole, cut, padded, packed = (
        suites / "one" / name
        for name in ("choices", "choices-cut", "choices-padded", "choices-packed")
    )
    assert result(whole)["train_loss"] == result(cut)["train_loss"]
    file = "choices/seed-0/predictions-valid.tsv"
    assert (whole / file).read_text() == (cut / file).read_text()
    assert result(padded)["train_loss"] == pytest.approx(result(packed)["train_loss"], rel=1e-5)


def test_predict_and_the_exported_model_have_the_probabilities_of_finetune(suites, tmp_path):
    seed = suites / "one" / "choices" / "choices" / "seed-0"
    file = suites / "tasks" / "choices-valid.jsonl"
    written = predict(seed, tmp_path / "p.tsv", file)
    text = (tmp_path / "p.tsv").read_text()
    assert text == (seed / "predictions-valid.tsv").read_text()
    assert written.scores == result(suites / "one" / "choices")["scores"]["valid"]
    header, *lines = text.splitlines()
    assert header == "index\tprediction\tprobabilities"
    export(seed, tmp_path / "hf")
    model = stock_model(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for line, row in zip(lines, map(json.loads, file.open()), strict=True):
        inputs = tokenizer([row["text"]] * 2, row["options"], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**{name: value[None] for name, value in inputs.items()}).logits
        wanted = np.array(line.split("\t")[2].split(), float)
        assert np.abs(logits.softmax(-1).numpy()[0] - wanted).max() < 2e-5


# ------------------------------------------------------------------------------------------- export


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["electra", "modernbert", "deberta_v2"])
def test_an_exported_model_has_equal_logits(architecture, tmp_path):
    parts = run_folders.fine_tuned(tmp_path / "seed-0", "multiple_choice", architecture)
    export(tmp_path / "seed-0", tmp_path / "out")
    ids, mask, types = run_folders.rows_with_padding()
    types = types if architecture == "electra" else None
    ours = parts["head"](load(tmp_path / "seed-0").discriminator.encode(ids, types, mask))[:, 0, 0]
    model = stock_model(tmp_path / "out")
    assert type(model).__name__.endswith("ForMultipleChoice")
    inputs = {"input_ids": ids[None], "attention_mask": mask[None]}
    inputs |= {"token_type_ids": types[None]} if types is not None else {}
    logits = model(**inputs).logits
    assert logits.shape == (1, 3) and (logits[0] - ours).abs().max() <= 1e-5
    assert run_card(tmp_path / "out").strip() in ("0", "1")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: multiple-choice" in card
    assert (
        load_pretrained(tmp_path / "out").model.hidden_size == 48
    )  # its encoder can be tuned again


def test_an_export_without_the_stock_class_is_refused(tmp_path, monkeypatch):
    run_folders.fine_tuned(tmp_path / "seed-0", "multiple_choice")
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.0"))
    with pytest.raises(UserError, match=r"transformers 4\.0 has no ElectraForMultipleChoice"):
        export(tmp_path / "seed-0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
