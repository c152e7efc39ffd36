"""What one process makes of the sets of `planned`."""

from __future__ import annotations

import pytest
from planned import digests, sources
from tiny import Tiny

import sts_fast


@pytest.fixture(scope="session")
def expected(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes without a plan."""
    library = tmp_path_factory.mktemp("expected") / "lib"
    sts_fast.profile(**sources(tiny), library=library)
    return digests(library)
