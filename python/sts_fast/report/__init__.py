"""A run as one self-contained HTML file: no script, no request to anywhere, light and dark."""

from sts_fast.report.comparison import build_comparison_report
from sts_fast.report.demo import build_demo_report
from sts_fast.report.report import build_report

__all__ = ["build_comparison_report", "build_demo_report", "build_report"]
