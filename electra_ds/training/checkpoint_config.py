"""The config with which the weights of a checkpoint were trained last."""

from electra_ds.common.errors import UserError
from electra_ds.common.printable import shortened
from electra_ds.config.loading import parse_run, phase_runs
from electra_ds.config.schema import RunConfig
from electra_ds.training.checkpoint import Meta


def config_of_weights(meta: Meta, where: str) -> RunConfig:
    """Return the config of a checkpoint; of a run with phases that of the phase it is in.

    The rotary bases and the length of the rows may differ between phases. where: the file, for
    messages. The result has no phases. Raises UserError as `parse_run`, and for an unknown phase.
    """
    config = parse_run(meta.config, where)
    if not config.phases:
        return config
    runs = phase_runs(config, where)
    record = meta.state.data.get("phase")
    name = record.get("name") if isinstance(record, dict) else None
    if name is None and meta.state.step == 0:
        return runs[0]  # weights of `import`, from before the first phase
    names = [phase.name for phase in config.phases]
    if name not in names:
        raise UserError(
            f"{where}: data.phase is {shortened(name)}; expected one of {', '.join(names)}"
        )
    return runs[names.index(name)]
