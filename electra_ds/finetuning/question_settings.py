"""Settings of the task kind `question_answering`, and the keys of a task that it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from electra_ds.common.section import Section, science

if TYPE_CHECKING:
    from electra_ds.finetuning.tasks import Task

# Values of a task of questions. They are fixed, because its files have one shape. `labels` names
# the two outputs for each token.
FIXED: dict[str, Any] = {
    "text_a": "question",
    "text_b": "context",
    "label": "answers",
    "labels": ["start", "end"],
}
UNUSED = (
    "dataset",
    "dataset_config",
    "format",
    "header",
    "columns",
    "index",
    "label_range",
    "both_orders",
    "skip_short",
)
METRICS_OF_NO_ANSWER = ("best_f1", "best_exact")


class QuestionSettings(Section):
    """Key `questions` of a task: windows over long contexts, and questions without an answer.

    The defaults are those of the authors' code.
    """

    no_answer: bool = science(
        False, "some questions have no answer, as in SQuAD 2.0; the null threshold is tuned on dev"
    )
    stride: int = science(
        128,
        "tokens from the start of a window to that of the next one; at most half of the tokens of "
        "the context in a window",
        ge=1,
        le=1 << 20,
    )
    max_question_tokens: int = science(
        64, "tokens of a question; longer ones are cut", ge=1, le=1 << 20
    )
    max_answer_tokens: int = science(30, "tokens of a predicted answer", ge=1, le=1 << 20)


def check_questions(task: Task) -> None:
    """Raise ValueError for keys of a task that have no effect on its kind."""
    fields = type(task).model_fields
    if task.kind != "question_answering":
        if task.questions != QuestionSettings():
            raise ValueError(f"questions: only for kind = 'question_answering', not {task.kind!r}")
        return
    for key in UNUSED:
        value = getattr(task, key)
        if value != fields[key].default:
            raise ValueError(
                f"{key} = {value!r}: has no effect on question_answering, which reads JSON files "
                "of SQuAD's shape; remove the key"
            )
    for key, fixed in FIXED.items():
        value = getattr(task, key)
        if value not in (fixed, fields[key].default):
            raise ValueError(
                f"{key} = {value!r}: question_answering reads JSON files of SQuAD's shape, in which "
                f"it is {fixed!r}; remove the key"
            )
    if not task.questions.no_answer and (
        tuned := [name for name in task.metrics if name in METRICS_OF_NO_ANSWER]
    ):
        raise ValueError(
            f"metrics: {tuned[0]} tunes a null threshold; it needs questions.no_answer = true"
        )


def question_values(task: Task) -> dict[str, Any]:
    """Return the fixed values and the default metrics of a task of questions."""
    tuned = METRICS_OF_NO_ANSWER if task.questions.no_answer else ()
    return {**FIXED, "metrics": task.metrics or ["f1", "exact", *tuned]}
