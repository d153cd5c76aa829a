"""DeepSpeed engine files: names, checks, keys that the run config owns."""

from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json
from electra_ds.common.suggestions import nearest
from electra_ds.config.loading import find_config

# What a DeepSpeed file may hold. DeepSpeed ignores an unknown top-level key silently, so a misspelled one stops here.
ENGINE_KEYS = {
    "zero_optimization",
    "bf16",
    "fp16",
    "torch_autocast",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "comet",
    "aio",
    "data_types",
    "disable_allgather",
    "timers",
    "steps_per_print",
}
PRECISIONS = ("fp16", "bf16", "torch_autocast")
# Numbers the run owns: the same key in both files would have two owners.
ENGINE_OWNERS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "derived from train.global_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "section optimizer",
    "scheduler": "section optimizer",
    "activation_checkpointing": "train.activation_checkpointing",
}


def load_engine(engine: str | dict) -> dict:
    """The DeepSpeed config of a name, path or object, checked, not yet merged with what the run owns.

    Raises UserError for unknown keys, keys the run owns, and blocks that DeepSpeed 0.19 removed.
    """
    if isinstance(engine, str):
        path = find_config(engine, "engine")
        where, values = str(path), read_json(path, "a DeepSpeed config")
    else:
        where, values = "engine", engine
    for key in values:
        if key in ENGINE_OWNERS:
            raise UserError(
                f"{where}: {key} belongs to the run config ({ENGINE_OWNERS[key]}): remove it here"
            )
        if key not in ENGINE_KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, sorted(ENGINE_KEYS))}")
    for key in ("zero_optimization", *PRECISIONS):
        if not isinstance(values.get(key, {}), dict):
            raise UserError(f"{where}: {key} = {values[key]!r}; expected a JSON object")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{where}: zero_optimization.stage = {stage!r}; expected 0, 1, 2 or 3")
    if values.get("torch_autocast", {}).get("dtype", "bfloat16") not in (
        "bfloat16",
        "torch.bfloat16",
    ):
        raise UserError(
            f'{where}: torch_autocast.dtype must be "bfloat16"; for fp16 use the fp16 block'
        )
    for block, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if values.get(block, {}).get(key) is False:
            raise UserError(
                f"{where}: {block}.{key} must stay true, or weights are reached by what is not finite"
            )
    switches = {kind: values.get(kind, {}).get("enabled", False) for kind in PRECISIONS}
    for kind, enabled in switches.items():
        if not (isinstance(enabled, bool) or (enabled == "auto" and kind != "torch_autocast")):
            raise UserError(
                f'{where}: {kind}.enabled = {enabled!r}; expected true, false or (bf16, fp16) "auto"'
            )
    chosen = [kind for kind, enabled in switches.items() if enabled]
    if len(chosen) > 1 and any(
        enabled is True for enabled in switches.values()
    ):  # two "auto" are one choice
        raise UserError(f"{where}: {' and '.join(chosen)} are both enabled; choose one precision")
    return values
