"""Questions: files of SQuAD's shape, tasks, windows, labels, spans, loss."""

import json
import unicodedata

import numpy as np
import pytest
import run_folders
import torch
from small_questions import article, paragraph, question, write_file
from stock_tokenizer import stock_tokenizer

from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.finetuning.answers import answers_table, decode_answers, predictions_json
from electra_ds.finetuning.batches import collate, encode, micro_batches
from electra_ds.finetuning.config import load_finetune
from electra_ds.finetuning.examples import read_examples
from electra_ds.finetuning.notes import split_notes
from electra_ds.finetuning.span_classifier import SpanClassifier
from electra_ds.finetuning.squad_files import Answers
from electra_ds.finetuning.tasks import Task, load_task, task_names
from electra_ds.finetuning.windows import Window, answer_tokens, best_windows, slices

TEXT = (
    "The old café of Zoë, near the naïve river — in 東京都 (Tokyo) — was sold for $4.5m in 1999. "
    "Łódź and Việt Nam: nothing. 北京大学 is a university; е\u0301 is decomposed. "
)


def own(folder, *paragraphs, valid=(), no_answer=False, **questions) -> Task:
    """A task of questions with the paragraphs as its training split."""
    write_file(folder / "train.json", *paragraphs)
    write_file(folder / "valid.json", *(valid or paragraphs))
    description = {
        "kind": "question_answering",
        "splits": {"train": "train.json", "valid": "valid.json"},
        "questions": {"no_answer": no_answer} | questions,
    }
    (folder / "own.json").write_text(json.dumps(description))
    return load_task(str(folder / "own.json"), None)


def tokenizer_of(kind: str, folder):
    """A tokenizer of a kind. Its vocabulary has many characters of TEXT."""
    if kind == "stock byte_bpe":
        stock_tokenizer(folder)
        return load_tokenizer(folder)
    (folder / "t.txt").write_text("\n".join([TEXT] * 20))
    options = {"kind": kind.removeprefix("stripped ")}
    if kind.startswith("stripped"):
        options |= {"strip_accents": True, "lowercase": True}
    return train_tokenizer([str(folder / "t.txt")], folder / ".v", vocab_size=330, **options)


KINDS = ["wordpiece", "stripped wordpiece", "unigram", "bpe", "byte_bpe", "stock byte_bpe"]


def perfect_logits(encoded) -> list[np.ndarray]:
    """Logits that are 5 at the label of each row, else 0."""
    found = []
    for row in encoded:
        logits = np.zeros((len(row.ids), 2), np.float32)
        logits[row.label[0], 0] = logits[row.label[1], 1] = 5
        found.append(logits)
    return found


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", KINDS)
def test_learned_tokens_give_the_answer_as_it_is_in_the_context(tmp_path, kind, form):
    """Accents, marks, CJK, symbols and borders of tokens and windows, with several windows."""
    context = unicodedata.normalize(form, TEXT * 3)
    answers = ["café of Zoë", "naïve", "東京都", "$4.5m", "Łódź", "Việt Nam", "北京大学", "The"]
    answers = [unicodedata.normalize(form, answer) for answer in answers]
    asked = [question(str(n), "Wo?", context, answer) for n, answer in enumerate(answers)]
    task = own(tmp_path, paragraph(context, *asked), max_answer_tokens=60)
    tokenizer = tokenizer_of(kind, tmp_path)
    examples = read_examples(task, "train")
    encoded = encode(examples, task, tokenizer, 90)
    assert len(encoded) >= 2 * len(examples) and max(len(row.ids) for row in encoded) == 90
    found = decode_answers(task, examples, encoded, perfect_logits(encoded))
    for answer, predicted in zip(answers, found, strict=True):
        assert predicted.text == context[predicted.start : predicted.end]
        # The tokens of a vocabulary may be longer than the answer: the least that covers it.
        _, spans = tokenizer.encode_with_offsets(context)
        start = context.index(answer)
        first, last = answer_tokens(spans, start, start + len(answer))
        assert predicted.text == context[spans[first][0] : spans[last][1]], answer
        assert answer in predicted.text
        if "wordpiece" in kind and answer != "$4.5m":
            assert predicted.text == answer


