"""--branch-from: what may differ, what is refused, where the rows continue, exactness on ranks.

The runs on ranks are those of tests/support/branch_scenarios.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import run_folders
from branch_scenarios import BRANCH_STEPS
from run_results import curve, distance, is_bit_equal
from running import read_json
from small_run import CUT

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import UserError
from electra_ds.config.loading import parse_run
from electra_ds.config.schema import RunConfig
from electra_ds.data.dataset import open_data
from electra_ds.model.weights import true_state
from electra_ds.training import branch as branch_module
from electra_ds.training import checkpoint, checkpointer
from electra_ds.training.attempt import AttemptOptions, check_out
from electra_ds.training.branch import Branch, find_branch
from electra_ds.training.collectives import ControlGroup
from electra_ds.training.init_from import GENERATOR_PARTS
from electra_ds.training.phases import check_resume, entered
from electra_ds.training.run_plan import plan
from electra_ds.training.state import TrainingState

STEP, SKIPPED = 6, 1  # of the parent
ROWS = 32  # of a step of the preset tiny


def changed(config: RunConfig, *changes: tuple[str, object]) -> RunConfig:
    """A config with other values, each given with its key."""
    values = config.model_dump(mode="json")
    for key, value in changes:
        section, field = key.split(".")
        values[section][field] = value
    return parse_run(values, "test")


class Parents:
    """Writes run folders with moments, and looks for branches of them in this process."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data = folder, data

    def write(self, config: RunConfig | None = None, **state) -> Path:
        """Write a run with one checkpoint; its folder. state: changes of its TrainingState."""
        planned = plan(config or run_folders.config(), open_data(self.data), 1)
        data = planned.data.row_order.state() | {
            "dataset_id": planned.data.reader.manifest.dataset_id,
            "position": (STEP + SKIPPED) * planned.config.train.global_batch_size,
        }
        known = TrainingState(STEP, SKIPPED, 0, 5, data, [[1.0, 2.0, 3.0]], [4.0])
        tensors = true_state(run_folders.objective(planned.config))
        frozen = GENERATOR_PARTS if planned.config.objective.is_frozen else ()
        trains = {name: value for name, value in tensors.items() if not name.startswith(frozen)}
        weights = run_folders.SingleProcessWeights(trains)
        weights.frozen = {name: tensors[name] for name in tensors.keys() - trains.keys()}
        checkpointer.save(
            weights,
            self.folder / "parent" / "ckpt",
            str(STEP),
            replace(known, **state),
            planned.config.model_dump(mode="json"),
            {},
        )
        return self.folder / "parent"

    def find(self, given: Path, config: RunConfig, data: Path | str = "") -> Branch:
        """`find_branch` for a new run."""
        planned = plan(config, open_data(data or self.data), 1)
        control = ControlGroup(Ranks(0, 1, 0, 1, "none"))
        return find_branch(given, planned.config, planned.phases, control)


