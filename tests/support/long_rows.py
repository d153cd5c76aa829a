"""Memory of a step of modern-tiny with one long row: measured, and predicted by `check`.

    PYTHONPATH=. python tests/support/long_rows.py LENGTH ...

It prints one JSON object: "LENGTH x DOCUMENTS" -> [measured, predicted] bytes of the model states
and of the peak.
"""

import json
import sys

from engine_memory import engine_memory, packed_batch, run

from electra_ds.cluster.launchers import find_ranks
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.training.engine import start

if __name__ == "__main__":
    ranks = find_ranks()
    device = start(ranks, timeout_minutes=10)
    found = {}
    for length in map(int, sys.argv[1:]):
        config = run("modern-tiny", "zero0-fp32", length, 1, "model.vocab_size=3000")
        for documents in (1, 4):
            batch = with_cu_seqlens(packed_batch(config, documents))
            found[f"{length} x {documents}"] = engine_memory(config, ranks, device, batch)
    print(json.dumps(found), flush=True)
