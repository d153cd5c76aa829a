"""The DeepSpeed engine: start of the ranks, forward, backward, step, full tensors.

This is the only file that imports deepspeed. tests/training/test_ranks_train.py tests at every ZeRO
stage the private names of DeepSpeed 0.19 that it uses:
ops.__compatible_ops__, parameter._hp_mapping, engine.enable_backward_allreduce,
engine._config (batch sizes) and optimizer.gradient_accumulation_steps (another phase),
FP16_UnfusedOptimizer.fp16_groups and fp32_groups (stage 0),
optimizer._hp_optimizer_states_linked and _lazy_init_hp_params_optimizer_state (stages 1 and 2),
optimizer.fp32_partitioned_groups_flat, sub_group_to_group_id and
parameter_offload.FWD_MODULE_STACK (stage 3). training/pieces.py lists more.
"""

import contextlib
import ctypes
import datetime
import faulthandler
import gc
import math
import os
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from electra_ds.cluster.launchers import Ranks, check_address
from electra_ds.common.errors import UserError
from electra_ds.config.engine_files import offloads_optimizer
from electra_ds.model.encoder import hidden_matrices
from electra_ds.model.weights import true_rows
from electra_ds.training import pieces
from electra_ds.training.collectives import ControlGroup, collective, gloo_group
from electra_ds.training.frozen_modules import FrozenModules
from electra_ds.training.muon import Muon
from electra_ds.training.optimizer import AdamW, make_state, moments_of, parameter_groups
from electra_ds.training.per_tensor import Lamb, StableAdamW
from electra_ds.training.precision import EngineConfig, resolve_precision

AnyBatch = TypeVar("AnyBatch", bound=NamedTuple)  # of tensors or None

# DeepSpeed's throughput timer waits for the device at every forward and every step; its output is
# not used here.
NO_TIMER = {"timers": {"throughput": {"enabled": False}}}
# Options of stages 1 and 2 for a single rank, which reduces no gradients. They avoid the copies
# into buckets, the memory of the buckets and a wait for the device. The results are bitwise equal.
# The copies take 11 of the 33 ms that stage 1 adds to a step of `small` on one core. With an
# offloaded optimizer the options are not used: the buckets are copied to the host during backward.
SINGLE_RANK_ZERO = {"overlap_comm": False, "reduce_scatter": False, "contiguous_gradients": False}
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class StepResult(NamedTuple):
    """Result of `Engine.step`, equal on every rank."""

    applied: bool  # whether the weights were changed
    grad_norm: (
        Tensor | float
    )  # before clipping, 0-d on the device (reading it waits); NaN if skipped
    loss_scale: float  # of fp16; 1 otherwise


@collective
def start(ranks: Ranks, timeout_minutes: float, deterministic: bool = False) -> torch.device:
    """Select the device and initialize torch.distributed (NCCL on CUDA, gloo on a CPU). Collective.

    It is called once per process, before the first `Engine`. Afterwards SIGUSR2 prints the stacks
    of this rank.

    timeout_minutes: longest wait for another rank in a collective.
    deterministic: use deterministic kernels. An operation without one raises RuntimeError.
    Returns the device of this rank.
    Raises UserError when the world size differs from that of the launcher, or when a rank has no
    CUDA device.
    """
    faulthandler.register(signal.SIGUSR2)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    deepspeed.logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR").upper())
    if os.environ["DS_ACCELERATOR"] == "cpu":
        # Building this op takes a minute, and gloo does not use it. A process that is killed during
        # the build leaves a lock file.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device, backend = torch.device("cpu"), "gloo"
        keep_freed_memory()
        if ranks.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // ranks.local_size))
    else:
        device, backend = _cuda_device(ranks), "nccl"
        torch.cuda.set_device(device)
    if deterministic:
        _choose_deterministic_kernels()
    _meet(ranks, backend, timeout_minutes)
    if dist.get_world_size() != ranks.world_size:
        raise UserError(
            f"{ranks.launcher} set a world size of {ranks.world_size}, but torch.distributed has "
            f"{dist.get_world_size()} ranks; start each rank with the same launcher"
        )
    if ranks.world_size > 1:
        gloo_group()
        _limit_waiting(timeout_minutes)
    return device


