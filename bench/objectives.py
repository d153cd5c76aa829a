"""Comparison of the objectives `electra` and `mlm` (BERT) at equal FLOPs, after fine-tuning.

    python bench/objectives.py --data D --out O --glue GLUE --steps 14000
    python bench/objectives.py --data D --out O --run tiny --set section.field=value

Both models train with equal FLOPs: --steps is the number of steps of electra; mlm has more steps,
since each of them costs less. The rows, their order, the masked positions, the learning rates and
the warmup are equal. Then both are fine-tuned on STS-B and CoLA; without --glue they are only
pretrained. A repeated call resumes. O/objectives.json and O/objectives.md hold the results: medians
over the seeds on the development sets.
"""

import argparse
from pathlib import Path

from cost import step_flops
from report import make_parser, run_main
from runs import finetune, format_table, pretrain

from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import write_json
from electra_ds.config.loading import load_run
from electra_ds.data.shard_format import read_manifest

KINDS = ("electra", "mlm")
TASKS = ("stsb", "cola")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, has_json=False)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--glue", type=Path, help="the folder that holds CoLA/ and STS-B/")
    parser.add_argument("--steps", type=int, default=8000, help="steps of electra")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tuning seeds of each task")
    parser.add_argument("--run", default="tiny", help="run config")
    parser.add_argument("--engine", default="zero0", help="engine file")
    parser.add_argument("--finetune", default="tiny", help="config of the verb finetune")
    parser.add_argument(
        "--finetune-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the verb finetune; repeatable",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the verb pretrain; repeatable",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    vocab_size = read_manifest(options.data).tokenizer.vocab_size
    flops = {}
    for kind in KINDS:
        settings = [*options.set, f"objective.kind={kind}", f"model.vocab_size={vocab_size}"]
        flops[kind] = step_flops(load_run(options.run, settings))
    results = {}
    for kind in KINDS:
        steps = round(options.steps * flops["electra"] / flops[kind])
        settings = [*options.set, f"objective.kind={kind}", f"train.total_steps={steps}"]
        out = options.out / kind
        # The MLM loss is that of electra's generator, and of mlm's main encoder.
        results[kind] = pretrain(options.run, options.data, out, options.engine, settings)
        results[kind] |= {"flops": steps * flops[kind]}
    if options.glue:
        for kind in KINDS:
            results[kind] |= finetune(
                options.out / kind,
                options.finetune,
                TASKS,
                options.glue,
                options.out / f"{kind}-glue",
                options.seeds,
                options.finetune_set,
            )
    write_json(options.out / "objectives.json", results)
    table = format_table(results)
    write_bytes(options.out / "objectives.md", (table + "\n").encode())
    print(table)


if __name__ == "__main__":
    run_main(main)
