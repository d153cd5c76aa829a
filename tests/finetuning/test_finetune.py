"""Fine-tuning through the engine: learning, ranks, kept models, resuming, predictions, batches."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_folders
import torch
from lock_owner import hold
from running import CPU, ROOT, read_json, run_cli
from small_tasks import WORDS
from stock_tokenizer import stock_tokenizer

from electra_ds.common.special_ids import SpecialIds
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.finetuning.batches import (
    Encoded,
    collate,
    encode,
    epoch_batches,
    micro_batches,
    prediction_batches,
    swapped,
)
from electra_ds.finetuning.config import load_finetune
from electra_ds.finetuning.examples import Example, read_examples
from electra_ds.finetuning.model import Classifier, layerwise
from electra_ds.finetuning.predict import decode, logits_of
from electra_ds.finetuning.tasks import Task, load_task
from electra_ds.interop.hf import format_of
from electra_ds.model.weights import true_state

GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"


def result(folder: Path, seed: int = 0) -> dict:
    return read_json(next(folder.glob(f"*/seed-{seed}/result.json")))


def scores(folder: Path, seed: int = 0) -> dict:
    return result(folder, seed)["scores"]["valid"]


def test_labels_that_depend_on_single_words_are_learned(suites):
    assert scores(suites / "one" / "classes")["accuracy"] > 0.9
    assert scores(suites / "one" / "pairs")["pearson"] > 0.8
    assert scores(suites / "one" / "words")["entity_f1"] > 0.9
    for name in ("modern", "deberta"):
        assert scores(suites / "one" / name)["pearson"] > 0.8  # pairs without segments


def test_two_ranks_fine_tune_like_one(suites):
    for name in ("classes", "pairs", "words", "modern", "deberta"):
        one, two = suites / "one" / name, suites / "two" / name
        assert result(one)["train_loss"] == pytest.approx(result(two)["train_loss"], rel=1e-4), name
        assert scores(one) == pytest.approx(scores(two), abs=1e-3), name
        texts = [
            next(folder.glob("*/seed-0/predictions-test.tsv")).read_text().split("\n")
            for folder in (one, two)
        ]
        predicted = [[line.split("\t")[1] for line in lines[1:-1]] for lines in texts]
        if name in ("pairs", "modern", "deberta"):
            predicted = [np.round(np.array(cells, float), 2).tolist() for cells in predicted]
        assert predicted[0] == predicted[1]


def test_seeds_differ_and_the_model_of_the_best_seed_is_kept(suites):
    folder = suites / "one" / "classes" / "classes"
    assert result(folder.parent, 0)["train_loss"] != result(folder.parent, 1)["train_loss"]
    report = read_json(folder.parent / "report.json")
    kept = [path.parent.name for path in folder.glob("seed-*/model")]
    assert kept == [f"seed-{report['tasks']['classes']['best_seed']}"]


@pytest.mark.parametrize(
    "names",
    [("classes", "cut"), ("modern-whole", "modern-cut"), ("deberta-whole", "deberta-cut")],
)
def test_an_interrupted_seed_resumes_bit_for_bit(suites, names):
    whole, cut = (suites / "one" / name / "classes" / "seed-0" for name in names)
    for split in ("valid", "test"):
        assert (cut / f"predictions-{split}.tsv").read_text() == (
            whole / f"predictions-{split}.tsv"
        ).read_text()
    first, second = (result(suites / "one" / name)["train_loss"] for name in names)
    assert first == second
    assert not (cut / "ckpt").exists()


@pytest.mark.parametrize("prefix", ["", "modern-", "deberta-"])
def test_packed_and_padded_batches_train_alike(suites, prefix):
    padded, packed = (suites / "one" / f"{prefix}{name}" for name in ("padded", "packed"))
    assert result(padded)["train_loss"] == pytest.approx(result(packed)["train_loss"], rel=1e-5)
    texts = [
        next(path.glob("*/seed-0/predictions-test.tsv")).read_text() for path in (padded, packed)
    ]
    probabilities = [
        np.array([line.split("\t")[2:] for line in text.split("\n")[1:-1]], float) for text in texts
    ]
    assert np.abs(probabilities[0] - probabilities[1]).max() < 1e-4


def test_results_name_the_selection_and_random_weights(suites):
    best, random = result(suites / "one" / "best"), result(suites / "one" / "random")
    assert best["selected"] == "best epoch on dev" and "dev score is optimistic" in report(
        suites, "best"
    )
    assert random["origin"] == "random initialisation" and random["steps"] == round(0.5 * 13)
    assert not list((suites / "one" / "random").rglob("model"))
    assert (suites / "one" / "best" / "classes" / "seed-0" / "model" / "meta.json").exists()


def test_a_diverged_seed_is_reported_without_scores(suites):
    found = result(suites / "one" / "blown")
    assert (found["status"], found["scores"]) == ("diverged", {}) and found["steps"] < 39
    assert "diverged: seed 0" in report(suites, "blown")


def report(suites: Path, name: str) -> str:
    return (suites / "one" / name / "report.md").read_text()


def test_a_seed_in_half_precision_has_the_scores_of_predict(suites, tmp_path):
    seed = suites / "one" / "half" / "classes" / "seed-0"
    run_cli("predict", seed, "--split", "valid", "--out", tmp_path / "p.tsv")
    assert (tmp_path / "p.tsv").read_text() == (seed / "predictions-valid.tsv").read_text()


@pytest.mark.parametrize("name", ["modern-words/words", "modern/pairs"])
def test_predict_of_modernbert_reads_the_saved_model(suites, tmp_path, name):
    seed = suites / "one" / name / "seed-0"
    run_cli("predict", seed, "--split", "valid", "--out", tmp_path / "p.tsv")
    assert (tmp_path / "p.tsv").read_text() == (seed / "predictions-valid.tsv").read_text()
    model = read_json(seed / "model/meta.json")["config"]["model"]
    assert (model["architecture"], model["local_attention"]) == ("modernbert", 8)
    # train.dropout is every dropout of the architecture.
    dropout = {value for key, value in model.items() if key.endswith("_dropout")}
    assert dropout == {0.0 if name == "modern/pairs" else 0.1}


def test_predict_of_deberta_v2_reads_the_saved_model(suites, tmp_path):
    seed = suites / "one" / "deberta" / "pairs" / "seed-0"
    run_cli("predict", seed, "--split", "valid", "--out", tmp_path / "p.tsv")
    assert (tmp_path / "p.tsv").read_text() == (seed / "predictions-valid.tsv").read_text()
    model = read_json(seed / "model/meta.json")["config"]["model"]
    assert (model["architecture"], model["position_buckets"]) == ("deberta_v2", 8)


def test_predict_writes_the_predictions_of_finetune_and_scores_labelled_files(suites, tmp_path):
    seed = suites / "one" / "best" / "classes" / "seed-0"
    file = suites / "tasks" / "classes-valid.jsonl"
    done = run_cli("predict", seed.parent, "--input", file, "--out", tmp_path / "p.tsv")
    assert f"accuracy {scores(suites / 'one' / 'best')['accuracy']:.4f}" in done.stdout
    run_cli("predict", seed, "--split", "valid", "--out", tmp_path / "q.tsv")
    assert (tmp_path / "p.tsv").read_text() == (tmp_path / "q.tsv").read_text()
    ours, theirs = (
        path.read_text().split("\n")
        for path in (tmp_path / "p.tsv", seed / "predictions-valid.tsv")
    )
    assert ours[0] == "index\tprediction\tp(no)\tp(yes)" and len(ours) == 61 + 2
    assert [line.split("\t")[:2] for line in ours] == [line.split("\t")[:2] for line in theirs]


def test_a_folder_holds_one_suite_and_finished_seeds_are_kept(suites):
    out, task = suites / "one" / "best", suites / "tasks" / "classes.json"
    path, finished = suites / "again.json", out / "classes" / "seed-0" / "result.json"
    path.write_text((out / "config.json").read_text())
    command = ("finetune", suites / "model", path, "--tasks", task, "--out", out)
    before = finished.stat().st_mtime_ns
    assert "| classes | valid | accuracy |" in run_cli(*command).stdout
    assert finished.stat().st_mtime_ns == before
    owner = hold(out / "classes" / "seed-1")
    refused = run_cli(*command, "--seeds", "2", check=False)
    owner.kill()
    owner.wait()
    assert (
        refused.returncode == 2 and f"seed-1/lock names process {owner.pid} on " in refused.stderr
    )
    other = run_cli(*command, "--set", "optimizer.peak_lr=0.5", check=False)
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert "optimizer.peak_lr: 0.02 -> 0.5" in other.stderr


def test_seeds_spread_over_ranks_by_the_launch_script_equal_those_of_one_rank(suites, tmp_path):
    config, out = suites / "spread.json", tmp_path / "out"
    config.write_text((suites / "one" / "classes" / "config.json").read_text())
    script = ["bash", ROOT / "launch" / "glue.sh", suites / "model", config, suites / "tasks", out]
    script += ["--tasks", suites / "tasks" / "classes.json", "--seeds", "2"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = os.environ | CPU | {"PATH": path, "RANKS": "3"}
    done = subprocess.run(script, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "| classes | valid | accuracy |" in done.stdout, done.stderr[
        -3000:
    ]
    for seed in (0, 1):  # the third rank has no seed
        assert scores(out, seed) == scores(suites / "one" / "classes", seed)
    assert len(list(out.glob("classes/seed-*/model"))) == 1


def test_wrong_calls_are_refused_with_one_message(suites, tmp_path):
    misspelled = ["--set", 'tasks={"rte": {"epoch": 3}}']
    for call, part in (
        (["smal"], "did you mean 'small'"),
        (misspelled, "tasks.rte.epoch: unknown key"),
    ):
        done = run_cli(
            "finetune", suites / "model", *call, "--tasks", "rte", "--out", tmp_path, check=False
        )
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )


# ------------------------------------------------------------------------------------ single parts


def words_tokenizer(folder: Path):
    return load_tokenizer(run_folders.vocabulary(folder))


def task(kind: str = "classification", **values) -> Task:
    return Task(name="t", kind=kind, splits={"train": "x.tsv"}, **values)


def test_a_pair_is_cut_from_its_longer_text(tmp_path):
    tokenizer, ids = words_tokenizer(tmp_path), run_folders.IDS
    long, short = " ".join(WORDS[:30]), " ".join(WORDS[30:34])

    def lengths(a: str, b: str | None) -> tuple[int, int]:
        (found,) = encode([Example("0", a, b, 0)], task(labels=["a", "b"]), tokenizer, 20)
        assert found.ids[0] == ids["cls"] and found.ids[-1] == ids["sep"] and len(found.ids) <= 20
        return found.second_start, len(found.ids) - found.second_start

    assert lengths(long, short) == (1 + 13 + 1, 4 + 1)
    assert lengths(short, long) == (1 + 4 + 1, 13 + 1)
    assert lengths(long, long) == (1 + 9 + 1, 8 + 1)
    assert lengths(long, None) == (20, 0)


def test_the_first_token_of_a_word_has_its_label(tmp_path):
    tokenizer = words_tokenizer(tmp_path)
    described = task("token_classification", labels=["O", "B-x"])
    (found,) = encode([Example("0", ["aaab", "ab"], None, [1, 0])], described, tokenizer, 20)
    assert tokenizer.tokens(found.ids) == ["[CLS]", "aa", "##ab", "ab", "[SEP]"]
    assert found.label == [-1, 1, -1, 0, -1]


def test_words_of_a_byte_level_vocabulary_have_the_space_before_them(tmp_path):
    stock_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    described = task("token_classification", labels=["O", "B-x"])
    example = Example("0", ["old", "\U0001f9ea", "river"], None, [1, 0, 1])
    (found,) = encode([example], described, tokenizer, 20)
    whole = tokenizer.encode_batch(["old \U0001f9ea river"])[0]
    assert found.ids[1:-1] == whole
    assert found.label == [-1, 1, 0, *[-1] * (len(whole) - 3), 1, -1]


def test_every_example_is_in_one_batch_of_an_epoch_and_epochs_differ():
    lengths = np.random.default_rng(0).integers(5, 100, 1003)
    first, again, second, other = (
        epoch_batches(lengths, 32, *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert sorted(np.concatenate(first)) == list(range(1003)) and max(map(len, first)) == 32
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    orders = [tuple(np.concatenate(batches)) for batches in (first, second, other)]
    assert len(set(orders)) == 3


def test_micro_batches_keep_the_order_and_empty_ones_have_weight_0(tmp_path):
    tokenizer = words_tokenizer(tmp_path)
    examples = [Example(str(i), " ".join(WORDS[: 2 + i]), None, i % 2) for i in range(5)]
    encoded = encode(examples, task(labels=["a", "b"]), tokenizer, 40)
    found = micro_batches(np.arange(5), 2, 4, encoded, 0, "classification")
    assert [tuple(m.input_ids.shape) for m in found] == [(2, 5), (2, 7), (1, 8), (1, 2)]
    assert [m.weights.sum().item() for m in found] == [2, 2, 1, 0] and found[1].labels.tolist() == [
        0,
        1,
    ]


def random_examples(kind: str, tokenizer) -> list[Encoded]:
    """Eight encoded examples of a kind of task; some have equal lengths."""
    random = np.random.default_rng(0)

    def text(size: int) -> list[str]:
        return [WORDS[i] for i in random.integers(0, 300, size)]

    examples = []
    for i, size in enumerate([9, 9, 9, 4, 17, 17, 23, 9]):
        if kind == "token_classification":
            examples.append(Example("", text(size), None, [j % 3 for j in range(size)]))
        else:
            examples.append(Example("", " ".join(text(size)), " ".join(text(5)), i % 3))
    if kind == "regression":
        described = task(kind, label_range=(0.0, 2.0))
    else:
        described = task(kind, labels=["a", "b", "c"])
    return encode(examples, described, tokenizer, 128)


def stock_classifier(module: Classifier, model, kind: str) -> torch.nn.Module:
    """The stock class of transformers with the weights of `module`."""
    import transformers

    form = format_of(model)
    role, state = form.classifier(true_state(module), kind)
    labels = 1 if kind == "regression" else 3
    ids = SpecialIds(**run_folders.IDS)
    values = form.config(model, None, ids, role)
    config = transformers.AutoConfig.for_model(**values, num_labels=labels)
    stock = getattr(transformers, form.classes[role])(config).eval()
    assert not stock.load_state_dict(state, strict=False).missing_keys
    return stock


@pytest.mark.parametrize("architecture", ["electra", "modernbert", "deberta_v2"])
@pytest.mark.parametrize("kind", ["classification", "regression", "token_classification"])
def test_padded_and_packed_batches_and_the_stock_class_agree_in_logits_and_gradients(
    tmp_path, kind, architecture
):
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    config = run_folders.config(architecture=architecture)
    model = config.model.model_copy(update={"max_positions": 128})
    per_token, outputs = kind == "token_classification", 1 if kind == "regression" else 3
    module = run_folders.drawn(Classifier(model, outputs, per_token, kind == "regression"))
    encoded = random_examples(kind, words_tokenizer(tmp_path))
    lengths = [len(example.ids) for example in encoded]
    stock = stock_classifier(module, model, kind)
    longest = Encoded([2] * 128, 128, [-1] * 128 if per_token else 0)  # pads all rows to 128
    fixed = collate([*encoded, longest], 0, kind)
    ids, segments, real = (x[:-1] for x in (fixed.input_ids, fixed.segment_ids, fixed.document_ids))
    types = {"token_type_ids": segments} if format_of(model).has_token_types else {}
    expected = stock(ids, attention_mask=real, **types).logits
    if per_token:
        expected = torch.cat([row[:size] for row, size in zip(expected, lengths, strict=True)])
    expected.square().sum().backward()
    expected_grads = {name: p.grad for name, p in stock.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in expected_grads.values())
    for packed in (False, True):
        batch = collate(encoded, 0, kind, packed)
        shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
        assert batch.input_ids.shape == shape
        module.zero_grad()
        logits = module(batch, predict=True)
        logits = logits[batch.document_ids.flatten() > 0] if per_token else logits
        logits.square().sum().backward()
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        sizes = {name: len(value) for name, value in true_state(module).items()}
        grads = {name: p.grad[: sizes[name]] for name, p in module.named_parameters()}
        for name, grad in format_of(model).to_hf(grads, "discriminator").items():
            torch.testing.assert_close(
                grad, expected_grads[name], atol=1e-6 * largest, rtol=1e-4, msg=name
            )
        single = [[], *([example] for example in encoded)]
        alone = sum(module(collate(examples, 0, kind, packed)).total for examples in single)
        torch.testing.assert_close(alone, module(batch).total)


@pytest.mark.parametrize("kind", ["classification", "regression", "token_classification"])
def test_modernbert_has_equal_logits_and_gradients_padded_and_packed(tmp_path, kind):
    """The packed row has local layers by blocks, the padded rows have a mask."""
    model = run_folders.config(architecture="modernbert").model
    per_token, outputs = kind == "token_classification", 1 if kind == "regression" else 3
    module = run_folders.drawn(Classifier(model, outputs, per_token, kind == "regression"))
    encoded = random_examples(kind, words_tokenizer(tmp_path))
    found = []
    for packed in (False, True):
        batch = collate(encoded, 0, kind, packed)
        module.zero_grad()
        logits = module(batch, predict=True)
        logits = logits[batch.document_ids.flatten() > 0] if per_token else logits
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("architecture", ["modernbert", "deberta_v2"])
def test_an_encoder_without_token_types_reads_a_pair_without_segments(tmp_path, architecture):
    """[SEP] alone separates its two texts."""
    model = run_folders.config(architecture=architecture).model
    module = run_folders.drawn(Classifier(model, 3, per_token=False, regression=False))
    batch = collate(
        random_examples("classification", words_tokenizer(tmp_path)), 0, "classification"
    )
    assert batch.segment_ids.any()
    other = batch._replace(segment_ids=torch.zeros_like(batch.segment_ids))
    assert torch.equal(module(batch, predict=True), module(other, predict=True))


def test_a_micro_batch_is_at_most_the_share_of_a_rank():
    config = load_finetune("small")
    sizes = [
        config.of("cola", None, 0, world_size).train.micro_batch_size for world_size in (1, 2, 16)
    ]
    assert sizes == [32, 16, 2]
    assert config.of("cola", None, 0, 16).accumulation(16) == 1


def test_predictions_do_not_depend_on_batching(tmp_path):
    tokenizer, config = words_tokenizer(tmp_path), run_folders.config()
    module = run_folders.drawn(Classifier(config.model, 3, per_token=False, regression=False))
    random = np.random.default_rng(1)
    texts = [
        " ".join(WORDS[i] for i in random.integers(0, 300, random.integers(1, 30)))
        for _ in range(130)
    ]
    encoded = encode(
        [Example(str(i), t, None, 0) for i, t in enumerate(texts)],
        task(labels=["a", "b"]),
        tokenizer,
        40,
    )
    with torch.no_grad():
        together = np.stack(logits_of(module, "classification", encoded, 0))
        alone = np.concatenate(
            [module(collate([one], 0, "classification"), predict=True).numpy() for one in encoded]
        )
    assert np.abs(together - alone).max() < 1e-5
    shares = [np.concatenate(list(prediction_batches(encoded, 16, rank, 3))) for rank in range(3)]
    assert sorted(np.concatenate(shares)) == list(range(130))


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        ("electra", "hidden_dropout"),
        ("modernbert", "mlp_dropout"),
        ("deberta_v2", "hidden_dropout"),
    ],
)
def test_dropout_is_applied_before_the_head(tmp_path, architecture, field):
    config = run_folders.config(architecture=architecture).model
    config = config.model_copy(update={field: 0.5})
    module = run_folders.drawn(Classifier(config, 3, per_token=False, regression=False))
    (one,) = encode(
        [Example("0", "ab cd", None, 0)], task(labels=["a", "b"]), words_tokenizer(tmp_path), 40
    )
    batch = collate([one], 0, "classification")
    module.train()
    module.embeddings.eval()
    module.discriminator.eval()
    with torch.no_grad():
        logits = [module(batch, predict=True) for _ in range(8)]
        assert not all(torch.equal(logits[0], other) for other in logits[1:])
        assert torch.equal(module.eval()(batch, predict=True), module(batch, predict=True))


def test_a_swapped_pair_has_swapped_segments(tmp_path):
    tokenizer, pair = words_tokenizer(tmp_path), [Example("0", "ab cd", "ef", 3.0)]
    described = task("regression", label_range=(1.0, 5.0))
    first, second = encode(pair + swapped(pair), described, tokenizer, 40)
    assert tokenizer.tokens(first.ids) == ["[CLS]", "ab", "cd", "[SEP]", "ef", "[SEP]"]
    assert tokenizer.tokens(second.ids) == ["[CLS]", "ef", "[SEP]", "ab", "cd", "[SEP]"]
    batch = collate([first, second], 0, "regression")
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert batch.labels.tolist() == [
        0.5,
        0.5,
    ]  # a share of the range in training, the unit of the labels in predictions
    assert decode(described, pair, [first], [np.array([0.5])]) == [3.0]


def test_words_that_are_cut_off_are_predicted_as_outside(tmp_path):
    words = [Example("0", ["ab"] * 12, None, [1] * 12)]
    described = task("token_classification", labels=["B-x", "O"])
    encoded = encode(words, described, words_tokenizer(tmp_path), 8)
    logits = [np.tile([1.0, 0.0], (len(encoded[0].ids), 1))]
    assert decode(described, words, encoded, logits) == [[0] * 6 + [1] * 6]


def test_values_of_a_task_override_those_of_the_suite_and_set_overrides_the_file():
    config = load_finetune("small")
    epochs = [
        config.of(name, own, 0).train.epochs
        for name, own in (("rte", None), ("rte", 5.0), ("cola", 5.0))
    ]
    assert epochs == [10, 10, 5]
    given = load_finetune("small", ["train.epochs=2", "tasks.stsb.epochs=7"])
    assert [given.of(name, None, 0).train.epochs for name in ("rte", "stsb", "cola")] == [2, 7, 2]
    assert config.of("rte", None, 3).train.seed == 3 and given.optimizer == config.optimizer


def test_learning_rates_decrease_from_the_head_to_the_embeddings():
    scale = layerwise(12, 0.8)
    assert [scale(f"discriminator.layers.{i}.qkv.weight") for i in (11, 0)] == [0.8, 0.8**12]
    assert scale("head.bias") == 1
    assert scale("embeddings.norm.weight") == scale("discriminator.project.bias") == 0.8**13


def test_learning_rates_of_modernbert_count_the_last_norm_to_the_top_layer():
    model = run_folders.config(architecture="modernbert").model  # of three layers
    module = Classifier(model, 3, per_token=False, regression=False)
    scale = layerwise(model.num_layers, 0.5)
    found: dict[float, set[str]] = {}
    for name, _ in module.named_parameters():
        part = name.rpartition(".")[0]
        layer = ".".join(part.split(".")[:3]) if ".layers." in part else part.split(".")[0]
        found.setdefault(scale(name), set()).add(part if "final_norm" in part else layer)
    assert found == {
        1.0: {"head"},
        0.5: {"discriminator.layers.2", "discriminator.final_norm"},
        0.25: {"discriminator.layers.1"},
        0.125: {"discriminator.layers.0"},
        0.0625: {"embeddings"},
    }


def test_learning_rates_of_deberta_v2_count_the_relative_table_to_the_embeddings():
    model = run_folders.config(architecture="deberta_v2").model  # of three layers
    module = Classifier(model, 3, per_token=False, regression=False)
    scale = layerwise(model.num_layers, 0.5)
    of_tables = {
        name.rpartition(".")[0] for name, _ in module.named_parameters() if scale(name) == 0.5**4
    }
    assert of_tables == {
        "embeddings.word",
        "embeddings.norm",
        "discriminator.relative",
        "discriminator.relative_norm",
    }


@pytest.mark.skipif(not GLUE.is_dir(), reason="needs the shared GLUE files")
@pytest.mark.parametrize("name", ["cola", "mrpc", "rte", "stsb"])
def test_batches_of_real_tasks_have_little_padding(name):
    tokenizer = load_tokenizer(GLUE.parent / "vocab" / "bert-base-uncased-vocab.txt")
    found = load_task(name, GLUE)
    examples = read_examples(found, "train")
    encoded = encode(
        examples + swapped(examples) if found.both_orders else examples, found, tokenizer, 128
    )
    lengths = np.array([len(example.ids) for example in encoded])
    halves = [
        half
        for batch in epoch_batches(lengths, 32, 0, 0)
        for half in (batch[:16], batch[16:])
        if len(half)
    ]
    padded = sum(lengths[half].max() * len(half) for half in halves)
    assert 1 - lengths.sum() / padded < 0.06
