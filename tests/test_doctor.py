"""The doctor's verdict is one line, the same wherever the notebooks run; its table says the rest."""

import subprocess
import sys

import pytest

import workbench
from workbench.doctor import Finding, Report, examine

READY = "workbench: ready (everything here runs, with or without a GPU)"


@pytest.fixture(scope="module")
def report() -> Report:
    return workbench.doctor()


def test_this_machine_is_ready_and_says_so_in_one_line(report: Report):
    assert repr(report) == READY


def test_the_table_names_everything_and_ends_with_the_verdict(report: Report):
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["workbench", "Python", "torch"]
    assert {"JupyterLab", "cores", "memory", "GPU", "Triton", "browser"} <= {line.split()[0] for line in lines if line}
    assert lines[-1] == READY


def test_a_missing_thing_says_what_it_costs():
    finding = Finding("GPU", None, "nothing here needs one")
    assert Report((finding,)).table().splitlines()[0] == "GPU  missing: nothing here needs one"
    assert Report((finding,)).ready


def test_a_missing_necessity_is_no_verdict_of_ready():
    report = Report((Finding("torch", None, "nothing can be trained", required=True),))
    assert repr(report) == "workbench: not ready (torch is missing: nothing can be trained)"


def test_a_probe_that_does_not_answer_counts_as_missing():
    assert not examine(timeout_s=0.001).ready


def test_the_module_is_callable_in_every_order_of_import_and_loads_no_torch():
    code = """
import sys
import {first}
import {second}
assert "torch" not in sys.modules
import workbench.doctor as module
assert workbench.doctor is module and callable(module)
from workbench import doctor
assert doctor is module
"""
    for first, second in (("workbench", "workbench.doctor"), ("workbench.doctor", "workbench")):
        subprocess.run([sys.executable, "-c", code.format(first=first, second=second)], check=True)