@pytest.fixture
def parents(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Parents:
    monkeypatch.setattr(branch_module, "on_rank0", lambda function: function())
    return Parents(tmp_path, data)


# ------------------------------------------------------------------------------- the first state


def test_a_run_its_folder_ckpt_and_its_checkpoint_are_continued(parents: Parents) -> None:
    parent, config = parents.write(), run_folders.config()
    for given in (parent, parent / "ckpt", parent / "ckpt" / str(STEP)):
        branch = parents.find(given, config)
        assert branch.source == parent / "ckpt" / str(STEP)
    state = branch.state
    assert (state.step, state.skipped, state.tokens) == (STEP, SKIPPED, 5)
    assert (state.interval, state.recent_losses) == ([], [4.0])
    position = (STEP + SKIPPED) * ROWS
    assert (state.first_attempt, state.first_position) == (STEP + SKIPPED, position)
    assert state.consumed_rows == position
    assert branch.facts["differences"] == [] and branch.facts["position"] == position


@pytest.mark.parametrize(
    "changes",
    [
        [("optimizer.schedule", "wsd"), ("optimizer.decay_steps", 100)],
        [("optimizer.peak_lr", 0.5), ("optimizer.beta1", 0.5), ("optimizer.weight_decay", 0.5)],
        [("train.global_batch_size", 64), ("train.total_steps", 50)],
        [("train.batch_schedule", [[10, 64]])],
        [("objective.masking", "span"), ("objective.disc_weight", 20.0)],
        [("model.hidden_dropout", 0.3), ("generator.attention_dropout", 0.2)],
    ],
)
def test_science_that_keeps_the_model_may_differ_and_is_listed(
    parents: Parents, changes: list[tuple[str, object]]
) -> None:
    config = changed(run_folders.config(), *changes)
    branch = parents.find(parents.write(), config)
    listed = branch.facts["differences"]
    assert {line.split(":")[0] for line in listed} == {key for key, _ in changes}
    assert all(f"  {line}" in branch.lines for line in listed)
    assert branch.state.consumed_rows == (STEP + SKIPPED) * ROWS


def test_losses_of_another_objective_tell_no_spike(parents: Parents) -> None:
    parent = parents.write()
    other = changed(run_folders.config(), ("objective.mask_prob", 0.3))
    assert parents.find(parent, other).state.recent_losses == []
    longer = changed(run_folders.config(), ("train.total_steps", 77))
    assert parents.find(parent, longer).state.recent_losses == [4.0]


def test_another_seed_orders_the_rows_from_the_start(parents: Parents) -> None:
    branch = parents.find(parents.write(), changed(run_folders.config(), ("train.seed", 3)))
    assert (branch.state.consumed_rows, branch.state.first_position) == (0, 0)
    assert branch.state.data["seed"] == 3 and branch.state.recent_losses == []
    assert "start at position 0: seed: checkpoint 0, now 3" in branch.lines[0]


def test_streamed_rows_continue_with_the_same_batch_only(parents: Parents) -> None:
    """Their order depends on the batch, also where the number of lanes is the same."""
    parents.data = f"file://{parents.data}"
    config = changed(run_folders.config(), ("train.global_batch_size", 256))
    parent = parents.write(config)
    longer = changed(config, ("train.batch_schedule", [[10, 512]]))
    assert parents.find(parent, longer).state.consumed_rows == (STEP + SKIPPED) * 256
    for rows, reason in ((512, "train.global_batch_size (256 -> 512)"), (64, "lanes: checkpoint")):
        branch = parents.find(parent, changed(config, ("train.global_batch_size", rows)))
        assert branch.state.consumed_rows == 0
        assert "start at position 0" in branch.lines[0] and reason in branch.lines[0]


def in_phases(*phases: dict) -> RunConfig:
    """The config of `run_folders` with phases."""
    values = run_folders.config().model_dump(mode="json")
    values["train"]["total_steps"] = None
    return parse_run(values | {"phases": list(phases)}, "test")


def test_a_branch_may_have_phases_and_continues_rows_and_resumes(parents: Parents) -> None:
    """The phase is that of the step; the rows of the parent are counted for each data."""
    parent, position = parents.write(), (STEP + SKIPPED) * ROWS
    decay = {"name": "decay", "steps": 5, "set": {"optimizer.peak_lr": 1e-4}}
    for steps, name in ((4, "decay"), (STEP, "decay"), (8, "stable")):
        config = in_phases({"name": "stable", "steps": steps}, decay)
        branch = parents.find(parent, config)
        state = branch.state
        assert state.data["phase"] == {"name": name, "steps": {"stable": steps, "decay": 5}}
        assert state.consumed_rows == state.first_position == position
        assert f"the rows of the phase {name} continue at position {position}" in branch.lines[0]
        phases = plan(config, open_data(parents.data), 1).phases
        check_resume(state, phases, "meta.json")
        if name == "stable":
            later = replace(state, step=steps, data=state.data | {"position": position + 2 * ROWS})
            assert entered(later, phases, 1).consumed_rows == position + 2 * ROWS


def test_a_branch_of_phases_may_have_none_or_others(parents: Parents) -> None:
    """Both phases of the parent have the same data; the second one began at its step 4."""
    first, second = {"name": "a", "steps": 4}, {"name": "b", "steps": 5}
    config = in_phases(first, second)
    order = plan(config, open_data(parents.data), 1).phases[0].data.state()
    position = (STEP + SKIPPED) * ROWS
    data = order | {
        "position": position,
        "phase": {"name": "b", "steps": {"a": 4, "b": 5}},
        "earlier": [{"name": "a", "rows": 4 * ROWS, "data": order}],
    }
    begun = {"first_attempt": 4, "first_position": 4 * ROWS, "reset_step": 4}
    parent = parents.write(config, data=data, **begun)
    others = in_phases(first, {"name": "c", "steps": 1}, {"name": "d", "steps": 5})
    for own in (config, run_folders.config(), others):
        branch = parents.find(parent, own)
        assert branch.state.consumed_rows == branch.state.first_position == position
        assert branch.state.reset_step == 4
        check_resume(branch.state, plan(own, open_data(parents.data), 1).phases, "meta.json")
    assert "  phases: a, b -> a, c, d" in branch.lines
    short = in_phases(first, {"name": "b", "steps": 1})
    with pytest.raises(UserError, match="raise the length of the phase b or add phases"):
        parents.find(parent, short)
    damaged = parents.write(config, data=data | {"position": position + 1}, **begun)
    with pytest.raises(UserError, match=r"data\.position"):
        parents.find(damaged, config)


def test_values_of_the_phases_are_listed_as_well(parents: Parents) -> None:
    """The configs of both runs have the same mask rate; that of the phase is another."""
    parent, own = parents.write(), "objective.mask_prob"
    decay = {"name": "decay", "steps": 9, "set": {own: 0.05}}
    line = f"  {own}: 0.16 -> 0.05 (phase none -> decay)"
    assert parents.find(parent, in_phases(decay)).lines.count(line) == 1
    order = plan(run_folders.config(), open_data(parents.data), 1).data.state()
    data = order | {
        "position": (STEP + SKIPPED) * ROWS,
        "phase": {"name": "decay", "steps": {"decay": 9}},
        "earlier": [],
    }
    branch = parents.find(parents.write(in_phases(decay), data=data), run_folders.config())
    line = f"{own}: 0.05 -> 0.16 (phase decay -> none)"
    assert f"  {line}" in branch.lines and line in branch.facts["differences"]
    assert not any(
        line.startswith(("  train.total_steps: 9", "  phases.")) for line in branch.lines
    )


def test_a_decay_that_began_before_the_branch_is_said(parents: Parents) -> None:
    decay = [("optimizer.schedule", "wsd"), ("optimizer.warmup_steps", 1)]
    decay.append(("train.total_steps", 10))
    parent = parents.write()
    for steps, warns in ((4, False), (5, True)):
        config = changed(run_folders.config(), *decay, ("optimizer.decay_steps", steps))
        branch = parents.find(parent, config)
        assert ("WARNING: the decay begins at step 5" in branch.lines[-1]) == warns


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("model.ffn_size", 96)], "model.ffn_size: 80 -> 96"),
        ([("model.num_heads", 4)], "model.num_heads: 2 -> 4"),
        ([("model.sharing", "untied")], "model.sharing: shared -> untied"),
        ([("model.layer_norm_eps", 1e-5)], "model.layer_norm_eps: "),
        ([("generator.num_layers", 1)], "generator.num_layers: 2 -> 1"),
        ([("model.max_positions", 48)], r"has shape \(40.*\), this run's model has \(48"),
        ([("objective.kind", "mlm")], "has no mlm_head"),
        ([("train.total_steps", STEP)], f"this run has {STEP} steps; .*: raise train.total_steps"),
        (
            [("train.total_steps", None), ("train.epochs", 0.1)],
            r"this run has 1 steps \(train.epochs = 0.1, from step 0 on\); .* raise train.epochs",
        ),
    ],
)
def test_another_model_and_a_run_that_has_ended_are_refused(
    parents: Parents, changes: list[tuple[str, object]], message: str
) -> None:
    with pytest.raises(UserError, match=f"--branch-from .*{message}"):
        parents.find(parents.write(), changed(run_folders.config(), *changes))


