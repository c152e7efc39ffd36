from __future__ import annotations

import pytest
from html_tree import read_page
from written_run import Report, write_full_run

from sts_fast.forecast.run import validate_scores
from sts_fast.report import build_report


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a run that has every file; nothing in its folder may be changed."""
    folder = tmp_path_factory.mktemp("full")
    scores = write_full_run(folder)
    validate_scores(scores)
    path = build_report(folder)
    assert path == folder / "report.html"
    return Report(scores, read_page(path), path)
