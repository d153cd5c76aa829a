"""Comparison of architectures and of the ways to share embeddings, at equal FLOPs.

    python bench/architectures.py --data D --out O --glue GLUE --steps 6000
    python bench/architectures.py --data D --out O --architectures modernbert --sharings shared,gdes
    python bench/architectures.py --data D --out O --seeds 1 --set section.field=value

D: rows of 64 tokens (`prepare --sequence-length 64`) or another length. Every architecture has 4
layers of 128 and a generator of 2 layers; their feed-forward layers have almost equal numbers of
parameters. --steps is the number of steps of electra with shared embeddings; every other case has
as many as give equal FLOPs. Rows, order, masked positions, learning rates and warmup are equal.

`frozen`: a generator of the same sizes first trains alone (objective.kind = mlm), then the
discriminator trains as many steps with it, at a temperature that falls from 2 to 1; the FLOPs of
both are counted. Each pretraining seed is fine-tuned on STS-B with --finetune-seeds seeds; without
--glue nothing is fine-tuned. A repeated call resumes. O/architectures.json and O/architectures.md
hold the results: one row for each seed, and the mean and standard deviation of each case.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from cost import step_flops
from report import make_parser, run_main
from runs import finetune, format_table, pretrain

from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import write_json
from electra_ds.config.loading import load_run
from electra_ds.data.shard_format import read_manifest
from electra_ds.model.build import parameter_count

COMMON = ("model.num_layers=4", "generator.num_layers=2")
# Architecture -> its preset and settings. 3 x 344 is close to 2 x 512 columns of the feed-forward layers.
SHAPES = {
    "electra": ("tiny", ("model.ffn_size=512", "generator.ffn_size=512")),
    "modernbert": ("modern-tiny", ("model.ffn_size=344", "generator.ffn_size=344")),
    "deberta_v2": ("deberta-tiny", ("model.ffn_size=512", "generator.ffn_size=512")),
}
RECIPE = (
    "model.init=fan_in",
    "model.embedding_init_std=0.2",
    "train.global_batch_size=16",
    "train.micro_batch_size=16",
    "optimizer.peak_lr=0.001",
    "optimizer.warmup_steps=300",
    "optimizer.beta2=0.98",
    "objective.mask_prob=0.15",
)
SHARINGS = {
    "shared": (),
    "untied": ("model.sharing=untied",),
    "gdes": ("model.sharing=gdes",),
    "frozen": (
        "model.sharing=untied",
        "objective.generator=frozen",
        "objective.temperature=2",
        "objective.temperature_decay=0.1",
    ),
}
# The generator of `frozen`, trained alone.
ALONE = ("objective.kind=mlm", "model.num_layers=2")
TASKS = ("stsb",)


class Case(NamedTuple):
    """An architecture with a way to share embeddings."""

    architecture: str
    sharing: str

    def __str__(self) -> str:
        return f"{self.architecture} {self.sharing}"

    @property
    def preset(self) -> str:
        return SHAPES[self.architecture][0]

    def settings(self, options: argparse.Namespace) -> list[str]:
        """The settings of the run."""
        return [*self._common(options), *SHARINGS[self.sharing], *options.set]

    def settings_alone(self, options: argparse.Namespace) -> list[str]:
        """The settings of the generator's own run."""
        return [*self._common(options), *ALONE, *options.set]

    def _common(self, options: argparse.Namespace) -> list[str]:
        length = read_manifest(options.data).sequence_length
        shape = SHAPES[self.architecture][1]
        return [*COMMON, *shape, *RECIPE, f"data.sequence_length={length}"]

    def flops(self, options: argparse.Namespace) -> float:
        """Floating-point operations of a step, with those of the generator's own run."""
        vocabulary = f"model.vocab_size={read_manifest(options.data).tokenizer.vocab_size}"
        runs = [self.settings(options)]
        if self.sharing == "frozen":
            runs.append(self.settings_alone(options))
        return sum(step_flops(load_run(self.preset, [*run, vocabulary])) for run in runs)

    def parameters(self, options: argparse.Namespace) -> int:
        """Parameters of the discriminator."""
        vocabulary = f"model.vocab_size={read_manifest(options.data).tokenizer.vocab_size}"
        config = load_run(self.preset, [*self.settings(options), vocabulary])
        return parameter_count(config).discriminator


def measure(case: Case, seed: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain and fine-tune one seed of a case; returns its results."""
    length = [f"train.total_steps={steps}", f"train.seed={seed}"]
    out = options.out / f"{case.architecture}-{case.sharing}-{seed}"
    more: list[object] = []
    if case.sharing == "frozen":
        alone = options.out / f"{case.architecture}-generator-{seed}"
        settings = [*case.settings_alone(options), *length]
        pretrain(case.preset, options.data, alone, options.engine, settings)
        more = ["--generator-from", alone]
    settings = [*case.settings(options), *length]
    result = pretrain(case.preset, options.data, out, options.engine, settings, more)
    if options.glue:
        glue_out, count = out.with_name(f"{out.name}-glue"), options.finetune_seeds
        result |= finetune(out, options.finetune, TASKS, options.glue, glue_out, count)
    return result


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the pretraining seeds of every number.

    A seed without a number, because its fine-tuning diverged, is left out of that number.
    """
    keys = dict.fromkeys(key for result in results for key in result)
    columns = {key: [result[key] for result in results if key in result] for key in keys}
    numbers = {
        key: values
        for key, values in columns.items()
        if all(isinstance(value, (int, float)) for value in values)
    }
    found = {"mean": {key: statistics.mean(values) for key, values in numbers.items()}}
    if len(results) > 1:
        found["deviation"] = {
            key: statistics.stdev(values) for key, values in numbers.items() if len(values) > 1
        }
    return found


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, has_json=False)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--glue", type=Path, help="the folder that contains STS-B/")
    parser.add_argument(
        "--architectures", default=",".join(SHAPES), help="architectures, separated by commas"
    )
    parser.add_argument(
        "--sharings",
        default="shared",
        help=f"ways to share embeddings, separated by commas: {', '.join(SHARINGS)}",
    )
    parser.add_argument("--steps", type=int, default=6000, help="steps of electra, shared")
    parser.add_argument("--seeds", type=int, default=3, help="pretraining seeds")
    parser.add_argument("--finetune-seeds", type=int, default=3, help="fine-tuning seeds of each")
    parser.add_argument("--engine", default="zero0", help="engine file")
    parser.add_argument("--finetune", default="tiny", help="config of the verb finetune")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the verb pretrain, for every case; repeatable",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    budget = options.steps * Case("electra", "shared").flops(options)
    results: dict[str, dict[str, Any]] = {}
    for architecture in options.architectures.split(","):
        for sharing in options.sharings.split(","):
            case = Case(architecture, sharing)
            steps = round(budget / case.flops(options))
            own = [measure(case, seed, steps, options) for seed in range(options.seeds)]
            facts = {"parameters": case.parameters(options), "flops": steps * case.flops(options)}
            results |= {f"{case} {i}": result | facts for i, result in enumerate(own)}
            results |= {f"{case} {name}": row for name, row in summary(own).items()}
            write_json(options.out / "architectures.json", results)
            table = format_table(results)
            write_bytes(options.out / "architectures.md", (table + "\n").encode())
    print(table)


if __name__ == "__main__":
    run_main(main)