def test_rows_are_question_and_slice_and_cover_the_context(tmp_path):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    words = run_folders.VOCABULARY[5:105]
    context = " ".join(words)
    task = own(tmp_path, paragraph(context, question("q", "aa ab", context, words[50])), stride=8)
    encoded = encode(read_examples(task, "train"), task, tokenizer, 24)
    room = 24 - 3 - 2
    special = tokenizer.special_ids
    covered = set()
    for row in encoded:
        assert row.ids[:4] == [special.cls, *tokenizer.encode_batch(["aa ab"])[0], special.sep]
        assert row.ids[-1] == special.sep and row.second_start == 4
        part = tokenizer.tokens(row.ids[4:-1])
        assert part == words[row.window.first : row.window.first + row.window.size]
        assert len(part) <= room
        covered |= set(part)
        inside = row.window.first <= 50 < row.window.first + row.window.size
        assert row.label == ([4 + 50 - row.window.first] * 2 if inside else [0, 0])
    assert covered == set(words) and sum(row.label != [0, 0] for row in encoded) > 1
    firsts = [row.window.first for row in encoded]
    assert firsts == list(range(0, firsts[-1] + 1, 8))


def test_an_answer_over_the_border_of_a_window_is_labelled_where_it_is_complete(tmp_path):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    words = run_folders.VOCABULARY[5:105]
    context = " ".join(words)
    places = [*((first, 3) for first in range(98)), (0, 9), (91, 9)]
    asked = [
        question(str(number), "aa ab", context, " ".join(words[first : first + size]))
        for number, (first, size) in enumerate(places)
    ]
    task = own(tmp_path, paragraph(context, *asked), stride=8)
    examples = read_examples(task, "train")
    encoded = encode(examples, task, tokenizer, 24)
    complete = set()
    for row in encoded:
        answer = examples[row.window.example].label.texts[0].split()
        part = words[row.window.first : row.window.first + row.window.size]
        if set(answer) <= set(part):
            first, last = row.label
            assert tokenizer.tokens(row.ids[first : last + 1]) == answer
            complete.add(row.window.example)
        else:
            assert row.label == [0, 0]
    assert complete == set(range(100))


def test_an_answer_has_the_tokens_that_share_a_character_with_it():
    spans = [(0, 2), (2, 2), (2, 5), (5, 6), (7, 7), (7, 9), (9, 9)]  # (n, n): white space
    found = {
        (0, 2): (0, 0),
        (2, 5): (2, 2),
        (2, 6): (2, 3),
        (1, 3): (0, 2),
        (5, 6): (3, 3),
        (6, 8): (5, 5),
        (6, 7): None,
        (9, 12): None,
        (4, 20): (2, 5),
    }
    for (start, end), tokens in found.items():
        assert answer_tokens(spans, start, end) == tokens, (start, end)
    assert answer_tokens([], 0, 1) is None
    parts = [(0, 1), (0, 1), (0, 1), (1, 2)]  # three tokens are parts of one character
    assert answer_tokens(parts, 0, 1) == (0, 2) and answer_tokens(parts, 1, 2) == (3, 3)


