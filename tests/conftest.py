from __future__ import annotations

import pytest
import tiny as tiny_material


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's ops run; CUDA joins the list when it has ops."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_material.Tiny:
    """A tiny random model with SAEs of every architecture, a tuned model, a training set and domains."""
    return tiny_material.make(tmp_path_factory.mktemp("tiny"))