def _meet(ranks: Ranks, backend: str, timeout_minutes: float) -> None:
    """Initialize torch.distributed. A single rank needs no port and no name of a host. Collective.

    Raises UserError when the address of rank 0 is not known, or its port is in use.
    """
    if dist.is_initialized():
        return
    import deepspeed

    timeout = datetime.timedelta(minutes=timeout_minutes)
    if ranks.world_size == 1:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)  # uses that group
        return
    check_address(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise
        raise UserError(
            f"rank {ranks.rank}: port MASTER_PORT={os.environ['MASTER_PORT']} of "
            f"{os.environ['MASTER_ADDR']} is in use by another process; choose another port"
        ) from None


def _cuda_device(ranks: Ranks) -> torch.device:
    count = torch.cuda.device_count()
    if not count or (count > 1 and ranks.local_rank >= count):
        raise UserError(
            f"local rank {ranks.local_rank} of {ranks.local_size} has {count} CUDA device(s): "
            "start one rank per device, or set DS_ACCELERATOR=cpu"
        )
    # With --gpus-per-task=1 each rank sees one device, number 0.
    index = ranks.local_rank % count
    # DeepSpeed sets the device by the first variable and compares it with the second.
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = str(index)
    return torch.device("cuda", index)


def _choose_deterministic_kernels() -> None:
    # cuBLAS reads the variable at its first matrix product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling uninitialized memory finds mistakes; it changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks for the next allocation.

    By default glibc returns them to the system, and each step spends time on page faults.
    """
    with contextlib.suppress(OSError, AttributeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(option, ctypes.c_int(2**31 - 1))


def _limit_waiting(timeout_minutes: float) -> None:
    # The timeout of init_distributed applies to the world group only. DeepSpeed creates more groups
    # with a timeout of 30 minutes.
    timeout = datetime.timedelta(minutes=timeout_minutes)
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def zero_options(zero: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Return the zero_optimization section to use with `world_size` ranks."""
    stage, offloads = zero.get("stage"), "offload_optimizer" in zero
    if world_size == 1 and stage in (1, 2) and not offloads:
        return zero | SINGLE_RANK_ZERO
    return zero


class Engine:
    """A DeepSpeed engine around a module that returns losses.

    control: collectives on the CPU, beside those of the engine.
    parameters: canonical name -> parameter of the wrapped module (an empty tensor at stage 3).
    frozen: canonical name -> tensor without padded rows, of `add_frozen`; in fp32 on rank 0, in the
        dtype of the engine on other ranks.
    optimizer_kind: optimizer.kind of the config; "adam" for a config without it.
    moments: canonical name -> names of the optimizer's tensors of the parameter.
    """

    @collective
    def __init__(
        self,
        objective: nn.Module,
        config: Any,
        engine_config: EngineConfig,
        ranks: Ranks,
        device: torch.device,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ):
        """Wrap the module. Collective.

        config: a RunConfig, or another object with `train`, `optimizer` and `accumulation`. An
            optimizer without `kind` is Adam.
        engine_config: as `config.engine_files.load_engine` returns it; the precision is resolved
        here. lr_scale: parameter name -> factor of its learning rate.
        """
        import deepspeed

        self.ranks = ranks
        self.device = device
        self.config = config
        self.accumulation: int = config.accumulation(ranks.world_size)  # of the largest step
        self.deepspeed_config = resolve_precision(engine_config, device)
        self.stage = self.deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        half = any(self.deepspeed_config.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))
        # Stage 0 with fp32 parameters neither checks for finite gradients nor reports a norm: both
        # are done here.
        self._computes_norm = self.stage == 0 and not half
        objective.to(device)
        self.optimizer_kind: str = getattr(config.optimizer, "kind", "adam")
        stacked = hidden_matrices(objective) if self.optimizer_kind == "muon" else {}
        groups = parameter_groups(objective, config.optimizer.weight_decay, lr_scale, stacked)
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        named_groups = [[names[id(parameter)] for parameter in g["params"]] for g in groups]
        self.moments = {
            name: moments_of(group)
            for group, members in zip(groups, named_groups, strict=True)
            for name in members
        }
        self.optimizer = self._make_optimizer(groups)
        self._engine, *_ = deepspeed.initialize(
            model=objective, optimizer=self.optimizer, config=self._merged_config()
        )
        if ranks.world_size == 1 and self.stage == 0:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients twice
        self.optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        self.parameters = dict(self._engine.module.named_parameters())
        self.frozen: dict[str, Tensor] = {}
        self._frozen_modules: FrozenModules | None = None
        self._half_masters: dict[str, Any] = self._find_half_masters()
        self._scaler_before_refusal: dict[str, float] = {}
        self.reset_moments(0)
        self.control = ControlGroup(ranks)
        self.all_gather_object = self.control.all_gather_object
        if hasattr(self.optimizer, "pieces"):
            self.optimizer.pieces = self._find_pieces(named_groups, stacked)
        _limit_waiting(config.train.timeout_minutes)

    def _merged_config(self) -> EngineConfig:
        """Return the engine config with batch sizes and clipping of the run config."""
        train = self.config.train
        clipping = self.config.optimizer.gradient_clipping
        # DeepSpeed divides each loss by the accumulation of its config, and `forward_backward`
        # multiplies by it, so a step may have fewer micro-batches (train.batch_schedule).
        rows = self.ranks.world_size * train.micro_batch_size * self.accumulation
        owned = {
            "train_batch_size": rows,
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0 if self._computes_norm else clipping,
            "zero_allow_untested_optimizer": True,
        }
        merged = NO_TIMER | self.deepspeed_config | owned
        zero = merged.get("zero_optimization", {})
        merged["zero_optimization"] = zero_options(zero, self.ranks.world_size)
        return merged

    def _make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        options = self.config.optimizer
        if self.optimizer_kind == "muon":
            kinds = ("bf16", "fp16", "torch_autocast")
            is_half = any(self.deepspeed_config.get(kind, {}).get("enabled") for kind in kinds)
            # On a CPU bf16 products are not faster.
            in_bf16 = is_half and self.device.type == "cuda"
            return Muon(groups, options, torch.bfloat16 if in_bf16 else torch.float32)
        if self.optimizer_kind != "adam":
            return {"stable_adamw": StableAdamW, "lamb": Lamb}[self.optimizer_kind](groups, options)
        if not offloads_optimizer(self.deepspeed_config):
            return AdamW(groups, options)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(
                groups,
                lr=0.0,
                betas=(options.beta1, options.beta2),
                eps=options.eps,
                bias_correction=options.bias_correction,
            )
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"offload_optimizer: DeepSpeed's CPU Adam cannot be compiled or loaded ({first}); "
                "it needs a C++ compiler and ninja: install both, or use an engine without offload"
            ) from error

    def use(self, config: Any) -> None:
        """Continue with the config of another phase: its batch sizes and its weight decay.

        config: a RunConfig that differs in fields that a phase may set. Weights, moments and step
        counts stay. The results are those of an engine that was made with this config.
        """
        self.config = config
        self.accumulation = config.accumulation(self.ranks.world_size)
        options = self._engine._config
        options.train_batch_size = config.train.global_batch_size
        options.train_micro_batch_size_per_gpu = config.train.micro_batch_size
        options.gradient_accumulation_steps = self.accumulation
        if hasattr(self._engine.optimizer, "gradient_accumulation_steps"):
            self._engine.optimizer.gradient_accumulation_steps = self.accumulation
        for group in self.optimizer.param_groups:
            if not group["is_vector"]:
                group["weight_decay"] = config.optimizer.weight_decay

    @collective
    def _find_pieces(
        self, groups: list[list[str]], stacked: dict[str, int]
    ) -> dict[int, pieces.Pieces]:
        """Return the parts of parameters in each tensor of the optimizer. Collective.

        groups: names of the parameters of each group of the optimizer.
        """
        trained = {name: p for name, p in self.parameters.items() if name in self.moments}
        if self.stage == 3:
            places = pieces.places_at_stage_3(self._engine.optimizer, trained, self.ranks.rank)
        elif self.stage == 0:
            masters = {name: self._half_masters.get(name, p) for name, p in trained.items()}
            places = pieces.places_of_whole(masters)
        else:
            flat = [group["params"][0] for group in self.optimizer.param_groups]
            places = pieces.places_in_groups(groups, trained, flat)
        shapes = {name: self.shape(name) for name in trained}
        rows = true_rows(self._engine.module)
        return pieces.find_pieces(places, shapes, rows, stacked, self.all_gather_object)

    def add_frozen(self, modules: nn.ModuleDict) -> None:
        """Move modules that do not train to the device, in the dtype of the trained parameters.

        Every rank holds them whole. Checkpoints contain their fp32 values, which rank 0 keeps.
        """
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        enabled = (kind for kind in kinds if self.deepspeed_config.get(kind, {}).get("enabled"))
        kind = next(enabled, None)
        dtype = kinds[kind] if kind else torch.float32
        is_saved = self.ranks.rank == 0
        self._frozen_modules = FrozenModules(modules, self.device, dtype, is_saved=is_saved)
        self.frozen = self._frozen_modules.values

    def set_frozen(self, name: str, value: Tensor) -> None:
        """Set one tensor of the modules of `add_frozen`. value: fp32, without padded rows."""
        assert self._frozen_modules is not None
        self._frozen_modules.set(name, value)

    @collective
    def forward_backward(
        self,
        micro_batches: Sequence[Any],
        first_rows: Sequence[int],
        totals: Any,
        refuses: Callable[[float], bool] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Forward and backward of this rank's micro-batches of one step. Collective.

        Gradients are reduced with the last micro-batch.

        micro_batches: NamedTuples of CPU tensors.
        first_rows: position of the first row of each micro-batch; seeds its dropout.
        totals: a NamedTuple of counts of the whole global batch, passed to the module as floats.
        refuses: called on every rank with the loss of the global batch. If it returns True, `step`
            skips the update. The call costs one wait for the other ranks and for the device.
        options: passed to the module.
        Returns the output of the module for each micro-batch, with `total` detached. The sums over
        micro-batches and ranks are the losses of the step.
        """
        self._engine.train()
        divisors = type(totals)._make(map(float, totals))
        results: list[Any] = []
        for index, (batch, first_row) in enumerate(zip(micro_batches, first_rows, strict=True)):
            is_last = index == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            self._seed_dropout(first_row)
            losses = self._engine(self.to_device(batch), divisors, **options)
            # DeepSpeed divides by accumulation and averages over ranks. The losses are divided by
            # the counts of the whole global batch already.
            factor = self.ranks.world_size * self.accumulation * self._missing_loss_scale()
            results.append(losses._replace(total=losses.total.detach()))
            if refuses is not None and is_last and refuses(self._step_loss(results)):
                # Gradients of earlier micro-batches cannot be removed after the reduction. With NaN
                # gradients every stage skips the step.
                factor = math.nan
                self._scaler_before_refusal = self.scaler_state()
            self._engine.backward(losses.total * factor)
        return results

    def _step_loss(self, results: list[Any]) -> float:
        """Return the loss of the global batch, on every rank. Waits for the device."""
        return float(self.control.sum(sum(result.total for result in results)))

    @collective
    def step(self, lr: float) -> StepResult:
        """Clip the reduced gradients and apply them if they are finite. Collective.

        lr: learning rate, before the factor of each parameter group.
        Returns a StepResult, equal on all ranks.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self._computes_norm:
            return self._checked_step()
        loss_scale = 1.0
        if "fp16" in self.deepspeed_config:
            loss_scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0))
        norm_scale = self._missing_loss_scale()
        self._engine.step()
        applied = self._engine.was_step_applied()
        self.set_scaler_state(self._scaler_before_refusal)  # a refused step does not change it
        self._scaler_before_refusal = {}
        norm = self._engine.get_global_grad_norm() / norm_scale if applied else math.nan
        return StepResult(applied, norm, loss_scale)

    def _checked_step(self) -> StepResult:
        limit = self.config.optimizer.gradient_clipping or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        # Reading the norm waits for the device, as DeepSpeed's own check does at the other stages.
        if not math.isfinite(norm):
            self._engine.zero_grad()
            return StepResult(False, math.nan, 1.0)
        self._engine.step()
        return StepResult(True, norm, 1.0)

    def _missing_loss_scale(self) -> float:
        # DeepSpeed 0.19's engine.backward does not scale the loss for the optimizer of stage 0 in
        # fp16, although that optimizer unscales the gradients and reports the norm of scaled ones.
        if self._half_masters and "fp16" in self.deepspeed_config:
            return float(self._engine.optimizer.loss_scale)
        return 1.0

    def _seed_dropout(self, first_row: int) -> None:
        # A 64-bit mix of seed and position: it depends on micro_batch_size, but not on world_size.
        mixed = (self.config.train.seed << 40) ^ first_row * 0x9E3779B97F4A7C15
        torch.manual_seed(mixed & (2**63 - 1))

    def to_device(self, batch: AnyBatch) -> AnyBatch:
        """Return a batch, a NamedTuple of CPU tensors or None, on this rank's device.

        The copy of pinned tensors is asynchronous.
        """
        if self.device.type == "cpu":
            return batch
        moved = (x if x is None else x.to(self.device, non_blocking=True) for x in batch)
        return type(batch)._make(moved)

    @property
    def module(self) -> nn.Module:
        """The wrapped objective."""
        return self._engine.module

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yield the module in eval mode, without gradients, with the autocast of the engine.

        At ZeRO stage 3 a call of the module is collective.
        """
        autocasts = bool(self.deepspeed_config.get("torch_autocast", {}).get("enabled"))
        self._engine.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=autocasts),
            ):
                yield self._engine.module
        finally:
            self._engine.train()

    @collective
    def full_tensor(self, name: str, kind: str) -> Tensor:
        """Return the full fp32 tensor of a parameter on this device. Collective at stages 1 to 3.

        kind: "master" (the weights), or one of `moments[name]`.
        The tensor may share memory with the engine. Copy it before the next step.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter: Any = self.parameters[name]
        if self._is_sharded(parameter):
            if kind == "master":
                return safe_get_full_fp32_param(parameter)
            return safe_get_full_optimizer_state(parameter, kind)
        master = self._half_masters.get(name, parameter)
        return master.detach() if kind == "master" else self.optimizer.state[master][kind]

    @collective
    def set_full_tensor(self, name: str, kind: str, value: Tensor) -> None:
        """Set the full tensor of a parameter; see `full_tensor`. Collective.

        value: the full tensor, equal on every rank. For "master" it is also copied into the
            parameter of the module.
        """
        parameter: Any = self.parameters[name]
        value = value.to(self.device, torch.float32)
        with torch.no_grad():
            if self._is_sharded(parameter):
                _set_sharded(parameter, kind, value)
            else:
                master = self._half_masters.get(name, parameter)
                target = master if kind == "master" else self.optimizer.state[master][kind]
                target.copy_(value)
            if kind == "master":
                self._set_working_copy(parameter, value)

    @collective
    def _set_working_copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.ranks.rank == 0:
                parameter.data.copy_(value)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the full parameter, which is an empty tensor at stage 3."""
        return getattr(self.parameters[name], "ds_shape", self.parameters[name].shape)

    def parameter_count(self) -> int:
        """Return the number of elements of all parameters, including rows that pad a table."""
        return sum(self.shape(name).numel() for name in self.parameters)

    def reset_moments(self, applied_steps: int) -> None:
        """Set the moments to zero, and the step counts as after `applied_steps` steps."""
        in_groups = [
            (parameter, group)
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        ]
        holder = self._engine.optimizer
        if hasattr(holder, "fp32_partitioned_groups_flat"):
            # Stage 3 puts its flat shards into the groups during a step only.
            groups, of_shard = self.optimizer.param_groups, holder.sub_group_to_group_id
            in_groups = [
                (shard, groups[of_shard[index]])
                for index, shard in enumerate(holder.fp32_partitioned_groups_flat)
            ]
        bias_correction = self.config.optimizer.bias_correction
        for parameter, group in in_groups:
            moments = moments_of(group)
            make_state(self.optimizer, parameter, applied_steps, bias_correction, moments)
        link = getattr(holder, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # stages 1 and 2: each parameter's view into the flat moments
            holder._hp_optimizer_states_linked = False
            link()

    def scaler_state(self) -> dict[str, float]:
        """Return the state of the fp16 loss scaler as numbers; empty without one."""
        scaler = self._loss_scaler()
        values = {key: getattr(scaler, key, None) for key in _SCALER_FIELDS}
        return {key: value for key, value in values.items() if isinstance(value, (int, float))}

    def set_scaler_state(self, state: dict[str, float]) -> None:
        """Set the state of the fp16 loss scaler. Does nothing without one."""
        scaler = self._loss_scaler()
        for key, value in state.items():
            if scaler is not None and key in _SCALER_FIELDS and hasattr(scaler, key):
                setattr(scaler, key, value)

    def _loss_scaler(self) -> Any:
        if "fp16" not in self.deepspeed_config:
            return None
        holder = self._engine.optimizer
        return getattr(holder, "loss_scaler", None) or getattr(holder, "loss_scale_config", None)

    def _is_sharded(self, parameter: nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")

    def _find_half_masters(self) -> dict[str, Tensor]:
        """Parameter name -> fp32 master weights, at stage 0 in half precision; else empty."""
        holder = self._engine.optimizer
        if self.stage != 0 or not hasattr(holder, "fp32_groups"):
            return {}
        masters = {
            id(low): high
            for lows, highs in zip(holder.fp16_groups, holder.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        return {name: masters[id(parameter)] for name, parameter in self.parameters.items()}

    def close(self) -> None:
        """Destroy the engine and free its memory for the next engine of this process. Collective.

        All ranks wait for each other first, because collectives fail on the other ranks when a
        process ends early.
        """
        self.control.barrier()
        self._engine.destroy()
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload

            parameter_offload.FWD_MODULE_STACK.clear()  # it refers to every wrapped module
        self._engine = None
        self.optimizer = None  # type: ignore[assignment]
        self.parameters = {}
        self.frozen, self._frozen_modules = {}, None
        self._half_masters = {}
        gc.collect()  # engine, optimizer and hooks refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _set_sharded(parameter: Any, kind: str, value: Tensor) -> None:
    from deepspeed import utils

    set_master = utils.safe_set_full_fp32_param
    set_moment = utils.safe_set_full_optimizer_state
    if hasattr(parameter, "ds_id"):
        # Stage 3 pads a parameter to a multiple of the ranks; DeepSpeed's setter of a whole tensor
        # does not.
        set_master = utils.safe_set_local_fp32_param
        set_moment = utils.safe_set_local_optimizer_state
        share = parameter.ds_tensor.ds_numel
        padded = torch.zeros(share * dist.get_world_size(), dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.flatten()
        value = padded.narrow(0, share * dist.get_rank(), share)
    if kind == "master":
        set_master(parameter, value)
    else:
        set_moment(parameter, value, kind)