@pytest.mark.parametrize(("length", "room", "stride"), [(500, 100, 128), (7, 100, 128), (1, 5, 1)])
def test_an_answer_of_half_a_window_is_complete_in_a_window(length, room, stride):
    windows = slices(length, room, stride)
    for first in range(length):
        last = min(length, first + max(1, room // 2)) - 1
        assert any(a <= first and last < a + n for a, n in windows), first
    assert windows[-1][0] + windows[-1][1] == length
    assert slices(0, 5, 3) == [(0, 0)]


def test_a_token_belongs_to_the_window_with_most_context():
    random = np.random.default_rng(0)
    for _ in range(30):
        length, room, stride = (int(x) for x in random.integers(1, 40, 3))
        windows = [Window(0, *found, [(0, 1)] * length) for found in slices(length, room, stride)]
        owner = best_windows(windows)
        for token in range(length):  # the rule of the authors' code, token by token
            best, best_number = None, None
            for number, window in enumerate(windows):
                end = window.first + window.size - 1
                if not window.first <= token <= end:
                    continue
                score = min(token - window.first, end - token) + 0.01 * window.size
                if best is None or score > best:
                    best, best_number = score, number
            assert owner[token] == best_number


def best_by_search(task, examples, encoded, logits):
    """(text, null odds) of each question by a search over all pairs of tokens."""
    found = []
    for number, example in enumerate(examples):
        rows = [(row, x) for row, x in zip(encoded, logits, strict=True)]
        rows = [(row, x) for row, x in rows if row.window.example == number]
        owner = best_windows([row.window for row, _ in rows])
        best = (-1e9, "")
        for i, (row, x) in enumerate(rows):
            spans = row.window.spans
            for a in range(row.window.size):
                first = row.window.first + a
                for b in range(a, min(a + task.questions.max_answer_tokens, row.window.size)):
                    is_empty = any(
                        spans[row.window.first + c][0] == spans[row.window.first + c][1]
                        for c in (a, b)
                    )
                    if owner[first] != i or is_empty:
                        continue
                    score = float(x[row.second_start + a, 0]) + float(x[row.second_start + b, 1])
                    if score > best[0]:
                        text = example.text_b[spans[first][0] : spans[row.window.first + b][1]]
                        best = (score, text)
        null = min(float(x[0, 0]) + float(x[0, 1]) for _, x in rows)
        found.append((best[1], null - best[0]))
    return found


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe"])
def test_the_best_span_is_that_of_a_search_over_all_pairs(tmp_path, kind):
    contexts = [TEXT, "one", "  two \t\n three  " * 9, TEXT[40:120]]
    paragraphs = [
        paragraph(context, question(str(n), "what is it", context, context.split()[0]))
        for n, context in enumerate(contexts)
    ]
    task = own(tmp_path, *paragraphs, max_answer_tokens=5)
    examples = read_examples(task, "train")
    encoded = encode(examples, task, tokenizer_of(kind, tmp_path), 40)
    random = np.random.default_rng(3)
    for _ in range(4):
        logits = [random.normal(size=(len(row.ids), 2)).astype(np.float32) for row in encoded]
        found = decode_answers(task, examples, encoded, logits)
        expected = best_by_search(task, examples, encoded, logits)
        assert [answer.text for answer in found] == [text for text, _ in expected]
        assert [answer.null_odds for answer in found] == pytest.approx([x for _, x in expected])
        assert all(answer.text == answer.text.strip() for answer in found)


def test_a_context_of_one_word_and_one_without_tokens_are_predicted(tmp_path):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    parts = [
        paragraph("ab", question("a", "aa", "ab", "ab")),
        paragraph(" \u200b ", question("b", "", "")),
    ]
    task = own(tmp_path, *parts, no_answer=True)
    examples = read_examples(task, "train")
    encoded = encode(examples, task, tokenizer, 24)
    assert [len(row.ids) for row in encoded] == [5, 3]
    found = decode_answers(task, examples, encoded, perfect_logits(encoded))
    assert [answer.text for answer in found] == ["ab", ""]
    assert np.isfinite([answer.null_odds for answer in found]).all()
    assert found[1].null_odds > 1e5


def test_files_of_predictions_have_the_official_shape_and_one_line_per_question(tmp_path):
    context = "line one\nline\ttwo 東京"
    asked = [question("x\ty", "?", context, "one\nline\ttwo"), question("b", "?", context)]
    task = own(tmp_path, paragraph(context, *asked), no_answer=True)
    tokenizer = tokenizer_of("wordpiece", tmp_path)
    examples = read_examples(task, "train")
    encoded = encode(examples, task, tokenizer, 60)
    answers = decode_answers(task, examples, encoded, perfect_logits(encoded))
    answers = [answer.at(0.0) for answer in answers]
    table = answers_table(task, examples, answers).decode().split("\n")
    assert table[0] == "index\tprediction\tstart\tend\tnull_odds" and len(table) == 4
    assert table[1].split("\t")[:4] == ["x\\ty", "one\\nline\\ttwo", "5", "17"]
    assert table[2].split("\t")[:4] == ["b", "", "", ""]
    texts = json.loads(predictions_json(examples, answers))
    assert texts == {"x\ty": "one\nline\ttwo", "b": ""}


# ------------------------------------------------------------------------------------ tasks, files


def squad_folder(root, name="SQuAD"):
    folder = root / name
    folder.mkdir(parents=True)
    for version, asked in (("v1.1", ["cat"]), ("v2.0", [])):
        for split in ("train", "dev"):
            write_file(
                folder / f"{split}-{version}.json",
                paragraph("a cat sat", question("q", "who", "a cat sat", *asked)),
            )
    return folder


@pytest.mark.parametrize("name", ["SQuAD", "squad", "SQUAD-v2.0"])
def test_the_official_files_are_found_in_the_folder_or_below_it(tmp_path, name):
    folder = squad_folder(tmp_path, name)
    for data in (tmp_path, folder):
        first, second = (load_task(task, data) for task in task_names("SQuAD-1.1,squad_v2"))
        assert (first.name, second.name) == ("squad", "squad2")
        assert (first.questions.no_answer, second.questions.no_answer) == (False, True)
        assert first.metrics == ["f1", "exact"] and "best_f1" in second.metrics
        assert read_examples(first, "valid")[0].label == Answers(("cat",), (2,))
        assert read_examples(second, "train")[0].label == Answers((), ())


def test_missing_official_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"SQuAD/train-v1\.1\.json, .*train-v1\.1\.json; expected"):
        load_task("squad", tmp_path)
    with pytest.raises(UserError, match=r"expected a folder with SQuAD/train-v2\.0\.json"):
        load_task("squad2", None)


def test_the_recipe_is_that_of_the_authors_code():
    for name, rate, decay in (("small", 3e-4, 0.8), ("base", 1e-4, 0.8), ("large", 5e-5, 0.9)):
        for task in ("squad", "squad2"):
            config = load_finetune(name).of(task, None, 0)
            train = config.train
            assert (train.epochs, train.max_length, train.global_batch_size) == (2, 512, 32)
            options = (config.optimizer.peak_lr, config.optimizer.layerwise_lr_decay)
            assert options == (rate, decay)
    assert load_finetune("small", ["train.max_length=128"]).of("squad", None, 0).train.epochs == 2


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"text_a": "x"}, "text_a = 'x': question_answering reads JSON files of SQuAD's shape"),
        ({"format": "tsv"}, "format = 'tsv': has no effect on question_answering"),
        ({"dataset": "squad"}, "dataset = 'squad': has no effect"),
        ({"metrics": ["best_f1"]}, "best_f1 tunes a null threshold"),
        ({"metrics": ["accuracy"]}, "'accuracy' is not a metric of question_answering"),
        ({"kind": "classification", "questions": {"stride": 3}}, "questions: only for kind"),
        ({"questions": {"stride": 0}}, "questions.stride = 0"),
    ],
)
def test_a_description_with_keys_without_effect_is_refused(tmp_path, values, part):
    splits = {"train": "a.json", "valid": "b.json"}
    description = {"kind": "question_answering", "splits": splits} | values
    (tmp_path / "t.json").write_text(json.dumps(description))
    with pytest.raises(UserError) as refused:
        load_task(str(tmp_path / "t.json"), None)
    assert part in str(refused.value)


