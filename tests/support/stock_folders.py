"""Folders of stock classes: exports of small runs, and comparisons with what transformers computes."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import run_folders
import torch
from running import read_json

from electra_ds.interop.export import export
from electra_ds.model.objective import ElectraObjective

BOUND = 1e-5  # relative to the largest logit, fp32
SETS = ["data.sequence_length=32"]
# Sizes of the generator of a tiny preset that equal those of the stock models of the tests.
LIKE_STOCK = [
    f"generator.{key}={value}"
    for key, value in dict(hidden_size=64, num_layers=2, num_heads=2, ffn_size=96).items()
]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def exported_run(
    folder: Path, sharing: str, kind: str, architecture: str
) -> tuple[ElectraObjective, Path]:
    """(module of a run, the folder that `export` wrote)."""
    module = run_folders.pretrained(folder / "run", sharing, kind, architecture)
    export(folder / "run", folder / "hf")
    return module, folder / "hf"


def stock_model(folder: Path) -> Any:
    """The model of the class that config.json names; no key is missing or unexpected."""
    import transformers

    name = read_json(folder / "config.json")["architectures"][0]
    kind = getattr(transformers, name)
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor) -> None:
    real = mask > 0
    largest = max(1.0, float(theirs[real].abs().max()))
    assert float((ours[real] - theirs[real]).abs().max()) <= BOUND * largest


def run_card(folder: Path) -> str:
    """Run the code block of a model card in the folder that contains `folder`; what it printed."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    printed = io.StringIO()
    with contextlib.chdir(folder.parent), contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()
