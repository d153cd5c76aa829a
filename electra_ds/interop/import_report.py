"""The report of an import, and the run folder at step 0 that an import writes."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from electra_ds.cluster.run_folder import write_config
from electra_ds.common.json_files import write_json
from electra_ds.config.schema import RunConfig
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.model.build import build_objective
from electra_ds.model.weights import load_true_state, true_state
from electra_ds.training import checkpointer


class ImportReport(NamedTuple):
    """What an import did with every tensor.

    loaded: (names in the source, our name). initialized: our names. unused: name -> reason.
    layers: of an import of a run: encoder -> the layer of the source for each of its layers.
    """

    loaded: list[tuple[str, str]]
    initialized: list[str]
    unused: dict[str, str]
    warnings: list[str]
    layers: dict[str, list[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of import.json. Its keys read, made and left belong to the disk format."""
        facts = {
            "read": self.loaded,
            "made": self.initialized,
            "left": self.unused,
            "warnings": self.warnings,
        }
        return facts if self.layers is None else facts | {"layers": self.layers}


def write_imported(
    out: Path,
    source: Path,
    config: RunConfig,
    state: dict[str, Tensor],
    words: Tokenizer,
    report: ImportReport,
) -> None:
    """Write the folder `out` of a run at step 0: tokenizer, config, weights and import.json.

    state: canonical name -> tensor without padded rows; parameters that are not in it have the
    initial weights of train.seed. source: as given, for import.json.
    """
    module = build_objective(config, config.train.seed)
    load_true_state(module, state, partial=True)
    words.save(out / "tokenizer")
    write_config(out, config, "")
    checkpointer.write_initial(out / "ckpt", true_state(module), config.model_dump(mode="json"))
    write_json(out / "import.json", {"source": str(source), **report.to_json()})