def test_another_architecture_is_refused(parents: Parents) -> None:
    with pytest.raises(UserError, match="architecture = electra, but modernbert in this run"):
        parents.find(parents.write(), run_folders.config(architecture="modernbert"))


def test_a_generator_that_trained_is_not_frozen_by_a_branch(parents: Parents) -> None:
    """A frozen generator has no moments; those of a trained one belong to no parameter."""
    sizes = {"hidden_size": 32, "embedding_size": 32}
    frozen = run_folders.frozen_config(**sizes)
    trained = changed(frozen, ("objective.generator", "model"))
    with pytest.raises(UserError, match=r"has moments of generator.* does not train it"):
        parents.find(parents.write(trained), frozen)


def test_a_frozen_generator_is_continued_and_not_trained(parents: Parents) -> None:
    frozen = run_folders.frozen_config(hidden_size=32, embedding_size=32)
    parent = parents.write(frozen)
    assert parents.find(parent, frozen).state.step == STEP
    with pytest.raises(UserError, match=r"has no moments of generator.* trains it"):
        parents.find(parent, changed(frozen, ("objective.generator", "model")))


def test_a_checkpoint_without_moments_is_refused(parents: Parents) -> None:
    """As import and average write it."""
    run_folders.saved(parents.folder / "weights", run_folders.config())
    (parents.folder / "weights" / "tokenizer" / "vocab.txt").unlink()
    (parents.folder / "weights" / "tokenizer").rmdir()
    with pytest.raises(UserError, match=r"has no moments .* use --init-from"):
        parents.find(parents.folder / "weights", run_folders.config())


