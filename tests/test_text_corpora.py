"""The corpora without files: the standard library and the generated tasks."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest

from workbench.text import (
    Bytes,
    CopyTask,
    Corpus,
    InductionTask,
    MarkovTask,
    Mixture,
    ModularArithmeticTask,
    StdlibCode,
    StdlibProse,
    load,
)
from workbench.text.docstrings import docstrings, parse, strip_docstrings
from workbench.text.stdlib import code_documents, left_out, prose_documents, source_files, stdlib_folder
from workbench.text.tasks import entropy_rate_nats, stationary_distribution

SOURCE = '''#!/usr/bin/python
"""Module ünïcode docstring."""

import os

def f(): "sole"

class A:
    """Docs of A
    over two lines."""  # a comment stays

    "a string that is none"

    async def g(self):
        r"""Only a docstring."""

    def h(self):
        "grüß"; return """not me"""

if os.name:
    class B: ("in brackets"); x = lambda: "no"
'''

STRIPPED = '''#!/usr/bin/python

import os

def f(): pass

class A:
      # a comment stays

    "a string that is none"

    async def g(self):
        pass

    def h(self):
        pass; return """not me"""

if os.name:
    class B: pass; x = lambda: "no"
'''


def test_docstrings_are_stripped_and_found_by_position() -> None:
    assert strip_docstrings(SOURCE, parse(SOURCE)) == STRIPPED
    assert list(docstrings(parse(SOURCE))) == [
        ("", "Module ünïcode docstring."),
        ("f", "sole"),
        ("A", "Docs of A\nover two lines."),
        ("A.g", "Only a docstring."),
        ("A.h", "grüß"),
        ("B", "in brackets"),
    ]


def without_docstrings(tree: ast.Module) -> str:
    """What stripping must give, found by rewriting the tree."""
    for node in ast.walk(tree):
        is_owner = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_owner and ast.get_docstring(node, clean=False) is not None:
            first, *rest = node.body
            is_followed_on_its_line = bool(rest) and rest[0].lineno == first.end_lineno
            node.body = rest if rest and not is_followed_on_its_line else [ast.Pass(), *rest]
    return ast.dump(tree)


def test_stripping_changes_nothing_else_in_real_files() -> None:
    paths = [path for path in source_files(stdlib_folder()) if path.parent.name in ("email", "json")]
    assert len(paths) > 20
    for path in paths:
        source = path.read_text(encoding="utf-8")
        if source.strip() and parse(source).body:
            assert ast.dump(parse(strip_docstrings(source, parse(source)))) == without_docstrings(parse(source))


def test_a_small_library(tmp_path: Path) -> None:
    files = {
        "good.py": b'"""Doc one."""\nx = 1\n',
        "again.py": b'"""Doc one."""\ndef f():\n    """Doc\n    two."""\n',
        "latin.py": "# coding: latin-1\nx = 'é'\n".encode("latin-1"),
        "lone.py": b'"""\\ud800"""\ny = 2\n',
        "broken.py": b"def f(:\n",
        "binary.py": b"x = '\xff'\n",
        "only_doc.py": b'"""Doc three."""\n',
        "test/skipped.py": b"x = 1\n",
        "site-packages/skipped.py": b"x = 1\n",
        "pydoc_data/topics.py": b"topics = {}\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert {document.name: document.text for document in code_documents(tmp_path)} == {
        "good.py": "x = 1\n",
        "again.py": "def f():\n    pass\n",
        "latin.py": "# coding: latin-1\nx = 'é'\n",
        "lone.py": "y = 2\n",
    }
    assert [(document.name, document.text) for document in prose_documents(tmp_path, {"a topic": "Topic."})] == [
        ("topic a topic", "Topic."),
        ("again.py", "Doc one."),
        ("again.py f", "Doc\ntwo."),
        ("only_doc.py", "Doc three."),
    ]
    assert left_out(tmp_path) == ["binary.py", "broken.py"]
    with pytest.raises(ValueError, match="has no source files"):
        list(code_documents(tmp_path / "test" / "nothing"))


def test_the_real_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = load(Mixture({StdlibCode(): 3, StdlibProse(): 1}), Bytes(), cache_dir=tmp_path)
    assert text.names == ("stdlib_code", "stdlib_prose")
    for name, least in (("stdlib_code", 5e6), ("stdlib_prose", 1.5e6)):
        total = text.train_tokens(name) + text.validation_tokens(name)
        assert total > least
        assert 0.01 < text.validation_tokens(name) / total < 0.15
    names = {path.relative_to(stdlib_folder()).as_posix() for path in source_files(stdlib_folder())}
    assert "asyncio/base_events.py" in names and "pydoc_data/topics.py" not in names
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    prose = [document.text for document in text.validation_documents("stdlib_prose")]
    assert len(prose) == len(set(prose)) > 250
    code = "\n".join(document.text for document in text.validation_documents("stdlib_code"))
    long_prose = [piece for piece in prose if len(piece) > 500]
    assert len(long_prose) > 20 and not any(piece in code for piece in long_prose)
    assert left_out(stdlib_folder() / "json") == []
    # The second time nothing is parsed: equal text comes from the cache.
    monkeypatch.setattr("workbench.text.stdlib.parse", None)
    again = load(Mixture({StdlibCode(): 3, StdlibProse(): 1}), Bytes(), cache_dir=tmp_path)
    assert again.fingerprint == text.fingerprint
    validation = text.validation(batch_size=8, sequence_length=128, num_batches=4)
    floors = text.floors(validation, sequence_length=128)
    assert 1.5 < floors.nats_per_byte["bigram"] < floors.nats_per_byte["unigram"] < math.log(256)


TASKS = (CopyTask, InductionTask, ModularArithmeticTask, MarkovTask)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_repeat_exactly_and_differ_by_seed(task: type[Corpus]) -> None:
    first, again, other = (list(task(seed=seed, num_documents=64).documents()) for seed in (3, 3, 4))  # type: ignore[call-arg]
    assert first == again
    assert len(first) == 64
    assert [document.text for document in first] != [document.text for document in other]


def test_task_answers() -> None:
    for document in CopyTask(length=5, num_documents=20).documents():
        before, after = document.text.split("=")
        assert before == after and len(before) == 5
    for document in ModularArithmeticTask(modulus=11, num_documents=121).documents():
        left, right, total = (int(number) for number in document.text.replace("+", "=").split("="))
        assert (left + right) % 11 == total and len(document.text) == 8
    assert len({document.text for document in ModularArithmeticTask(modulus=11, num_documents=121).documents()}) == 121
    for document in InductionTask(num_documents=20).documents():
        pairs = document.text.split(" ")
        assert len(pairs) == 16 and len(set(pairs)) == len({pair[0] for pair in pairs}) <= 6


def test_entropy_rate_by_hand() -> None:
    transitions = np.array([[1 / 2, 1 / 2], [1 / 4, 3 / 4]])
    assert stationary_distribution(transitions) == pytest.approx([1 / 3, 2 / 3])
    after_second = -(1 / 4) * math.log(1 / 4) - (3 / 4) * math.log(3 / 4)
    assert entropy_rate_nats(transitions) == pytest.approx(math.log(2) / 3 + after_second * 2 / 3)


def test_markov_entropy_rate() -> None:
    task = MarkovTask(seed=1, num_documents=100, length=4000, alphabet_size=5)
    assert task.transitions.sum(axis=1) == pytest.approx(np.ones(5))
    assert task.stationary @ task.transitions == pytest.approx(task.stationary)
    assert task.stationary.sum() == pytest.approx(1)
    assert 0 < task.entropy_rate_nats < math.log(5)
    states = np.array([[ord(letter) - ord("a") for letter in document.text] for document in task.documents()])
    optimal = -np.log(task.transitions[states[:, :-1], states[:, 1:]]).mean()
    assert optimal == pytest.approx(task.entropy_rate_nats, abs=0.005)
    assert np.bincount(states[:, 0], minlength=5) / 100 == pytest.approx(task.stationary, abs=0.2)


def test_the_bigram_floor_of_markov_text_is_its_entropy_rate(tmp_path: Path) -> None:
    task = MarkovTask(seed=2, num_documents=200, length=4096)
    text = load(task, cache_dir=tmp_path)
    floors = text.floors(text.validation(16, 256, num_batches=16), sequence_length=256)
    # 65536 letters leave a standard error of about 0.003; a document's end costs another 9 nats in 4096 letters.
    assert floors.nats_per_token["bigram"] == pytest.approx(task.entropy_rate_nats, abs=0.015)
    assert floors.nats_per_token["unigram"] > task.entropy_rate_nats + 0.1


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: CopyTask(length=0), "length=0 must be at least 1"),
        (lambda: CopyTask(alphabet_size=27), r"alphabet_size=27 must lie in 2\.\.26"),
        (lambda: CopyTask(num_documents=1), "num_documents=1 must be at least 2"),
        (lambda: InductionTask(num_capitals=27), r"num_capitals=27 must lie in 1\.\.26"),
        (lambda: ModularArithmeticTask(modulus=1), "modulus=1 must be at least 2"),
        (lambda: ModularArithmeticTask(modulus=5, num_documents=26), r"num_documents=26 must lie in 2\.\.25"),
        (lambda: MarkovTask(concentration=0), r"concentration=0 must lie in"),
        (lambda: MarkovTask(concentration=math.nan), r"concentration=nan must be a finite number"),
    ],
)
def test_refused_sizes(build, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build()
