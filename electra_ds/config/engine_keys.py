"""Schema of engine files: the DeepSpeed keys that are accepted, with types and limits.

This is an allow-list. Some keys of DeepSpeed import a module by name (lower_precision_safe_modules,
leaf_module), write files or folders (monitors, output_file of flops_profiler, offload to NVMe) or
open network connections (wandb, comet). An engine section may come from the config.json of another
person's run, so none of these keys is accepted. Values that DeepSpeed rejects, or with which the
first step fails, are not accepted either, so that `check` finds them before `pretrain` starts.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from electra_ds.common.json_files import Record

MAX_ELEMENTS = 2**33  # of a bucket; DeepSpeed allocates a whole bucket at once


def _integral(value: Any) -> Any:
    """Return a whole float as an int: bucket sizes are often written as 5e8, a float in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
Elements = Annotated[int, BeforeValidator(_integral), Field(ge=0, le=2**62)]
Bucket = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=MAX_ELEMENTS)]
# DeepSpeed refuses odd sizes of the gather buckets of stages 1 and 2.
EvenBucket = Annotated[Bucket, Field(multiple_of=2)]
DataType = Literal["fp32", "fp16", "bf16"]
# Keys that are refused at any depth -> the reason, for the message.
REFUSED = {
    "aio": "offload to NVMe is not supported",
    "comet": "it opens a network connection; metrics.jsonl and OUT/tensorboard have the metrics",
    "csv_monitor": "it writes to any folder; metrics.jsonl and OUT/tensorboard have the metrics",
    "leaf_module": "it imports modules by name",
    "lower_precision_safe_modules": "it imports modules by name",
    "nvme_path": "offload to NVMe is not supported; it removes and writes folders",
    "output_file": "it writes to any file; the profile is printed",
    "tensorboard": "it writes to any folder; OUT/tensorboard has the metrics (logging.tensorboard)",
    "wandb": "it opens a network connection; metrics.jsonl and OUT/tensorboard have the metrics",
}


class OffloadKeys(Record):
    """Keys that zero_optimization.offload_optimizer and offload_param have in common."""

    device: Literal["cpu", "none"]
    pin_memory: bool = True


class OffloadOptimizerKeys(OffloadKeys):
    """Keys of zero_optimization.offload_optimizer."""

    ratio: float = Field(default=1.0, ge=0, le=1)


class OffloadParamKeys(OffloadKeys):
    """Keys of zero_optimization.offload_param."""

    max_in_cpu: Elements = 10**9


class ZeroKeys(Record):
    """Keys of zero_optimization."""

    stage: Integer = Field(default=0, ge=0, le=3)
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Bucket = 5 * 10**8
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: EvenBucket = 5 * 10**8
    overlap_comm: bool | None = None
    compute_grad_norm: Literal[True] = True
    # If it is true, DeepSpeed returns the tensors of other parameters when several ranks write a
    # checkpoint.
    round_robin_gradients: Literal[False] = False
    parameter_alignment: bool = False
    ignore_unused_parameters: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    sub_group_size: Bucket = 10**9
    stage3_prefetch_bucket_size: Elements = 5 * 10**7
    stage3_param_persistence_threshold: Elements = 10**5
    stage3_model_persistence_threshold: Elements = 2**62
    stage3_max_live_parameters: Elements = 10**9
    stage3_max_reuse_distance: Elements = 10**9
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    stage3_gather_16bit_weights_on_model_save: bool = False
    offload_optimizer: OffloadOptimizerKeys | None = None
    offload_param: OffloadParamKeys | None = None

    @model_validator(mode="after")
    def _options_fit_the_stage(self) -> "ZeroKeys":
        optimizer, weights = self.offload_optimizer, self.offload_param
        if optimizer and optimizer.device == "cpu" and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3; found stage 0")
        if weights and weights.device == "cpu" and self.stage != 3:
            raise ValueError(f"offload_param needs stage 3; found stage {self.stage}")
        if optimizer and optimizer.ratio < 1 and self.stage != 3:
            raise ValueError(
                f"offload_optimizer.ratio below 1 needs stage 3; found stage {self.stage}"
            )
        return self


class Bf16Keys(Record):
    """Keys of bf16."""

    enabled: bool | Literal["auto"] = False
    immediate_grad_update: bool = False
    check_grad_overflow: Literal[True] = True


class Fp16Keys(Record):
    """Keys of fp16."""

    enabled: bool | Literal["auto"] = False
    loss_scale: float = Field(default=0, ge=0, le=2**32)
    initial_scale_power: int = Field(default=16, ge=0, le=32)
    loss_scale_window: int = Field(default=1000, ge=1, le=2**31)
    hysteresis: int = Field(default=2, ge=1, le=2**31)
    consecutive_hysteresis: bool = False
    min_loss_scale: Integer = Field(default=1, ge=1, le=2**32)


class AutocastKeys(Record):
    """Keys of torch_autocast. fp16 needs loss scaling, so it has the section fp16 instead."""

    enabled: bool = False
    dtype: Literal["bfloat16", "torch.bfloat16"] = "bfloat16"


class CommsLoggerKeys(Record):
    """Keys of comms_logger, which prints the times of collectives."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: tuple[str, ...] = ()
    verbose: bool = False
    debug: bool = False


class FlopsProfilerKeys(Record):
    """Keys of flops_profiler, which prints the floating-point operations of one step."""

    enabled: bool = False
    recompute_fwd_factor: float = Field(default=0.0, ge=0, le=10)
    profile_step: int = Field(default=1, ge=1, le=2**31)
    # All levels: a number above the depth of the model ends the run with a KeyError in DeepSpeed.
    module_depth: Literal[-1] = -1
    top_modules: int = Field(default=1, ge=1, le=1000)
    detailed: bool = True


class DataTypeKeys(Record):
    """Keys of data_types."""

    grad_accum_dtype: DataType | None = None


class EngineKeys(Record):
    """Keys of an engine file. The run config owns batch sizes, clipping and optimizer."""

    zero_optimization: ZeroKeys = ZeroKeys()
    bf16: Bf16Keys = Bf16Keys()
    fp16: Fp16Keys = Fp16Keys()
    torch_autocast: AutocastKeys = AutocastKeys()
    communication_data_type: DataType | None = None
    data_types: DataTypeKeys = DataTypeKeys()
    disable_allgather: bool = False
    gradient_predivide_factor: float = Field(default=1.0, gt=0, le=1e6)
    prescale_gradients: bool = False
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = True
    comms_logger: CommsLoggerKeys = CommsLoggerKeys()
    flops_profiler: FlopsProfilerKeys = FlopsProfilerKeys()
    dump_state: bool = False
    memory_breakdown: bool = False
    steps_per_print: int | None = Field(default=None, ge=1, le=2**31)
    wall_clock_breakdown: bool = False

    @model_validator(mode="after")
    def _options_fit_the_stage(self) -> "EngineKeys":
        stage = self.zero_optimization.stage
        if self.data_types.grad_accum_dtype is not None and stage == 0:
            raise ValueError("data_types.grad_accum_dtype needs stage 1, 2 or 3; found stage 0")
        if stage == 3 and (self.prescale_gradients or self.gradient_predivide_factor != 1):
            raise ValueError(
                "prescale_gradients and gradient_predivide_factor need stage 0, 1 or 2; found "
                "stage 3"
            )
        return self