@pytest.mark.parametrize("damage", ["content", "shorter", "missing", "meta", "position", "latest"])
def test_a_damaged_checkpoint_is_refused(parents: Parents, damage: str) -> None:
    parent = parents.write()
    folder = parent / "ckpt" / str(STEP)
    (moments,) = folder.glob("optim-*")
    if damage == "content":
        content = bytearray(moments.read_bytes())
        content[-1] ^= 1
        moments.write_bytes(content)
    elif damage == "shorter":
        moments.write_bytes(moments.read_bytes()[:-1])
    elif damage == "missing":
        moments.unlink()
    elif damage == "meta":
        (folder / "meta.json").write_text("{}")
    elif damage == "position":
        values = json.loads((folder / "meta.json").read_text())
        values["data"]["position"] += 1
        (folder / "meta.json").write_text(json.dumps(values))
    else:
        (parent / "ckpt" / "latest").write_text("70\n")
    with pytest.raises(UserError, match="--branch-from"):
        parents.find(parent, run_folders.config())


def test_a_branch_of_another_vocabulary_is_refused(parents: Parents) -> None:
    parent = parents.write()
    run_folders.vocabulary(parent / "tokenizer")  # of the same size as that of the data
    with pytest.raises(UserError, match=r"its vocabulary .* is not that of the data"):
        parents.find(parent, run_folders.config())


def test_a_checkpoint_before_branches_has_no_first_attempt(parents: Parents) -> None:
    file = parents.write() / "ckpt" / str(STEP) / "meta.json"
    values = json.loads(file.read_text())
    del values["first_attempt"], values["first_position"]
    file.write_text(json.dumps(values))
    state = checkpoint.read_meta(file.parent).state
    assert (state.first_attempt, state.first_position) == (0, 0)


@pytest.mark.parametrize("option", ["init_from", "read_generator"])
def test_options_with_other_weights_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=r"--branch-from and --.*-from exclude each other"):
        AttemptOptions(branch_from=Path("parent"), **{option: Path("other")})


