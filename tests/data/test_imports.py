"""What the modules of electra_ds.data import."""

import subprocess
import sys

from running import ROOT


def test_only_batches_and_the_loader_import_torch():
    modules = "dataset, masking, mixture, philox, remote_reader, rows, shard_reader, shuffle"
    source = (
        f"import sys\nfrom electra_ds.data import {modules}, tokenizer\n"
        "assert not {'torch', 'webdataset', 'sentencepiece', 'tokenizers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT)


def test_tokenizer_and_shard_format_import_no_run_config():
    source = (
        "import sys\nfrom electra_ds.data import shard_format, tokenizer\n"
        "assert not any(name.startswith('electra_ds.config') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT)
