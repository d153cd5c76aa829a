"""Export and loading: transformers gives the token ids and logits of our own modules."""

import copy
import json
import lzma
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_folders
import torch
from running import CPU, run_cli
from shard_data import with_vocabulary
from stock_folders import run_card
from torch import nn

from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run, parse_run
from electra_ds.data.batch import Batch
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.interop.export import export
from electra_ds.interop.hf import format_of
from electra_ds.interop.hf_tokenizer import write_tokenizer
from electra_ds.interop.load_model import (
    load,
    load_objective,
    load_pretrained,
    resolve_checkpoint,
)
from electra_ds.model.build import build_objective
from electra_ds.model.weights import true_state

transformers = pytest.importorskip("transformers")
TEXT = Path(__file__).resolve().parents[3] / "shared" / "data"
# Logits of up to 10 are compared in float64, so that versions of torch that add up in another order
# give the same. The rest is the rounding of exported values to fp32, such as a bias times a range.
BOUND = 1e-6

# --------------------------------------------------------------------------------------- tokenizers

EDGES = [
    "",
    " ",
    "   two   spaces  ",
    "\ttab\tthere",
    "line \n",
    "no\u00a0break",
    "cafe\u0301 E\u0301COLE A\u0308pfel",
    "\x00\x01bell\x07",
    "zero\u200bwidth",
    "\ufeffmark",
    "\u201cquotes\u201d\u2014dash \u2026",
    "\uff11 \uff21",
    "\uff76\uff9e \u30ab\u3099",
    "\u2603\u2603 \u2603 x\u2603y \U0001f600\U0001f44d\U0001f3fd",
    "aaaaaaaaaaaaaaaa",
    "x" * 300,
    "\u6f22\u5b57\u304b\u306a",
    "a\u0300\u0301\u0302b",
    "\u00bd \u2103",
    "\u3000wide",
    "\u1e9e \u0130",
    "\u2581literal \u2581a",
]


