"""Scenarios: the architecture deberta_v2 at every ZeRO stage, resumed, of every kind.

Runs of 6 steps; the stopped ones are cut at step 3.
"""

import functools

import scenario_tools
from scenario_tools import copy
from small_run import STAGES

DEBERTA_STEPS, DEBERTA_CUT = 6, 3
FEW_STEPS = f"train.total_steps={DEBERTA_STEPS}"
finish = functools.partial(scenario_tools.finish, preset="deberta-tiny")
stop = functools.partial(scenario_tools.stop, preset="deberta-tiny", at=DEBERTA_CUT)
KINDS = ("electra_15", "mlm", "replace_mlm", "all_tokens_mlm", "uniform")
DROPOUT = [
    f"{part}.{kind}_dropout=0.1"
    for part in ("model", "generator")
    for kind in ("hidden", "attention")
]
# name -> settings of runs that are stopped and resumed at one stage
RESUMED = {
    "dropout": (1, DROPOUT),
    "untied": (3, ["model.sharing=untied", "generator.hidden_size=16"]),
    "all": (2, ["model.sharing=all", "generator.ffn_size=48", "generator.num_layers=2"]),
    "recomputed": (1, [*DROPOUT, "train.activation_checkpointing=true"]),
}


def deberta() -> None:
    """Whole, stopped and resumed at every stage; with dropout, other sharing and recomputation."""
    for stage in STAGES:
        finish(f"deberta-full-z{stage}", f"zero{stage}-fp32", FEW_STEPS)
        stop(f"deberta-cut-z{stage}", f"zero{stage}-fp32", FEW_STEPS)
        if stage == 2:
            copy("deberta-cut-z2", "deberta-for-one")
        finish(f"deberta-cut-z{stage}", f"zero{stage}-fp32", FEW_STEPS)
    for name, (stage, sets) in RESUMED.items():
        finish(f"deberta-{name}-full", f"zero{stage}-fp32", FEW_STEPS, *sets)
        stop(f"deberta-{name}-cut", f"zero{stage}-fp32", FEW_STEPS, *sets)
        finish(f"deberta-{name}-cut", f"zero{stage}-fp32", FEW_STEPS, *sets)
    for stage in (1, 3):
        finish(f"deberta-bf16-z{stage}", f"zero{stage}-bf16", FEW_STEPS)


def deberta_kinds() -> None:
    """Every other kind of objective, stopped at one stage and resumed at another."""
    for kind in KINDS:
        setting = "objective.generator=uniform" if kind == "uniform" else f"objective.kind={kind}"
        stop(f"deberta-{kind}", "zero2-fp32", FEW_STEPS, setting)
        finish(f"deberta-{kind}", "zero3-fp32", FEW_STEPS, setting)


def deberta_on_one_rank() -> None:
    """Whole, and the stopped run of two ranks."""
    finish("deberta-one", "zero0-fp32", FEW_STEPS)
    finish("deberta-for-one", "zero0-fp32", FEW_STEPS)
