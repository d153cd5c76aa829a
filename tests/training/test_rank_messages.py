"""Messages between ranks: JSON bytes, no pickles; a single rank needs no port."""

import ast
import math
from pathlib import Path

import pytest
from running import ROOT, run_ranks

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import LockedOut, RunFailure, UserError
from electra_ds.training.collectives import ControlGroup, decode, encode, fail_on_all_ranks

# Functions of torch.distributed and mpi4py that read pickles.
PICKLING = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "bcast",
    "allgather",
}
OWNERS = {"dist", "MPI", "world", "COMM_WORLD", "distributed"}


@pytest.mark.parametrize(
    "value", [None, "text \u2028", 1, 0.1, [1, "a", None], {"a": {"b": [1.5]}}, -math.inf]
)
def test_a_json_value_comes_back_equal(value):
    assert decode(encode(value)) == value
    assert math.isnan(decode(encode(math.nan)))


@pytest.mark.parametrize("value", [Path("x"), {1: 2}, [{2: 3}], {3}, OSError("x"), b"x"])
def test_a_value_that_json_would_change_is_an_error_at_any_world_size(value):
    with pytest.raises(TypeError):
        encode(value)
    with pytest.raises(TypeError):
        ControlGroup(Ranks(0, 1, 0, 1, "none")).all_gather_object(value)


def test_tuples_become_lists_in_a_world_of_one_rank_too():
    assert ControlGroup(Ranks(0, 1, 0, 1, "none")).all_gather_object((1, ("a",))) == [[1, ["a"]]]


def test_no_code_calls_a_collective_of_pickles():
    found = []
    for path in sorted((ROOT / "electra_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value).split(".")[-1]
                if node.func.attr in PICKLING and owner in OWNERS:
                    found.append(f"{path.name}: {ast.unparse(node.func)}")
    assert found == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [(UserError("u"), UserError), (LockedOut("l"), UserError), (OSError("o"), RunFailure)],
)
def test_an_error_of_one_rank_is_raised_with_its_rank(error, expected):
    with (
        pytest.raises(expected, match=rf"acting failed: rank 0: {error}"),
        fail_on_all_ranks(lambda value: [decode(encode(value))], "acting"),
    ):
        raise error


def test_messages_and_errors_reach_every_rank(tmp_path: Path) -> None:
    run_ranks(2, "exchange.py", tmp_path)
    for rank in range(2):
        lines = (tmp_path / str(rank)).read_text().splitlines()
        assert lines == [
            "[{'rank': 0, 'text': ''}, {'rank': 1, 'text': 'xxxxx\u00e9'}]",
            "{'of rank 0': [1, None]}",
            "UserError: wrong",
            "LockedOut: locked",
            "RunFailure: rank 0: full",
            "RunFailure: ended",
        ]
