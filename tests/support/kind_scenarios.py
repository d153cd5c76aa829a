"""Scenarios: every other kind of objective, and encoders of a factory."""

import json

from scenario_tools import SMALL, finish, here, stop
from small_run import CUT

from electra_ds.config.loading import find_config, load_run
from electra_ds.training.attempt import AttemptOptions
from electra_ds.training.pretrain import pretrain_on_ranks


def kinds() -> None:
    """Every other kind of objective: whole at one stage; stopped at another, resumed at a third."""
    for kind in ("electra_15", "mlm", "replace_mlm", "all_tokens_mlm", "uniform"):
        setting = "objective.generator=uniform" if kind == "uniform" else f"objective.kind={kind}"
        finish(f"{kind}-whole", "zero0-fp32", setting)
        stop(f"{kind}-moved", "zero2-fp32", setting)
        finish(f"{kind}-moved", "zero3-fp32", setting)


def own_encoders() -> None:
    """model.factory at ZeRO 2 with a layer of the discriminator: whole, stopped and resumed."""
    values = json.loads(find_config("tiny", "pretrain").read_text())
    factory = {
        "factory": "own_pair:build",
        "options": {"width": 16},
        "discr_dim": 16,
        "discr_layer": "conv",
    }
    values |= {"model": factory, "engine": "zero2-fp32"}
    del values["generator"]
    file = here.outs / f"own-{here.rank}.json"
    file.write_text(json.dumps(values))
    sets = [line for line in SMALL if not line.startswith(("model.", "generator."))]
    for name, options in (
        ("own-whole", AttemptOptions()),
        ("own-cut", AttemptOptions(stop_at_step=CUT)),
        ("own-cut", AttemptOptions()),
    ):
        config, out = load_run(str(file), sets), here.outs / name
        ended = pretrain_on_ranks(config, here.data, out, here.ranks, here.device, options)
        assert ended in (0, 85)
