"""The scripts lie one folder above the tests, and are imported from there; what several tests do."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session", autouse=True)
def newest_run_of_the_person():
    """out/.newest is as it was when the tests end."""
    path = HERE / "out" / ".newest"
    before = path.read_bytes() if path.is_file() else None
    yield
    path.unlink(missing_ok=True)
    if before is not None:
        path.write_bytes(before)


@pytest.fixture(autouse=True)
def newest_run_of_a_test(tmp_path, monkeypatch):
    """What a test trains is not the newest run of another."""
    monkeypatch.setattr("checkpoint.NEWEST", tmp_path / ".newest")


@cache
def defaults(module) -> dict:
    """The settings of a script as it comes."""
    from configurator import find_settings
    return {name: default for name, (default, _, _) in find_settings(vars(module)).items()}


def give(module, *argv):
    """Gives a script the settings of a command line, and the others their defaults."""
    from configurator import configure
    vars(module).update(defaults(module))
    configure(vars(module), [str(word) for word in argv])


def start(module, *argv):
    """Runs a script in this process."""
    give(module, *argv)
    module.main()


def python(*argv, fails=False, cwd=None, env=None) -> str:
    """What a Python command prints; one that fails must do so in one line, with exit status 2."""
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True,
                          timeout=300, cwd=cwd, env=os.environ | (env or {}), check=False)
    text = done.stdout + done.stderr
    if fails:
        assert done.returncode == 2, text
        assert "Traceback" not in text and done.stderr.count("\n") == 1, text
    else:
        assert done.returncode == 0, text
    return text


def two_ranks(*argv) -> str:
    """What a script prints on two ranks under torchrun."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv,
                  env={"OMP_NUM_THREADS": "1"})


def rows(out) -> list[dict]:
    """Those of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def untimed(out) -> list[dict]:
    """The rows without what no two runs share."""
    return [{key: value for key, value in row.items() if key not in ("elapsed_s", "tokens_per_s")}
            for row in rows(out)]


def check_equal(one: dict, two: dict, atol: float = 0.0):
    """Tensors by name: the same, or no further apart than atol."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() <= atol, name
