"""Scenarios: optimizers other than Adam, against their formulas, stopped, resumed and moved."""

import functools
import re

import scenario_tools
from known_gradients import known_steps
from safetensors.torch import save_file
from scenario_tools import copy, here, note, train
from small_run import STAGES

OPTIMIZERS = ("muon", "stable_adamw", "lamb")
FEW_STEPS = "train.total_steps=6"
finish = functools.partial(scenario_tools.finish, preset="modern-tiny")
stop = functools.partial(scenario_tools.stop, preset="modern-tiny", at=3)
# kind -> settings of its formula that are not the defaults
VARIANTS = {
    "adam": (),
    "muon": ("optimizer.bias_correction=true",),
    "muon-spectral": (
        "optimizer.muon_adjust=spectral",
        "optimizer.muon_momentum=0.8",
        "optimizer.muon_ns_steps=3",
        "optimizer.muon_lr_scale=0.5",
    ),
    "stable_adamw": ("optimizer.bias_correction=true",),
    "stable_adamw-raw": (),
    "lamb": ("optimizer.bias_correction=true",),
    "lamb-raw": (),
}
# Engines of the runs that are stopped and resumed.
ENGINES = {kind: ("zero1-fp32", "zero3-fp32") for kind in OPTIMIZERS}
ENGINES["muon"] = (*ENGINES["muon"], "zero2-bf16")
# VARIANT-zSTAGE-PRECISION of the steps on two ranks; one rank takes those at stage 1 in fp32.
CASES = [
    f"{kind}-z{stage}-{precision}"
    for kind in OPTIMIZERS
    for stage in STAGES
    for precision in ("fp32", "autocast", "bf16", "fp16")
]
CASES += [f"{variant}-z1-fp32" for variant in VARIANTS if variant not in OPTIMIZERS]


def formulas() -> None:
    """Steps with known gradients at every stage and precision; variants at stage 1."""
    on_one = [f"{kind}-z1-fp32" for kind in OPTIMIZERS]
    for case in CASES if here.world_size > 1 else on_one:
        variant, stage, precision = re.fullmatch("(.+)-z(.)-(.+)", case).groups()
        found = known_steps(stage, precision, variant.partition("-")[0], *VARIANTS[variant])
        if here.rank == 0:
            save_file(found, here.outs / f"formula-{case}-{here.world_size}.safetensors")


def optimizers() -> None:
    """Whole, stopped and resumed, moved to another stage; refused with another optimizer."""
    for kind in OPTIMIZERS:
        setting = (FEW_STEPS, f"optimizer.kind={kind}")
        for engine in ENGINES[kind]:
            finish(f"{kind}-{engine}", engine, *setting)
            stop(f"{kind}-cut-{engine}", engine, *setting)
            if engine == "zero1-fp32":
                copy(f"{kind}-cut-{engine}", f"{kind}-for-one")
            finish(f"{kind}-cut-{engine}", engine, *setting)
        stop(f"{kind}-moved", "zero0-fp32", *setting)
        finish(f"{kind}-moved", "zero2-fp32", *setting)
    copy("muon-for-one", "muon-refused")
    start = {"init_from": here.outs / "muon-zero1-fp32"}
    found = {"kind": train("muon-refused", "zero1-fp32", FEW_STEPS, preset="modern-tiny")}
    finish("adam-from-muon", "zero1-fp32", FEW_STEPS, **start)
    note("optimizers", found)


def optimizers_on_one_rank() -> None:
    """The stopped runs of two ranks."""
    for kind in OPTIMIZERS:
        finish(f"{kind}-for-one", "zero0-fp32", FEW_STEPS, f"optimizer.kind={kind}")
