from __future__ import annotations

import pytest


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's ops run; CUDA joins the list when it has ops."""
    return str(request.param)
