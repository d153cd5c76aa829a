"""Scenarios: the architecture modernbert at every ZeRO stage, resumed, continued with other sizes.

Runs of 6 steps; the stopped ones are cut at step 3.
"""

import functools

import scenario_tools
from scenario_tools import copy, note, train
from small_run import STAGES

MODERN_STEPS, MODERN_CUT = 6, 3
FEW_STEPS = f"train.total_steps={MODERN_STEPS}"
finish = functools.partial(scenario_tools.finish, preset="modern-tiny")
stop = functools.partial(scenario_tools.stop, preset="modern-tiny", at=MODERN_CUT)
KINDS = ("electra_15", "mlm", "replace_mlm", "all_tokens_mlm", "uniform")
DROPOUT = [
    f"{part}.{kind}_dropout=0.1"
    for part in ("model", "generator")
    for kind in ("embedding", "attention", "mlp")
]
# name -> settings of runs that are stopped and resumed at one stage
RESUMED = {
    "dropout": (1, DROPOUT),
    "untied": (3, ["model.sharing=untied", "generator.hidden_size=16"]),
    "all": (2, ["model.sharing=all", "generator.ffn_size=24"]),
    "recomputed": (1, [*DROPOUT, "train.activation_checkpointing=true"]),
}


def modern() -> None:
    """Whole, stopped and resumed at every stage; with dropout, other sharing and recomputation."""
    for stage in STAGES:
        finish(f"modern-full-z{stage}", f"zero{stage}-fp32", FEW_STEPS)
        stop(f"modern-cut-z{stage}", f"zero{stage}-fp32", FEW_STEPS)
        if stage == 2:
            copy("modern-cut-z2", "modern-for-one")
            copy("modern-cut-z2", "modern-stopped")
        finish(f"modern-cut-z{stage}", f"zero{stage}-fp32", FEW_STEPS)
    for name, (stage, sets) in RESUMED.items():
        finish(f"modern-{name}-full", f"zero{stage}-fp32", FEW_STEPS, *sets)
        stop(f"modern-{name}-cut", f"zero{stage}-fp32", FEW_STEPS, *sets)
        finish(f"modern-{name}-cut", f"zero{stage}-fp32", FEW_STEPS, *sets)
    for stage in (1, 3):
        finish(f"modern-bf16-z{stage}", f"zero{stage}-bf16", FEW_STEPS)
    longer = ["model.max_positions=16384", "model.global_theta=160000", "model.local_theta=20000"]
    run = scenario_tools.here.outs / "modern-full-z0"
    finish("modern-longer", "zero2-fp32", FEW_STEPS, *longer, init_from=run)


def modern_refused() -> None:
    """Resumes and starts with another architecture, and with another window."""
    run = scenario_tools.here.outs / "modern-stopped"
    zero1, window = ("zero1-fp32", FEW_STEPS), "model.local_attention=16"
    found = {
        "resume": train("modern-stopped", *zero1),
        "start": train("modern-from", *zero1, init_from=run),
        "window": train("modern-stopped", *zero1, window, preset="modern-tiny"),
    }
    note("modern-refused", found)


def modern_kinds() -> None:
    """Every other kind of objective, stopped at one stage and resumed at another."""
    for kind in KINDS:
        setting = "objective.generator=uniform" if kind == "uniform" else f"objective.kind={kind}"
        stop(f"modern-{kind}", "zero2-fp32", FEW_STEPS, setting)
        finish(f"modern-{kind}", "zero3-fp32", FEW_STEPS, setting)


def modern_on_one_rank() -> None:
    """Whole, and the stopped run of two ranks; every other kind."""
    finish("modern-one", "zero0-fp32", FEW_STEPS)
    finish("modern-for-one", "zero0-fp32", FEW_STEPS)
