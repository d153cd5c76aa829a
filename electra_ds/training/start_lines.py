"""The lines that `pretrain` prints before the first step."""

from electra_ds.cluster.launchers import NO_LAUNCHER
from electra_ds.common.printable import printable
from electra_ds.config.engine_files import offloads_optimizer
from electra_ds.config.schema import RunConfig
from electra_ds.training.attempt import Attempt
from electra_ds.training.engine import Engine
from electra_ds.training.phases import Phase
from electra_ds.training.precision import precision_name
from electra_ds.training.run_plan import plan_warnings
from electra_ds.training.state import TrainingState

MOST_SHOWN = 3  # later sizes of the global batch in the first line


def start_lines(attempt: Attempt, engine: Engine, state: TrainingState) -> list[str]:
    """Return the lines that rank 0 prints before the first step."""
    config, ranks, step = attempt.config, attempt.ranks, state.step
    precision = precision_name(engine.deepspeed_config)
    is_alone = ranks.launcher == NO_LAUNCHER
    launched = (
        "1 rank, no launcher" if is_alone else f"{ranks.world_size} rank(s) under {ranks.launcher}"
    )
    # Of a run with phases, the line at the beginning of each phase shows its steps.
    batch = _batch_text(config, ranks.world_size, state.attempts)
    step_text = "" if config.phases else f"a step is {batch}; "
    in_phases = f" in {len(attempt.phases)} phases" if config.phases else ""
    lines = [
        f"{engine.parameter_count():,} parameters, {launched}, ZeRO {engine.stage}, {precision}; "
        f"{step_text}{attempt.total_steps} steps{in_phases}, from step {step}"
    ]
    offloads = offloads_optimizer(engine.deepspeed_config)
    is_half = precision in ("bf16", "fp16")
    if ranks.world_size == 1 and engine.stage and not is_half and not offloads:
        name = "zero0-fp32" if precision == "fp32" else "zero0"
        lines.append(
            f"ZeRO {engine.stage} has no effect on memory with one rank: "
            f"--engine {name} is faster and needs less memory"
        )
    lines += _mixture_lines(attempt.phases)
    lines += plan_warnings(
        [phase.span for phase in attempt.phases],
        [phase.name for phase in config.phases],
        config.train.batch_schedule,
    )
    given = {"--init-from": attempt.options.init_from, "--branch-from": attempt.options.branch_from}
    lines += [
        f"WARNING: {name} {printable(path)} has no effect, because {printable(attempt.out)} has a "
        "checkpoint to resume from"
        for name, path in given.items()
        if path is not None and step and not attempt.branch
    ]
    return lines


def _mixture_lines(phases: list[Phase]) -> list[str]:
    """The shares of the sources of each mixture, and their passes in the phases that use it."""
    lines = []
    for name in dict.fromkeys(phase.data_name for phase in phases):
        same = [phase for phase in phases if phase.data_name == name]
        rows = sum(phase.config.batch_sizes.rows_before(phase.steps) for phase in same)
        parts = [
            f"{source} {part.share:.2%}, {part.epochs(rows):.2f} epochs"
            for source, part in same[0].data.source.shares.items()
        ]
        if parts:
            lines.append(printable(f"mixture{f' {name}' if name else ''}: {'; '.join(parts)}"))
    return lines


def _batch_text(config: RunConfig, world_size: int, attempts: int) -> str:
    """The rows of the next step and their split over ranks, and the next sizes of a schedule."""
    micro_batch_size, sizes = config.train.micro_batch_size, config.batch_sizes
    rows = sizes.rows(attempts)
    later = [
        f", {size} after {start:,} steps"
        for start, size in zip(sizes.starts, sizes.sizes, strict=True)
        if start > attempts
    ]
    rest = ", ..." if len(later) > MOST_SHOWN else ""
    return (
        f"{rows} rows of {config.data.sequence_length} tokens "
        f"({rows // (micro_batch_size * world_size)} x {micro_batch_size} per rank)"
        f"{''.join(later[:MOST_SHOWN])}{rest}"
    )
