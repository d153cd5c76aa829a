"""docs/python-api.md: its Python blocks run in order and print what their comments show."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from running import CPU, ROOT

# Before the page. A process that is started in the background inherits an ignored SIGINT, so the handler is noted.
BEFORE = """
import signal
sigint_before = signal.getsignal(signal.SIGINT)
"""

# Checks of `pretrain` that the page does not show, run after its blocks in the same process.
AFTERWARDS = """
import os
from electra_ds.common.errors import UserError
assert "RANK" not in os.environ and "MASTER_PORT" not in os.environ
assert signal.getsignal(signal.SIGINT) is sigint_before
for arguments, part in (
    ({"config": "tiny"}, "in this process already"),
    ({"config": config, "sets": ["train.seed=1"]}, "load_run(name, sets, engine)"),
):
    try:
        electra_ds.pretrain(data="data", out="run", **arguments)
        raise AssertionError(part)
    except UserError as error:
        assert part in str(error), error
assert set(electra_ds.__all__) <= set(dir(electra_ds))
"""


def blocks() -> list[str]:
    """The Python blocks of the page, without those that need a package that is not installed."""
    page = (ROOT / "docs" / "python-api.md").read_text()
    found = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    has_transformers = importlib.util.find_spec("transformers") is not None
    return [block for block in found if has_transformers or "from transformers" not in block]


def test_the_python_blocks_run_in_order_and_print_their_comments(tmp_path: Path) -> None:
    script = "\n".join(blocks())
    expected = re.findall(r"^print\(.*\)  # (.+)$", script, re.MULTILINE)
    assert len(expected) >= 14
    (tmp_path / "page.py").write_text(BEFORE + script + AFTERWARDS)
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=os.environ | CPU | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    printed = done.stdout.splitlines()
    for line in expected:
        assert line in printed, f"{line!r} is not printed; the output is\n{done.stdout}"
        printed = printed[printed.index(line) + 1 :]


def test_every_public_name_is_on_the_page() -> None:
    import electra_ds

    page = (ROOT / "docs" / "python-api.md").read_text()
    for name in electra_ds.__all__:
        assert f"`electra_ds.{name}`" in page and getattr(electra_ds, name) is not None
