"""Notebooks without a screen: run them with parameters, keep their stored form normalized, report them as HTML."""

from workbench.headless.normalize import complaints, normalize, normalized_text, read
from workbench.headless.notebook import NotebookFailed, parameters, run
from workbench.headless.report import report

__all__ = ["NotebookFailed", "complaints", "normalize", "normalized_text", "parameters", "read", "report", "run"]