CONTEXT = "a cat sat"
GOOD = question("q1", "who", CONTEXT, "cat")


def changed(**values):
    return GOOD | values


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ([changed(id=7)], ["data.0.paragraphs.0.qas.0.id = 7", "article 't'"]),
        ([changed(answers=[{"text": "cat"}])], ["answers.0.answer_start: missing", "'q1'"]),
        ([changed(answers=[{"text": "cat", "answer_start": -1}])], ["answer_start = -1", "'q1'"]),
        ([changed(answers=[{"text": "cat", "answer_start": 2.0}])], ["answer_start = 2.0"]),
        ([changed(answers=[{"text": " ", "answer_start": 1}])], ["'q1'", "answers.0.text = ' '"]),
        ([GOOD, GOOD], ["paragraph 0", "'q1': the id occurs twice"]),
        ([question("q1", "who", CONTEXT)], ["is_impossible = true; expected an answer", "squad2"]),
        ([changed(answers=[])], ["'q1': answers = []; expected at least one answer"]),
        ([{"id": "q1", "question": "who"}], ["'q1': no key answers"]),
        ([], ["contains no question"]),
        ([changed(answers=[{"text": "cat", "answer_start": 3}])], ["1 of 1 questions", "'cat'"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_place(tmp_path, asked, parts):
    with pytest.raises(UserError) as refused:
        read_examples(own(tmp_path, paragraph(CONTEXT, *asked)), "train")
    message = str(refused.value)
    assert message.startswith(str(tmp_path / "train.json"))
    for part in (*parts, "expected" if asked else "complete"):
        assert part in message, message


def test_an_impossible_question_with_answers_is_refused(tmp_path):
    task = own(tmp_path, paragraph(CONTEXT, changed(is_impossible=True)), no_answer=True)
    with pytest.raises(UserError, match="is_impossible = true with 1 answers"):
        read_examples(task, "train")


def test_a_file_of_another_shape_is_refused(tmp_path):
    task = own(tmp_path, paragraph(CONTEXT, GOOD))
    (tmp_path / "train.json").write_text('[{"question": "x"}]')
    with pytest.raises(UserError, match=r"train\.json: .*expected a JSON file of SQuAD's shape"):
        read_examples(task, "train")
    content = {"data": [article(paragraph(CONTEXT, GOOD), title="Łódź")]}
    (tmp_path / "train.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert read_examples(task, "train")[0].key == "q1"  # with a byte order mark


def test_hidden_answers_are_no_label_and_the_second_answer_may_be_at_its_place(tmp_path):
    hidden = {"id": "h", "question": "who"}, {"id": "i", "question": "who", "answers": []}
    second = changed(answers=[{"text": "cat", "answer_start": 0}, *GOOD["answers"]], id="q2")
    task = own(tmp_path, paragraph(CONTEXT, GOOD, second))
    write_file(tmp_path / "test.json", paragraph(CONTEXT, *hidden))
    for no_answer in (False, True):
        settings = task.questions.model_copy(update={"no_answer": no_answer})
        files = {"splits": task.splits | {"test": "test.json"}, "questions": settings}
        given = read_examples(task.model_copy(update=files), "test")
        assert [example.label for example in given] == [None, None]
    examples = read_examples(task, "train")
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    first, other = encode(examples, task, tokenizer, 24)
    assert first.label == other.label != [0, 0]


def test_misplaced_answers_are_not_scored_in_training_and_are_counted(tmp_path):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    context = " ".join(run_folders.VOCABULARY[5:15])
    good = [question(f"g{n}", "aa", context, "ab") for n in range(3)]
    bad = question("bad", "aa", context, "ac") | {"answers": [{"text": "ac", "answer_start": 0}]}
    partial = question("part", "aa", context, "d")  # a part of the token ad
    task = own(tmp_path, paragraph(context, *good, bad, partial))
    examples = read_examples(task, "train")
    encoded = encode(examples, task, tokenizer, 24)
    assert [row.label for row in encoded][3] == [-1, -1]
    batches = micro_batches(np.arange(len(encoded)), 3, 3, encoded, 0, task.kind)
    weights = [batch.weights.sum(1).tolist() for batch in batches]
    assert weights == [[2, 2, 2], [0, 2], [0]]  # the last micro-batch is empty
    notes = split_notes(task, "train", examples, encoded, tokenizer)
    assert any("1 of 5 questions are not trained on" in note and "'bad'" in note for note in notes)
    assert any("20.0 % of the questions have an answer that begins" in note for note in notes)
    assert not any(
        "not trained" in x for x in split_notes(task, "valid", examples, encoded, tokenizer)
    )


def test_cut_questions_and_long_answers_are_noted(tmp_path):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    words = run_folders.VOCABULARY[5:65]
    context = " ".join(words)
    asked = [
        question("long", " ".join(words), context, words[0]),
        question("wide", "aa", context, " ".join(words[3:40])),
    ]
    task = own(tmp_path, paragraph(context, *asked), max_question_tokens=5)
    examples = read_examples(task, "train")
    encoded = encode(examples, task, tokenizer, 24)
    assert max(row.second_start for row in encoded) == 7
    notes = "\n".join(split_notes(task, "train", examples, encoded, tokenizer))
    assert "50.0 % of the questions are longer than 5 tokens" in notes
    assert "complete in no window of train.max_length tokens" in notes and "'wide'" in notes
    assert "have an answer of more than 30 tokens" in notes


# -------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("architecture", ["electra", "modernbert", "deberta_v2"])
def test_the_loss_is_the_cross_entropy_over_cls_and_context_padded_and_packed(
    tmp_path, architecture
):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    words = run_folders.VOCABULARY[5:25]
    asked = []
    for size in (1, 4, 9, 20):
        context = " ".join(words[:size])
        asked.append(paragraph(context, question(str(size), "ab ac", context, words[size - 1])))
    asked.append(paragraph("ab ac", question("none", "ad", "ab ac")))
    task = own(tmp_path, *asked, no_answer=True)
    encoded = encode(read_examples(task, "train"), task, tokenizer, 24)
    module = run_folders.drawn(SpanClassifier(run_folders.config(architecture=architecture).model))
    found = []
    for packed in (False, True):
        batch = collate(encoded, 0, task.kind, packed)
        module.zero_grad()
        loss = module(batch).total
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in module.parameters())])
        logits = module(batch, predict=True)
        expected = 0.0
        for row, start in zip(encoded, batch.cls_positions.tolist(), strict=True):
            own_logits = logits[start : start + len(row.ids)]
            kept = [0, *range(row.second_start, len(row.ids))]
            for side in (0, 1):
                target = torch.tensor(kept.index(row.label[side]))
                expected += torch.nn.functional.cross_entropy(own_logits[kept, side], target)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * largest)
    empty = module(collate([], 0, task.kind)).total
    empty.backward()
    assert empty.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
