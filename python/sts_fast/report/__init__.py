"""Self-contained HTML reports of runs: no script, no network request, light and dark."""

from sts_fast.report.comparison import build_comparison_report
from sts_fast.report.demo import build_demo_report
from sts_fast.report.library_page import build_library_report
from sts_fast.report.report import build_report

__all__ = ["build_comparison_report", "build_demo_report", "build_library_report", "build_report"]