def stock_tokenizer(tokenizer: Tokenizer, folder: Path):
    write_tokenizer(tokenizer, folder, 64)
    (folder / "config.json").write_text('{"model_type": "electra"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same_ids(tokenizer: Tokenizer, stock, lines: list[str]) -> None:
    """Equal ids; for unigram the same tokens in any order where two cuts have equal scores."""
    ours = tokenizer.encode_batch(lines)
    theirs = stock(lines, add_special_tokens=False, verbose=False)["input_ids"]
    unlike = [(line, a, b) for line, a, b in zip(lines, ours, theirs, strict=True) if a != b]
    assert [case for case in unlike if sorted(case[1]) != sorted(case[2])] == []
    is_unigram = "Unigram" in type(stock.backend_tokenizer.model).__name__
    assert len(unlike) <= (len(lines) / 500 if is_unigram else 0), unlike


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_auto_tokenizer_returns_our_ids(kind, lowercase, tmp_path):
    lines = [line for thing in (json, str) for line in pydoc.render_doc(thing).splitlines()]
    lines = [line for line in lines if not re.search(r"([^\w\s])\1", line)]
    lines += ["na\u00efve \u00c4pfel \u30ac"] * 3
    (tmp_path / "text.txt").write_text("\n".join(lines))
    text = [str(tmp_path / "text.txt")]
    tokenizer = train_tokenizer(
        text, tmp_path / "t", kind=kind, vocab_size=500, lowercase=lowercase
    )
    stock = stock_tokenizer(tokenizer, tmp_path / "hf")
    assert_same_ids(tokenizer, stock, lines + EDGES)
    (a, b), ids = tokenizer.encode_batch(["first words", "and others"]), tokenizer.special_ids
    pair = stock("first words", "and others")
    assert pair["input_ids"] == [ids.cls, *a, ids.sep, *b, ids.sep]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    roles = ("pad", "unk", "cls", "sep", "mask")
    assert [getattr(stock, f"{role}_token_id") for role in roles] == [
        getattr(ids, role) for role in roles
    ]
    assert stock.model_max_length == 64
    assert stock("[MASK]", add_special_tokens=False)["input_ids"] == [
        ids.mask
    ]  # our tokenizer never makes a special token from text
    assert load_tokenizer(tmp_path / "hf").content == tokenizer.content
    if kind == "wordpiece":
        (tmp_path / "hf" / "vocab.txt").unlink()  # as newer versions of the library save it
        assert load_tokenizer(tmp_path / "hf").fingerprint == tokenizer.fingerprint


def shared_lines(name: str) -> list[str]:
    path = TEXT / "text" / name
    if not path.exists():
        pytest.skip("needs the shared text")
    text = (
        lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    ).decode()
    return [line for line in text.splitlines()[:6000] if not line.startswith(("<doc", "</doc"))]


@pytest.mark.parametrize(
    "name", ["japanese_novel.txt", "german_novels.txt.xz", "wikitext2.valid.txt"]
)
def test_ids_are_equal_on_thousands_of_lines(name, tmp_path):
    lines = shared_lines(name)
    (tmp_path / "text.txt").write_text("\n".join(lines))
    for kind in ("unigram", "bpe"):
        folder = tmp_path / kind
        tokenizer = train_tokenizer(
            [str(tmp_path / "text.txt")], folder, kind=kind, vocab_size=4000, lowercase=False
        )
        assert_same_ids(tokenizer, stock_tokenizer(tokenizer, folder / "hf"), lines)
    tokenizer = load_tokenizer(TEXT / "vocab" / "bert-base-uncased-vocab.txt")
    assert_same_ids(tokenizer, stock_tokenizer(tokenizer, tmp_path / "hf"), lines)


# ----------------------------------------------------------------------------------------- encoders


def stock_model(folder: Path, auto: str = "AutoModelForPreTraining"):
    """The stock model of the class that its config names, in float64; no key is missing or
    unexpected."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    kind = getattr(transformers, auto if auto != "AutoModelForPreTraining" else name)
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    assert type(model).__name__ == name
    return model.double().eval()


@torch.no_grad()
def assert_same_logits(module, folder: Path) -> None:
    module = copy.deepcopy(module).double()
    ids, mask, types = run_folders.rows_with_padding()
    positions, none = torch.arange(20).expand(3, -1), torch.zeros(3, 1)
    batch, real = (
        Batch(ids, types, mask, positions, positions[:, :1], none, none > 0, none),
        mask > 0,
    )
    found = stock_model(folder / "discriminator")(
        ids, attention_mask=mask, token_type_ids=types
    ).logits
    assert float((module.discriminate(ids, batch) - found)[real].abs().max()) <= BOUND
    encoder = module.discriminator if module.sharing == "all" else module.generator
    has_own = module.sharing in ("untied", "gdes")
    embeddings = module.generator_embeddings if has_own else module.embeddings
    ours = module.generator_head(encoder(embeddings(ids, types, positions), mask), embeddings.word)
    model = stock_model(folder / "generator", "AutoModelForMaskedLM")
    assert (
        float(
            (ours - model(ids, attention_mask=mask, token_type_ids=types).logits)[real].abs().max()
        )
        <= BOUND
    )
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("sharing", ["shared", "untied", "all", "gdes"])
def test_an_exported_run_has_equal_logits(sharing, tmp_path):
    module = run_folders.pretrained(tmp_path / "run", sharing)
    export(tmp_path / "run", tmp_path / "out")
    assert_same_logits(module, tmp_path / "out")
    with pytest.raises(UserError, match="not empty"):
        export(tmp_path / "run", tmp_path / "out")


def test_the_cards_of_a_run_with_a_frozen_generator_say_so(tmp_path):
    values = run_folders.frozen_config().model_dump(mode="json")
    values["objective"] |= {"temperature": 2.0, "temperature_decay": 0.1}
    run_folders.saved(tmp_path / "run", parse_run(values, "test"))
    export(tmp_path / "run", tmp_path / "out")
    parts = ("discriminator", "generator")
    cards = [(tmp_path / "out" / part / "README.md").read_text() for part in parts]
    assert "| objective.generator | frozen |" in cards[0]
    assert (
        "| temperature | 2 at first, tends to 1 (objective.temperature_decay = 0.1) |" in cards[0]
    )
    assert "It was frozen in the run" in cards[1] and "trained beside" not in cards[1]
    run_folders.pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "other")
    cards = [(tmp_path / "other" / part / "README.md").read_text() for part in parts]
    assert "frozen" not in "".join(cards) and "trained beside" in cards[1]
    assert "| temperature |" not in cards[0]


def test_the_code_of_the_cards_of_a_run_runs_as_printed(tmp_path):
    run_folders.pretrained(tmp_path / "run")
    (tmp_path / "run" / "import.json").write_text('{"source": "bert-folder"}')
    export(tmp_path / "run", tmp_path / "out")
    probabilities = eval(run_card(tmp_path / "out" / "discriminator"))
    assert probabilities[0][0] == "[CLS]" and all(0 < p < 1 for _, p in probabilities)
    assert run_card(tmp_path / "out" / "generator").strip()
    for part, tag in (("discriminator", "feature-extraction"), ("generator", "fill-mask")):
        card = (tmp_path / "out" / part / "README.md").read_text()
        front = card.split("---\n")[1].splitlines()
        assert front[:2] == ["library_name: transformers", f"pipeline_tag: {tag}"]
        assert "| base model | bert-folder |" in card and "| objective | electra |" in card


def test_a_zero3_run_of_two_ranks_is_exported_by_the_command_line(data, tmp_path):
    out, words = tmp_path / "run", run_folders.vocabulary(tmp_path / "words")
    sets = [f"--set=model.{key}={value}" for key, value in run_folders.SIZES["model"].items()]
    data = with_vocabulary(data, words, tmp_path / "data")
    run = ["pretrain", "tiny", "--data", data, "--out", out, "--engine", "zero3-fp32", *sets]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [
        *launcher,
        "-m",
        "electra_ds",
        *run,
        "--set=train.total_steps=2",
        "--set=logging.every=1",
    ]
    command = [
        sys.executable,
        *map(str, command),
        "--set=train.micro_batch_size=16",
        "--set=train.eval_rows=16",
    ]
    done = subprocess.run(
        command, env=os.environ | CPU, capture_output=True, text=True, timeout=600
    )
    assert len(list((out / "ckpt" / "final").glob("model-*"))) == 2, done.stderr[-4000:]
    output = run_cli("export", out, "--out", tmp_path / "hf", "--tokenizer", words).stdout
    assert "ElectraForPreTraining" in output and "ElectraForMaskedLM" in output
    assert_same_logits(load_objective(out / "ckpt" / "final")[0], tmp_path / "hf")
    card = (tmp_path / "hf" / "generator" / "README.md").read_text()
    held_out = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        "| steps | 2 |" in card
        and f"| held out at step 2, mlm_loss | {held_out['mlm_loss']:.4f} |" in card
    )


@pytest.mark.parametrize("kind", ["mlm", "replace_mlm", "all_tokens_mlm", "electra_15"])
def test_the_main_encoder_of_every_objective_is_exported(kind, tmp_path):
    module = run_folders.pretrained(tmp_path / "run", kind=kind)
    export(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "generator").exists() == (kind != "mlm")
    if kind == "electra_15":
        assert_same_logits(module, tmp_path / "out")
        return
    ids, mask, types = run_folders.rows_with_padding()
    module.double()
    with torch.no_grad():
        hidden = module.discriminator(
            module.embeddings(ids, types, torch.arange(20).expand(3, -1)), mask
        )
        ours = module.mlm_head(hidden, module.embeddings.word)
        theirs = stock_model(tmp_path / "out" / "discriminator", "AutoModelForMaskedLM")(
            ids, attention_mask=mask, token_type_ids=types
        )
    assert float((ours - theirs.logits)[mask > 0].abs().max()) <= BOUND
    card = (tmp_path / "out" / "discriminator" / "README.md").read_text()
    assert ("copy_gate.weight" in card) == (kind == "all_tokens_mlm")


# --------------------------------------------------------------------------------------- fine-tuned


@torch.no_grad()
@pytest.mark.parametrize("name", run_folders.TASKS)
def test_an_exported_fine_tuned_model_has_equal_logits(name, tmp_path):
    parts = run_folders.fine_tuned(tmp_path / "seed-0", name)
    export(tmp_path / "seed-0", tmp_path / "out")
    ids, mask, types = run_folders.rows_with_padding()
    parts.double()
    hidden = parts["discriminator"](
        parts["embeddings"](ids, types, torch.arange(20).expand(3, -1)), mask
    )
    ours = parts["head"](hidden)
    per_token = name in ("token_classification", "many classes")
    auto = "AutoModelForTokenClassification" if per_token else "AutoModelForSequenceClassification"
    model = stock_model(tmp_path / "out", auto)
    logits = model(ids, attention_mask=mask, token_type_ids=types).logits
    if name == "regression":
        ours = 1.0 + 4.0 * ours  # in the unit of the labels
    wanted = ours[mask > 0] if per_token else ours[:, 0]
    assert float((wanted - (logits[mask > 0] if per_token else logits)).abs().max()) <= BOUND
    labels = run_folders.TASKS[name]["labels"] or ["own"]
    assert model.config.id2label == dict(enumerate(labels)) and model.config.num_labels == len(
        labels
    )
    problem = {"regression": "regression", "classification": "single_label_classification"}.get(
        name
    )
    assert model.config.problem_type == problem
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("first token" in card) == (name == "many classes")
    assert "| base model | run O, step 7 |" in card and "| valid, accuracy | 0.5000 |" in card
    assert ("is_split_into_words=True" in card) == (name == "token_classification")
    assert "| tokenizer | wordpiece, 600 entries, lower case, accents stripped, " in card
    shown = ", ".join(labels) if run_folders.TASKS[name]["labels"] else "a number from 1 to 5"
    assert f"| labels | {shown} |" in card
    printed = run_card(tmp_path / "out").strip()
    if name == "regression":
        assert float(printed) == float(printed)
    elif name == "token_classification":
        assert eval(printed)[0][0] == "[CLS]" and {tag for _, tag in eval(printed)} <= set(labels)
    else:
        assert printed in labels


# ---------------------------------------------------------------------------------- load_pretrained


def assert_same_encoder(path: Path, module: nn.Module, tokenizer: Path | None = None) -> None:
    """load_pretrained returns the encoder of `module`, bit for bit."""
    loaded = load_pretrained(path, tokenizer)
    encoder = ("embeddings.", "discriminator.")
    wanted = {name: t for name, t in true_state(module).items() if name.startswith(encoder)}
    wanted = {name: t for name, t in wanted.items() if "head" not in name}
    assert loaded.state.keys() == wanted.keys(), path
    assert all(torch.equal(loaded.state[name], t) for name, t in wanted.items()), path
    assert loaded.model.hidden_size == 48
    assert loaded.model.vocab_size == loaded.tokenizer.vocab_size == 600


def bare_folder(source: Path, folder: Path, pickled: bool = False) -> Path:
    """An ElectraModel without heads and tokenizer, as safetensors or as a pickled file."""
    bare = transformers.ElectraModel.from_pretrained(source)
    bare.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(bare.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_load_pretrained_reads_the_same_encoder_from_every_kind_of_folder(tmp_path):
    run, hf = tmp_path / "run", tmp_path / "hf"
    module = run_folders.pretrained(run)
    export(run, hf)
    for path in (run, run / "ckpt", run / "ckpt" / "final", hf, hf / "discriminator"):
        assert_same_encoder(path, module)
    for name in ("bare", "pickled"):
        folder = bare_folder(hf / "discriminator", tmp_path / name, pickled=name == "pickled")
        assert_same_encoder(folder, module, run / "tokenizer")
    parts = run_folders.fine_tuned(tmp_path / "seed-0", "classification")
    export(tmp_path / "seed-0", tmp_path / "tuned")
    for path in (tmp_path / "seed-0", tmp_path / "seed-0" / "model", tmp_path / "tuned"):
        assert_same_encoder(path, parts)
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "seed-3").symlink_to(tmp_path / "seed-0")
    assert resolve_checkpoint(tmp_path / "rte") == tmp_path / "rte" / "seed-3" / "model"
    assert_same_encoder(tmp_path / "rte", parts)


def test_load_pretrained_refuses_other_folders_and_tokenizers(tmp_path):
    run = tmp_path / "run"
    run_folders.pretrained(run)
    (tmp_path / "rte").mkdir()
    for seed in ("seed-3", "seed-5"):
        run_folders.fine_tuned(tmp_path / "rte" / seed, "classification")
    kinds = "expected a run folder .*OUT/ckpt/STEP.*DIR/TASK/seed-N.*Hugging Face folder"
    several = "models of 2 seeds; give one, such as .*rte/seed-3"
    for path, part in (("rte", several), ("nothing", kinds)):
        with pytest.raises(UserError, match=part):
            load_pretrained(tmp_path / path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    run_config = run_folders.config()
    form, ids = format_of(run_config.model), run_config.data.special_ids
    config = form.config(run_config.model, None, ids, "detection")
    (pickled / "config.json").write_text(json.dumps(config))
    torch.save({"x": Path}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):  # code in a pickle is not run
        load_pretrained(pickled, run / "tokenizer")
    vocabulary = "".join(f"{token}\n" for token in run_folders.VOCABULARY[:50])
    (tmp_path / "vocab.txt").write_text(vocabulary)
    with pytest.raises(UserError, match="50 entries"):
        load_pretrained(run, tmp_path / "vocab.txt")


def test_a_run_of_user_modules_is_refused(tmp_path):
    values = load_run("tiny").model_dump(mode="json")
    made = run_folders.save(
        tmp_path / "run" / "ckpt", "7", {"generator.rnn.weight": torch.zeros(3)}, values
    )
    for verb in (load_pretrained, lambda path: export(path, tmp_path / "out")):
        with pytest.raises(UserError, match="modules of your own"):
            verb(made)


# ------------------------------------------------------------------------------------------- load


def rows():
    """(input_ids, segment_ids, attention_mask) of run_folders.rows_with_padding."""
    ids, mask, types = run_folders.rows_with_padding()
    return ids, types, mask


@torch.no_grad()
def equal_logits(a, b) -> bool:
    ids, types, mask = rows()
    x, y = (copy.deepcopy(model).double()(ids, types, mask) for model in (a, b))
    return x.shape == y.shape and float((x - y)[mask > 0].abs().max()) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["shared", "untied", "all", "gdes"])
def test_load_returns_both_parts_of_a_run_and_of_its_export(sharing, tmp_path):
    module = run_folders.pretrained(tmp_path / "run", sharing)
    export(tmp_path / "run", tmp_path / "hf")
    run, hf = load(tmp_path / "run"), load(str(tmp_path / "hf"))
    for part in ("discriminator", "generator"):
        assert equal_logits(getattr(run, part), getattr(hf, part)), part
        alone = load(tmp_path / "hf" / part)
        assert equal_logits(getattr(run, part), getattr(alone, part)), part
        other = "generator" if part == "discriminator" else "discriminator"
        assert getattr(alone, other) is None
    assert not run.discriminator.training and not hf.generator.training
    assert run.config.model.hidden_size == 48 == hf.config["hidden_size"]
    ids, types, mask = rows()
    positions, none = torch.arange(20).expand(3, -1), torch.zeros(3, 1)
    batch = Batch(ids, types, mask, positions, positions[:, :1], none, none > 0, none)
    expected, real = module.discriminate(ids, batch), mask > 0
    found = run.discriminator(ids, types, mask)
    if sharing == "gdes":  # sums of tables and sums of their rows are rounded differently
        assert float((found - expected)[real].abs().max()) <= 10 * BOUND
    else:
        assert torch.equal(found[real], expected[real])
    assert run.generator(ids, types).shape == (3, 20, 600)
    assert run.discriminator.encode(ids).shape == (3, 20, 48)


@torch.no_grad()
def test_load_returns_one_part_where_the_model_has_one(tmp_path):
    run_folders.pretrained(tmp_path / "mlm", kind="mlm")
    export(tmp_path / "mlm", tmp_path / "hf")
    run = load(tmp_path / "mlm")
    assert run.generator is None and run.discriminator(rows()[0]).shape == (3, 20, 600)
    for path in (tmp_path / "hf", tmp_path / "hf" / "discriminator"):
        assert load(path).generator is None
        assert equal_logits(load(path).discriminator, run.discriminator)
    parts = run_folders.fine_tuned(tmp_path / "seed-0", "classification")
    tuned = load(tmp_path / "seed-0")
    assert tuned.generator is None and tuned.config["task"]["name"] == "own"
    ids, types, mask = rows()
    positions = torch.arange(20) * mask
    expected = parts["discriminator"](parts["embeddings"](ids, types, positions), mask)
    assert torch.equal(tuned.discriminator.encode(ids, types, mask), expected)
    with pytest.raises(UserError, match="no head"):
        tuned.discriminator(ids)


def test_loaded_models_turn_texts_into_rows(tmp_path):
    run_folders.pretrained(tmp_path / "run")
    loaded = load(tmp_path / "run", tmp_path / "run" / "tokenizer")
    cls, sep, pad = (run_folders.IDS[role] for role in ("cls", "sep", "pad"))
    a, b = loaded.tokenizer.encode_batch(["aa", "ab ac"])
    assert loaded.input_ids(["aa", "ab ac"]).tolist() == [[cls, *a, sep, pad], [cls, *b, sep]]
    assert loaded.input_ids(["aa " * 100]).shape == (1, loaded.max_length)
    with pytest.raises(UserError, match="no checkpoint here; expected a run folder"):
        load(tmp_path)


def test_load_runs_the_code_of_a_factory_when_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "support")
    values = load_run("tiny").model_dump(mode="json")
    factory = {"factory": "own_pair:build", "options": {"width": 16}, "vocab_size": 600}
    values |= {"model": factory | {"discr_dim": 16, "discr_layer": "conv"}, "generator": None}
    values["data"] |= {"special_ids": run_folders.IDS}
    module = build_objective(parse_run(values, "test"), seed=0)
    run_folders.save(tmp_path / "run" / "ckpt", "7", true_state(module), values)
    (tmp_path / "run" / "ckpt" / "latest").write_text("7\n")
    run_folders.vocabulary(tmp_path / "run" / "tokenizer")
    with pytest.raises(UserError, match=r"own_pair:build.*give --trust-code"):
        load(tmp_path / "run")
    loaded = load(tmp_path / "run", trust_code=True)
    ids = loaded.input_ids(["aa ab"])
    logits = loaded.discriminator(ids, document_ids=torch.ones_like(ids))
    assert logits.shape == ids.shape and type(loaded.generator).__name__ == "Generator"
