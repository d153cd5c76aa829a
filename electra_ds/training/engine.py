"""The only door to DeepSpeed: start the ranks, run a step, agree among ranks, read and set whole weights.

DeepSpeed 0.19's private names in use, held by tests/test_ranks_train.py at every stage: ops.__compatible_ops__,
parameter._hp_mapping, engine.enable_backward_allreduce, FP16_UnfusedOptimizer.fp16_groups and fp32_groups (stage 0),
optimizer._hp_optimizer_states_linked and _lazy_init_hp_params_optimizer_state (stages 1 and 2),
optimizer.fp32_partitioned_groups_flat and parameter_offload.FWD_MODULE_STACK (stage 3).
"""

import contextlib
import ctypes
import datetime
import faulthandler
import functools
import gc
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.config.schema import RunConfig
from electra_ds.training.optimizer import AdamW, make_state, parameter_groups


class Votes(NamedTuple):
    """Sums over the ranks of one control message: what the next step divides by, the votes, ranks that have written."""

    masked_count: int
    token_count: int
    stop: int
    save: int
    written: int


class StepResult(NamedTuple):
    """applied: whether the weights moved (the same on every rank). grad_norm: before clipping, 0-d and on the device,
    so that only who reads it waits; NaN when skipped."""

    applied: bool
    grad_norm: Tensor | float
    loss_scale: float


def start(ranks: Ranks, timeout_minutes: float, deterministic: bool = False) -> torch.device:
    """Pick the device, meet the other ranks (NCCL on CUDA, gloo on a CPU). Call once, before `Engine`.

    deterministic: CUDA kernels that sum in any order are replaced, or raise where there is no other.

    From here on SIGUSR2 prints the stacks of this rank: where does it hang?
    """
    faulthandler.register(signal.SIGUSR2)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    # DeepSpeed 0.19 calls collectives by names that torch 2.13 is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    deepspeed.logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR").upper())
    if os.environ["DS_ACCELERATOR"] == "cpu":
        # Building this op takes a minute, gloo training never calls it, and a process killed meanwhile leaves a lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device, backend = torch.device("cpu"), "gloo"
        keep_freed_memory()
        if ranks.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_size))
    else:
        device, backend = _cuda_device(ranks), "nccl"
        torch.cuda.set_device(device)
    if deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # read when CUDA's first matrix product runs
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # finds mistakes, changes no result
        )
    deepspeed.init_distributed(
        dist_backend=backend, timeout=datetime.timedelta(minutes=timeout_minutes), verbose=False
    )
    if dist.get_world_size() != ranks.world_size:
        raise UserError(
            f"{ranks.launcher} promised {ranks.world_size} ranks, but {dist.get_world_size()} met"
        )
    return device


def _cuda_device(ranks: Ranks) -> torch.device:
    count = torch.cuda.device_count()
    if not count or (count > 1 and ranks.local_rank >= count):
        raise UserError(
            f"local rank {ranks.local_rank} of {ranks.local_size} finds {count} CUDA device(s): start one rank per "
            "device, or set DS_ACCELERATOR=cpu"
        )
    index = (
        ranks.local_rank % count
    )  # --gpus-per-task=1 shows each rank one device, whose number is then 0
    for name in (
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ):  # DeepSpeed sets the device by the one, compares both
        if name in os.environ:
            os.environ[name] = str(index)
    return torch.device("cuda", index)


