"""Fixtures that many tests share."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import shard_data
import small_corpus
import small_objective
from hypothesis import settings

from electra_ds.model.objective import ElectraObjective

# The examples of the property tests are the same in each run; HYPOTHESIS_PROFILE=default searches on.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

pytest_plugins = ["nodes", "scenario_runs"]


@pytest.fixture(autouse=True)
def same_environment_afterwards() -> Iterator[None]:
    """Restore os.environ: verbs that run in this process export variables of their ranks."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 training rows of 32 random tokens, vocabulary 600, in three shards; 50 held-out rows."""
    folder, valid = tmp_path_factory.mktemp("data"), shard_data.best_fit_rows(50, 32, seed=9)
    shards = [shard_data.best_fit_rows(100, 32, seed=seed) for seed in range(3)]
    return shard_data.write_data(folder, shards, valid=valid)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 300 short documents (in) and a vocabulary of whole words (tok)."""
    return small_corpus.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(params=["electra", "modernbert", "deberta_v2"])
def build(request: pytest.FixtureRequest) -> Callable[..., ElectraObjective]:
    """`small_objective.build` of each architecture."""
    return functools.partial(small_objective.build, architecture=request.param)
