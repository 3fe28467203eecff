"""Checkpoints: exact, verified, never half there."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.record import checkpoint, plain_json

FILES = ("state.safetensors", "state.json", "manifest.json")


def state(step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(8, 8, generator=generator)}, {"step": step, "loss": 1 / 3}


def saved(folder: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        checkpoint.save(folder, step, *state(step), keep=keep)
    return folder


def assert_loads(folder: Path, step: int | None, expected: int) -> None:
    found, tensors, values = checkpoint.load(folder, step)
    assert found == expected
    assert values == state(expected)[1]
    assert torch.equal(tensors["weight"], state(expected)[0]["weight"])


def test_every_tensor_and_value_comes_back_as_it_was(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "float32": torch.tensor([0.1, math.nan, math.inf, -0.0, 1e-45]),
        "float64": torch.tensor([1 / 3], dtype=torch.float64),
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "bool": torch.tensor([True, False]),
        "rng": torch.get_rng_state(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "transposed": base.T,
        "slice": base[1:],
        "tied_1": base,
        "tied_2": base,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    values = {"none": None, "flag": True, "n": 2**70, "x": 0.1 + 0.2, "tiny": 5e-324, "zero": -0.0, "text": "é\n\0"}
    values |= {"list": [1, 1.0, [], {}], "nested": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}}
    checkpoint.save(tmp_path, 12, tensors, values)
    step, read, read_values = checkpoint.load(tmp_path)
    assert step == 12
    assert repr(read_values) == repr({name: values[name] for name in sorted(values)}).replace(
        repr(values["nested"]), repr({name: values["nested"][name] for name in sorted(values["nested"])})
    )
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        torch.testing.assert_close(read[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert math.copysign(1, read["float32"][3].item()) == -1


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(_json)
def test_plain_json_gives_back_what_it_takes(value: Any) -> None:
    try:
        text = plain_json.dumps(value)
    except ValueError:
        assert "'float'" in repr(value)
        return

    def ordered(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: ordered(part[key]) for key in sorted(part)}
        return [ordered(item) for item in part] if isinstance(part, list) else part

    # The repr tells 1 from 1.0 from True, -0.0 from 0.0, and takes one NaN for another.
    assert repr(plain_json.loads(text)) == repr(ordered(value))


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, {"float": 1.0}, {1, 2}, b"x", torch.tensor(1.0), float, [{"a": (1,)}]], ids=repr
)
def test_what_json_would_change_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^value\.it"):
        checkpoint.save(tmp_path, 1, {}, {"it": value})
    assert checkpoint.latest(tmp_path) is None


def test_the_newest_are_kept_and_nothing_is_overwritten(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.load(tmp_path)
    saved(tmp_path, 5, 10, 15, keep=2)
    assert checkpoint.latest(tmp_path) == 15
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000010", "step-000000015"]
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "step-000000010").iterdir()) == sorted(FILES)
    with pytest.raises(ValueError, match="checkpoint of step 15 already"):
        checkpoint.save(tmp_path, 15, {}, {})
    assert_loads(tmp_path, None, 15)
    assert_loads(tmp_path, 10, 10)
    with pytest.raises(ValueError, match=r"no checkpoint of step 5 in .*; there are 10, 15"):
        checkpoint.load(tmp_path, 5)
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save(tmp_path, 20, {}, {}, keep=0)
    with pytest.raises(ValueError, match="step=-1"):
        checkpoint.save(tmp_path, -1, {}, {})


def test_what_a_killed_saver_left_is_swept_and_never_read(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    stale = tmp_path / "checkpoints" / ".tmp-half"
    shutil.copytree(tmp_path / "checkpoints" / "step-000000001", stale)
    assert checkpoint.latest(tmp_path) == 1
    saved(tmp_path, 2)
    assert not stale.exists()


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_truncation_or_missing_file_is_found(tmp_path: Path, name: str) -> None:
    saved(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step-000000002" / name
    content = path.read_bytes()
    spread = sorted({*range(0, len(content), max(1, len(content) // 60)), len(content) - 1})
    harmed = [content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :] for at in spread]
    for damaged in [*harmed, content[:-1], b"", content + b" "]:
        path.write_bytes(damaged)
        line = r"step-000000002 is damaged: .*; checkpoints of other steps: 1$"
        with pytest.raises(ValueError, match=line) as refused:
            checkpoint.load(tmp_path)
        assert name in str(refused.value) and "\n" not in str(refused.value)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        checkpoint.load(tmp_path)
    assert_loads(tmp_path, 1, 1)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    os.rename(tmp_path / "checkpoints" / "step-000000001", tmp_path / "checkpoints" / "step-000000009")
    with pytest.raises(ValueError, match=r"manifest\.json is that of step 1"):
        checkpoint.load(tmp_path)


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from workbench.record import checkpoint
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"w": torch.ones(1000)}, {"a": 1.5})
for limit, values in ((50_000, {}), (500_000, {"long": "x" * 600_000})):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(folder, 2, {"w": torch.ones(100_000)}, values)
    except OSError as error:
        print(error)
print(sorted(path.name for path in (folder / "checkpoints").iterdir()))
step, tensors, values = checkpoint.load(folder)
print(step, tensors["w"].sum().item(), values)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no RLIMIT_FSIZE")
def test_a_full_disk_is_one_line_and_the_older_checkpoint_loads(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second, folders, loaded = done.stdout.splitlines()
    for line in (first, second):
        assert line.startswith("the checkpoint of step 2 could not be written in ")
        assert line.endswith("; the newest is still that of step 1")
        assert "File too large" in line
    assert folders == "['step-000000001']"
    assert loaded == "1 1000.0 {'a': 1.5}"