def on_rank0(read: Callable[[], Any]) -> Any:
    """What rank 0 reads or writes, on every rank, or its mistake: once, so that all decide alike. Collective.

    RunFailure on every rank when the file system fails.
    """
    found = [None, None]
    if dist.get_rank() == 0:
        try:
            found = [read(), None]
        except UserError as error:
            found = [None, error]
        except OSError as error:
            found = [None, RunFailure(f"rank 0: {error}")]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks, which else go back at once: a step that asks again pays in page faults."""
    with contextlib.suppress(OSError, AttributeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(option, ctypes.c_int(2**31 - 1))


def _limit_waiting(timeout_minutes: float) -> None:
    # init_distributed's timeout reaches the world group alone; DeepSpeed makes more, whose default is 30 minutes.
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=timeout_minutes), group)


def precision(engine_config: dict, device: torch.device) -> dict:
    """Resolve `"enabled": "auto"` for this device; returns a new dict. UserError when the precision cannot run here."""
    resolved = {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in engine_config.items()
    }
    auto = {
        kind: resolved.pop(kind)
        for kind in ("bf16", "fp16")
        if resolved.get(kind, {}).get("enabled") == "auto"
    }
    if auto and device.type == "cuda":
        kind = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        resolved[kind] = auto.get(kind, {}) | {"enabled": True}
    elif auto and cpu_multiplies_bf16():
        resolved["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if resolved.get("fp16", {}).get("enabled") and device.type == "cpu":
        raise UserError(
            "fp16.enabled = true, but this run is on a CPU, where fp16 lacks operations and speed: "
            'use bf16 or fp32, or write "bf16": {"enabled": "auto"} (engine files zero0 to zero3)'
        )
    return resolved


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has bf16 matrix instructions (DeepSpeed's CPU accelerator always claims so)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(
        flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16")
    )


def precision_name(engine_config: dict) -> str:
    """fp32, bf16, fp16 or bf16 autocast, for people."""
    names = {"bf16": "bf16", "fp16": "fp16", "torch_autocast": "bf16 autocast"}
    return next(
        (name for key, name in names.items() if engine_config.get(key, {}).get("enabled") is True),
        "fp32",
    )


# DeepSpeed's throughput timer, which nobody reads here, waits for the device at every forward and every step.
NO_TIMER = {"timers": {"throughput": {"enabled": False}}}
# For one rank at stages 1 and 2, whose gradients go nowhere: no copies into buckets and out (11 of 33 ms that stage 1
# adds to a step of Small on one core; the same bit for bit), no buckets in memory, no waiting for the device.
# Not where the optimizer is offloaded: there they go to the host, on a stream of their own beside the backward.
ALONE = {"overlap_comm": False, "reduce_scatter": False, "contiguous_gradients": False}


def zero_options(zero: dict, world_size: int) -> dict:
    """An engine's zero_optimization as this many ranks run it."""
    is_idle = world_size == 1 and zero.get("stage") in (1, 2) and "offload_optimizer" not in zero
    return zero | ALONE if is_idle else zero


