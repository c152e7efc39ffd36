"""One file for each format of evaluation results."""