def test_a_branch_is_not_written_below_its_parent(parents: Parents) -> None:
    parent = parents.write()
    with pytest.raises(UserError, match="--branch-from"):
        check_out(parent / "next", branch_from=parent / "ckpt")
    assert not (parent / "next").exists()


# ------------------------------------------------------------------------------------- on ranks


def after(run: Path, step: int) -> list[dict]:
    """The records of a run after a step, without the verdict, which begins anew in a branch."""
    return [
        {key: value for key, value in record.items() if not key.startswith("verdict")}
        for record in curve(run)
        if record["step"] > step
    ]


@pytest.mark.parametrize("name", ["decay", "decay-cut"])
def test_a_decay_of_a_stable_run_equals_the_decay_from_the_start(outs: Path, name: str) -> None:
    """Also when the branch was stopped and resumed."""
    assert is_bit_equal(outs / name, outs / "decay-full")
    assert after(outs / name, 0) == after(outs / "decay-full", CUT)
    assert len(curve(outs / name)) == BRANCH_STEPS - CUT + 1  # and the evaluation at the end


@pytest.mark.parametrize("name", ["decay-z2", "decay-one", "decay-from-one"])
def test_a_branch_moves_to_another_stage_and_world_size(
    outs: Path, tmp_path: Path, name: str
) -> None:
    records = [json.dumps({"schema": "electra_ds metrics", "version": 1})]
    records += map(json.dumps, after(outs / "decay-full", CUT))
    (tmp_path / "metrics.jsonl").write_text("\n".join(records) + "\n")
    assert distance(outs / name, tmp_path) < 1e-5


def test_a_resumed_branch_moves_to_one_rank(outs: Path) -> None:
    assert distance(outs / "decay-cut-for-one", outs / "decay") < 1e-5


def test_the_parent_is_untouched(outs: Path) -> None:
    before, now = read_json(outs / "parent-0.json")
    assert before == now and any("optim-" in name for name in before)


def test_the_provenance_of_a_branch_names_its_parent_also_after_a_resume(outs: Path) -> None:
    parent = outs / "stable" / "ckpt" / str(CUT)
    for name in ("decay", "decay-cut"):
        facts = read_json(outs / name / "config.json")["provenance"]["branch"]
        assert facts["checkpoint"] == str(parent.resolve()) and facts["step"] == CUT
        assert "optimizer.schedule: constant -> wsd" in facts["differences"]
        assert facts["position"] == CUT * 16
    assert "branch" not in read_json(outs / "stable" / "config.json")["provenance"]


def test_a_later_branch_from_has_no_effect_and_one_line_says_so(outs: Path) -> None:
    console = "".join(path.read_text() for path in outs.glob("*.log"))
    line = f"--branch-from {outs}/stable has no effect, because {outs}/decay-cut has a checkpoint"
    assert console.count(line) == 1


def test_a_branch_with_another_batch_continues_the_rows(outs: Path) -> None:
    meta = checkpoint.read_meta(outs / "branch-batch" / "ckpt" / "11")
    assert meta.state.consumed_rows == CUT * 16 + (11 - CUT) * 8
    assert (meta.state.first_attempt, meta.state.first_position) == (CUT, CUT * 16)


def test_a_branch_of_a_branch_reads_other_data_from_the_start(outs: Path) -> None:
    state = checkpoint.read_meta(outs / "branch-data" / "ckpt" / "final").state
    assert (state.first_attempt, state.first_position) == (9, 0)
    assert (state.step, state.consumed_rows) == (12, 3 * 8)


@pytest.mark.parametrize("rank", (0, 1))
def test_a_refused_branch_ends_all_ranks_before_its_folder_is_made(outs: Path, rank: int) -> None:
    found = read_json(outs / f"refused-branches-{rank}.json")
    messages = {
        "shape": "model.ffn_size: 64 -> 48",
        "steps": f"this run has {CUT} steps",
        "damaged": "its content has changed",
    }
    assert found.keys() == messages.keys()
    for name, (message, is_made) in found.items():
        assert message.startswith("UserError: --branch-from") and messages[name] in message
        assert not is_made