class Engine:
    """A DeepSpeed engine around a module that returns losses, with the votes and whole weights that training needs."""

    def __init__(
        self,
        objective: nn.Module,
        config: RunConfig,
        engine_config: dict,
        ranks: Ranks,
        device: torch.device,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ):
        """config: a RunConfig, or whatever has its `train`, `optimizer` and `accumulation`. engine_config: as
        `config.load_engine` gives it; `precision` is resolved here. lr_scale: factor of a parameter's learning rate.
        """
        import deepspeed

        self.ranks, self.device, self.config = ranks, device, config
        self.accumulation = config.accumulation(ranks.world_size)
        self.deepspeed_config = precision(engine_config, device)
        self.stage = self.deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        half = any(self.deepspeed_config.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))
        # Stage 0 with fp32 parameters has no finite check and no norm of its own: there both are ours.
        self._own_norm = self.stage == 0 and not half
        clipping = config.optimizer.gradient_clipping
        owned = {
            "train_batch_size": config.train.global_batch_size,
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0 if self._own_norm else clipping,
            "zero_allow_untested_optimizer": True,
        }
        merged = NO_TIMER | self.deepspeed_config | owned
        merged["zero_optimization"] = zero_options(
            merged.get("zero_optimization", {}), ranks.world_size
        )
        objective.to(device)
        self.optimizer = self._make_optimizer(
            parameter_groups(objective, config.optimizer.weight_decay, lr_scale)
        )
        self._engine, *_ = deepspeed.initialize(
            model=objective, optimizer=self.optimizer, config=merged
        )
        if ranks.world_size == 1 and self.stage == 0:
            self._engine.enable_backward_allreduce = (
                False  # which copies all gradients twice, for nobody
            )
        self.optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        self.parameters = dict(self._engine.module.named_parameters())
        self._half_masters = self._find_half_masters()
        self.reset_moments(0)
        self._control_group = _control_group() if ranks.world_size > 1 else None
        self._message, self._work, self._scaler_before = None, None, {}
        _limit_waiting(config.train.timeout_minutes)

    def _make_optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        options = self.config.optimizer
        offload = self.deepspeed_config.get("zero_optimization", {}).get("offload_optimizer") or {}
        if offload.get("device", "none") == "none":
            return AdamW(groups, options)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        betas = (options.beta1, options.beta2)
        return DeepSpeedCPUAdam(
            groups, lr=0.0, betas=betas, eps=options.eps, bias_correction=options.bias_correction
        )

    # ------------------------------------------------------------------------------------------------------- the step

    def forward_backward(
        self,
        micro_batches: list[NamedTuple],
        positions: list[int],
        normalisers: tuple[float, ...],
        refuses: Callable[[float], bool] | None = None,
        **options: Any,
    ) -> list[NamedTuple]:
        """Forward and backward over this rank's micro-batches of one step; gradients are reduced with the last.

        micros: tuples of tensors. positions: row counter of each micro-batch's first row, which seeds its dropout.
        normalisers: counts of the whole global batch, passed on to the module with the options.
        refuses: asked on every rank about the step's loss, the same number; if it says so, `step` applies nothing. This
        waits for the device and for the other ranks, once before the last backward; without it nothing waits.
        Returns what the module gave per micro-batch, with the field `total`, which is differentiated, detached; the
        sums over micro-batches and ranks are the step's losses.
        """
        self._engine.train()
        results = []
        for index, (batch, position) in enumerate(zip(micro_batches, positions, strict=True)):
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            self._seed_dropout(position)
            losses = self._engine(self.to_device(batch), *map(float, normalisers), **options)
            # DeepSpeed divides by accumulation and averages over ranks; the objective's normalisers are global already.
            factor = self.ranks.world_size * self.accumulation * self._own_loss_scale()
            results.append(losses._replace(total=losses.total.detach()))
            if (
                refuses
                and index == len(micro_batches) - 1
                and refuses(float(self.sum(sum(part.total for part in results))))
            ):
                # Reduced gradients cannot be taken back, but every stage drops those that are not finite.
                factor, self._scaler_before = math.nan, self.scaler_state()
            self._engine.backward(losses.total * factor)
        return results

    def step(self, lr: float) -> StepResult:
        """Clip, check and apply the reduced gradients at learning rate `lr`. All ranks return the same result."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self._own_norm:
            norm = self._clip()
            if not math.isfinite(
                norm
            ):  # waits for the device, as DeepSpeed's own check does at the other stages
                self._engine.zero_grad()
                return StepResult(False, math.nan, 1.0)
            self._engine.step()
            return StepResult(True, norm, 1.0)
        scale = (
            getattr(self._engine.optimizer, "loss_scale", 1.0)
            if "fp16" in self.deepspeed_config
            else 1.0
        )
        scaled_by = self._own_loss_scale()
        self._engine.step()
        applied = self._engine.was_step_applied()
        self.set_scaler_state(self._scaler_before)  # a refused step says nothing of the scale
        self._scaler_before = {}
        norm = self._engine.get_global_grad_norm() / scaled_by if applied else math.nan
        return StepResult(applied, norm, float(scale))

    def _own_loss_scale(self) -> float:
        # DeepSpeed 0.19's engine.backward does not scale the loss for the optimizer of stage 0 in fp16, although that
        # one unscales the gradients (and reports the norm of the scaled ones).
        is_ours = bool(self._half_masters) and "fp16" in self.deepspeed_config
        return float(self._engine.optimizer.loss_scale) if is_ours else 1.0

    def _clip(self) -> Tensor:
        limit = self.config.optimizer.gradient_clipping or math.inf
        return nn.utils.clip_grad_norm_(self.parameters.values(), limit)

    def _seed_dropout(self, position: int) -> None:
        # A 64-bit mix of (seed, position): equal for any world size at the same micro_batch_size.
        torch.manual_seed(
            ((self.config.train.seed << 40) ^ position * 0x9E3779B97F4A7C15) & (2**63 - 1)
        )

    def to_device(self, batch: NamedTuple) -> NamedTuple:
        """A tuple of CPU tensors (or None) on this rank's device; the copy of pinned ones overlaps what runs there."""
        if self.device.type == "cpu":
            return batch
        return type(batch)(
            *(
                value if value is None else value.to(self.device, non_blocking=True)
                for value in batch
            )
        )

    @property
    def module(self) -> nn.Module:
        """The wrapped objective."""
        return self._engine.module

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The module in eval mode without gradients; a call on it is collective at ZeRO stage 3."""
        self._engine.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield self._engine.module
        finally:
            self._engine.train()

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = bool(self.deepspeed_config.get("torch_autocast", {}).get("enabled"))
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    # ---------------------------------------------------------------------------------------------------------- votes

    def send_votes(
        self, masked_count: int, token_count: int, stop: bool, save: bool, written: bool
    ) -> None:
        """Send this rank's counts of the next step and its votes; `agreed` reads the sums. Does not wait."""
        self._message = torch.tensor(
            [masked_count, token_count, stop, save, written], dtype=torch.int64
        )
        if self._control_group is not None:
            self._work = dist.all_reduce(self._message, group=self._control_group, async_op=True)

    def wait_votes(self) -> Votes:
        """Wait for the message of the last `propose`: the same numbers on every rank."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return Votes(*self._message.tolist())

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in fp64 on the CPU, in rank order (so that it is the same at any time and place)."""
        mine = tensor.detach().double().cpu()
        return (
            torch.stack(self.all_gather(mine)).sum(0) if self._control_group is not None else mine
        )

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Each rank's CPU tensor, on every rank."""
        if self._control_group is None:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.ranks.world_size)]
        dist.all_gather(found, tensor, group=self._control_group)
        return found

    def all_gather_object(self, value: Any) -> list[Any]:
        """Each rank's plain value (small), on every rank."""
        if self._control_group is None:
            return [value]
        found = [None] * self.ranks.world_size
        dist.all_gather_object(found, value, group=self._control_group)
        return found

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._control_group is not None:
            dist.barrier(group=self._control_group)

    # -------------------------------------------------------------------------------------------------- whole weights

    def full_tensor(self, name: str, kind: str) -> Tensor:
        """One parameter's fp32 `master`, `exp_avg` or `exp_avg_sq`, whole, on this device. Collective at stages 1-3."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        if self._sharded(parameter):
            if kind == "master":
                return safe_get_full_fp32_param(parameter)
            return safe_get_full_optimizer_state(parameter, kind)
        master = self._half_masters.get(name, parameter)
        return master.detach() if kind == "master" else self.optimizer.state[master][kind]

    def set_full_tensor(self, name: str, kind: str, value: Tensor) -> None:
        """The inverse of `whole`; for `master` the working copy follows. Every rank passes the same whole value."""
        parameter, value = self.parameters[name], value.to(self.device, torch.float32)
        with torch.no_grad():
            if self._sharded(parameter):
                _set_sharded(parameter, kind, value)
            else:
                master = self._half_masters.get(name, parameter)
                (master if kind == "master" else self.optimizer.state[master][kind]).copy_(value)
            if kind == "master":
                self._set_working_copy(parameter, value)

    def _set_working_copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.ranks.rank == 0:
                parameter.data.copy_(value)

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter (stage 3 keeps an empty one in its place)."""
        return getattr(self.parameters[name], "ds_shape", self.parameters[name].shape)

    def reset_moments(self, applied_steps: int) -> None:
        """Zero moments and the step count of a run that has applied so many steps."""
        in_groups = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        # Stage 3 lends its flat shards to the groups only during a step.
        for parameter in getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", in_groups):
            make_state(
                self.optimizer, parameter, applied_steps, self.config.optimizer.bias_correction
            )
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # stages 1 and 2: each parameter's view into the flat moments
            self._engine.optimizer._hp_optimizer_states_linked = False
            link()

    def scaler_state(self) -> dict[str, float]:
        """The fp16 loss scaler as plain numbers; empty where none runs."""
        scaler = self._loss_scaler()
        return {
            key: value
            for key in _SCALER_FIELDS
            if isinstance(value := getattr(scaler, key, None), (int, float))
        }

    def set_scaler_state(self, state: dict[str, float]) -> None:
        """Continue the loss scaler of a checkpoint; ignored where none runs."""
        scaler = self._loss_scaler()
        for key, value in state.items():
            if scaler is not None and hasattr(scaler, key):
                setattr(scaler, key, value)

    def _loss_scaler(self):
        if "fp16" not in self.deepspeed_config:
            return None
        holder = self._engine.optimizer
        return getattr(holder, "loss_scaler", None) or getattr(holder, "loss_scale_config", None)

    def _sharded(self, parameter: nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")

    def _find_half_masters(self) -> dict[str, Tensor]:
        holder = self._engine.optimizer
        if self.stage != 0 or not hasattr(holder, "fp32_groups"):
            return {}
        pairs = zip(holder.fp16_groups, holder.fp32_groups, strict=True)
        masters = {
            id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)
        }
        return {name: masters[id(parameter)] for name, parameter in self.parameters.items()}

    def close(self) -> None:
        """Give up the engine, together: without the barrier the first to go takes its peers down.

        Its memory is free afterwards, for the next engine of this process.
        """
        self.barrier()
        self._engine.destroy()
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload

            parameter_offload.FWD_MODULE_STACK.clear()  # keeps every module that was ever wrapped
        self._engine = self.optimizer = self.parameters = self._half_masters = None
        gc.collect()  # engine, optimizer and hooks refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@functools.cache
def _control_group() -> dist.ProcessGroup:
    """Small messages between CPUs beside NCCL; one for all engines of a process."""
    return dist.new_group(backend="gloo")


def leave() -> None:
    """Dissolve the process group, after every `Engine` is closed."""
    _control_group.cache_clear()
    dist.destroy_process_group()


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _set_sharded(parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    from deepspeed import utils

    set_master, set_moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
    if hasattr(parameter, "ds_id"):
        # Stage 3 pads a parameter to a multiple of the ranks, which DeepSpeed's own whole-tensor setter does not.
        set_master, set_moment = (
            utils.safe_set_local_fp32_param,
            utils.safe_set_local_optimizer_state,
        )
        share = parameter.ds_tensor.ds_numel
        padded = torch.zeros(share * dist.get_world_size(), dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.flatten()
        value = padded.narrow(0, share * dist.get_rank(), share)
    if kind == "master":
        set_master(parameter, value)
    else:
        set_moment(parameter, value, kind)
