"""Starts runs with random engine files, and compares `check` with `pretrain`: accepted_runs.py
DATA OUT SEED COUNT. Prints one JSON line per file: values, verdicts of both."""

import json
import random
import sys
from pathlib import Path
from typing import Any

from small_run import SMALL_MODEL

from electra_ds.cluster.launchers import find_ranks
from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.data.dataset import open_data
from electra_ds.reporting.check import check
from electra_ds.training.attempt import AttemptOptions
from electra_ds.training.engine import start
from electra_ds.training.pretrain import pretrain_on_ranks

SETS = [
    *SMALL_MODEL,
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.total_steps=1",
    "train.eval_rows=4",
    "optimizer.warmup_steps=0",
    "logging.tensorboard=false",
]
VALUES = [True, False, None, 0, 1, 2, 3, -1, 64, 5e8, 1e30, "auto", "cpu", "bf16", [], {}]
ZERO_KEYS = [
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "overlap_comm",
    "parameter_alignment",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_allgather_sequential",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "stage3_use_all_reduce_for_fetch_params",
    "elastic_checkpoint",
    "offload_optimizer",
    "overlap_com",
    "zero_hpz_partition_size",
    "legacy_stage1",
    "leaf_module",
]
TOP_KEYS = [
    "communication_data_type",
    "data_types",
    "disable_allgather",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "amp",
    "tensorboard",
    "sparse_attention",
    "comms_logger",
    "train_batch_size",
]


def engine(dice: random.Random) -> dict[str, Any]:
    """An engine file with a few random keys; about half of them are valid."""
    zero: dict[str, Any] = {"stage": dice.choice([0, 1, 2, 3])}
    for key in dice.sample(ZERO_KEYS, dice.choice([0, 1, 1, 2])):
        zero[key] = dice.choice(VALUES)
    values: dict[str, Any] = {"zero_optimization": zero}
    for key in dice.sample(TOP_KEYS, dice.choice([0, 0, 1])):
        values[key] = dice.choice(VALUES)
    kind = dice.choice([None, None, "bf16", "torch_autocast"])
    return values if kind is None else values | {kind: {"enabled": dice.choice([True, False])}}


def verdict(act: Any) -> str:
    """ "" if the function returns, else its UserError. Other errors end the process."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def main(data: Path, out: Path, seed: int, count: int) -> None:
    """Compare `count` files. An error other than UserError ends this process with a traceback."""
    ranks = find_ranks()
    device = start(ranks, 2.0)
    dice = random.Random(seed)
    for number in range(count):
        values = engine(dice)
        config = load_run("tiny", [*SETS, f"engine={json.dumps(values)}"])
        checked = verdict(lambda config=config: check(config, ranks.world_size, open_data(data)))
        folder = out / f"{seed}-{number}"
        arguments = (config, data, folder, ranks, device, AttemptOptions())
        trained = verdict(lambda arguments=arguments: pretrain_on_ranks(*arguments))
        print(json.dumps({"values": values, "check": checked, "pretrain": trained}), flush=True)


main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
