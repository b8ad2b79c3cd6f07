"""configurator.py over a small script: the ways to set a value, the mistakes a person can make."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import configurator
import train

SCRIPT = '''"""A small script.

python script.py --steps=3
"""
import os
from math import pi
from configurator import run

NAME, CONSTANT = "x", 5
_hidden = 1
computed = os.sep
# optimizer
steps = 10  # updates
batch = 64 * 1024  # tokens, "#" and all
    # that one update sees
# a heading, not a comment of batch
rate: float = 3e-4  # peak
offset = -1.5
start = "a # b"  # prompt
flag = False
compile: bool | None = None
top_k: int | None = None  # likeliest tokens
extra = None
seed: int = None
input: list = []  # text files
sizes: list[int] = [1, 2]
rates = [0.5, 0.25]
names: list[str] | None = None
long = "word " * 30  # ''' + "very " * 40 + '''long

def main(*words):
    what = words[0] if words else ""
    if what == "ours":
        raise ValueError("two\\nlines")
    if what == "open":
        open("missing.txt")
    if what == "library":
        import json
        json.loads("{")
    if what == "memory":
        raise type("OutOfMemoryError", (RuntimeError,), {})(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
    if what == "allocator":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")
    if what == "runtime":
        raise RuntimeError("a bug")
    if what == "import":
        import no_such_module
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "many":
        for i in range(100_000):
            print(i)
    print(steps, *words)

if __name__ == "__main__":
    run(main, globals(), positionals=True)
'''
KINDS = {"steps": int, "batch": int, "rate": float, "offset": float, "start": str, "flag": bool,
         "compile": bool | None, "top_k": int | None, "extra": object, "seed": int | None,
         "input": list, "sizes": list, "rates": list, "names": list | None, "long": str}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the house with one script; the tests stand beside it, in `elsewhere`."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copy(configurator.__file__, folder)
    (folder / "script.py").write_text(SCRIPT)
    for place in ("config", "elsewhere"):
        (folder / place).mkdir()
    (folder / "config" / "small.py").write_text("steps = 7\nbatch = 5 * steps\nrate = 1\n")
    (folder / "config" / "list.py").write_text("sizes = [7]\n")
    before, here = os.getcwd(), configurator.HERE
    os.chdir(folder / "elsewhere")
    configurator.HERE = str(folder)
    yield folder
    os.chdir(before)
    configurator.HERE = here


@pytest.fixture(scope="module")
def code(folder):
    return compile(SCRIPT, folder / "script.py", "exec")


@pytest.fixture
def conf(folder, code):
    """conf(*argv, **options) -> (settings, words) of a fresh script, not run."""
    def conf(*argv, **options):
        space = fresh(folder, code)
        words = configurator.configure(space, argv, **options)
        return space, words
    return conf


def fresh(folder, code):
    space = {"__file__": str(folder / "script.py"), "__name__": "script"}
    exec(code, space)  # noqa: S102
    return space


def script(folder, *argv, **env):
    return subprocess.run([sys.executable, str(folder / "script.py"), *argv], capture_output=True,
                          text=True, errors="replace", check=False, env={**os.environ, **env}, timeout=60)


def test_which_globals_are_settings(folder, code):
    assert list(configurator.find_settings(fresh(folder, code))) == list(KINDS)


@pytest.mark.parametrize("argv, name, value", [
    (["--steps=3"], "steps", 3),
    (["--steps", "-1"], "steps", -1),
    (["--steps=1_000"], "steps", 1000),
    (["--steps=1", "--steps=2"], "steps", 2),
    (["--rate=3"], "rate", 3.0),
    (["--rate", "1e-4"], "rate", 1e-4),
    (["--rate=inf"], "rate", math.inf),
    (["--offset=-2"], "offset", -2.0),
    (["--start=123"], "start", "123"),
    (["--start="], "start", ""),
    (["--start=--a=b 'c' \"d\""], "start", "--a=b 'c' \"d\""),
    (["--start", "-x"], "start", "-x"),
    (["--start", "-h"], "start", "-h"),
    (["--start", "x.py"], "start", "x.py"),
    (["--start=None"], "start", "None"),
    (["--flag"], "flag", True),
    (["--flag", "--flag=False"], "flag", False),
    (["--flag=true"], "flag", True),
    (["--flag=1"], "flag", True),
    (["--flag", "--flag=0"], "flag", False),
    (["--compile"], "compile", True),
    (["--compile", "--compile=None"], "compile", None),
    (["--top-k=5"], "top_k", 5),
    (["--top_k=5", "--top-k", "None"], "top_k", None),
    (["--seed=5", "--seed=None"], "seed", None),
    (["--extra=5"], "extra", 5),
    (["--extra=(1, 'a')"], "extra", (1, "a")),
    (["--extra=plain text"], "extra", "plain text"),
    (["--extra=" + "(" * 500], "extra", "(" * 500),
    (["--input", "a.txt", "config/small.py", "-b", "--flag"], "input",
     ["a.txt", "config/small.py", "-b"]),
    (["--input=a.txt"], "input", ["a.txt"]),
    (["--input=12"], "input", ["12"]),
    (["--input=[1, 'b']"], "input", [1, "b"]),
    (["--input=a.txt", "--input="], "input", []),
    (["--input=", "--input=a.txt"], "input", ["a.txt"]),
    (["config/list.py", "--sizes=3"], "sizes", [3]),
    (["--sizes", "3", "4"], "sizes", [3, 4]),
    (["--sizes=[3]"], "sizes", [3]),
    (["--rates", "1", "2e-1"], "rates", [1.0, 0.2]),
    (["--rates=[1]"], "rates", [1.0]),
    (["--names=1"], "names", ["1"]),
    (["--names", "a", "--names=None"], "names", None),
    (["config/small.py"], "batch", 35),
    (["--steps=2", "config/small.py"], "steps", 7),
    (["config/small.py", "--steps=2"], "steps", 2),
    (["--flag", "config/small.py"], "rate", 1.0),
])
def test_values(conf, argv, name, value):
    space, words = conf(*argv)
    assert space[name] == value and type(space[name]) is type(value)
    assert repr(space[name]) == repr(value)  # the types inside a list, too
    assert words == []


@pytest.mark.parametrize("argv, expected", [
    (["--stepz=3"], "--stepz: unknown setting; did you mean --steps?"),
    (["--qqqq"], "--qqqq: unknown setting; --help lists the settings"),
    (["--CONSTANT=3"], "--CONSTANT: unknown setting"),
    (["--"], "--: unknown setting"),
    (["--steps=3.0"], "--steps: got '3.0', expected int"),
    (["--steps=1e3"], "expected int"),
    (["--steps=True"], "expected int"),
    (["--steps=None"], "--steps: got 'None', expected int"),
    (["--top_k=x"], "--top_k: got 'x', expected int | None"),
    (["--rate=nan"], "--rate: got nan, expected float"),
    (["--rate=fast"], "--rate: got 'fast', expected float"),
    (["--flag=yes"], "--flag: got 'yes', expected bool"),
    (["--sizes", "3", "x"], "--sizes: got 'x', expected int"),
    (["--sizes=[1.5]"], "--sizes: got 1.5, expected int"),
    (["--rates=[1" + "0" * 400 + "]"], "expected float"),
    (["--names=[1]"], "--names: got 1, expected str"),
    (["--steps"], "--steps needs a value: int"),
    (["--start", "--flag"], "--start needs a value"),
    (["--input"], "--input needs a value"),
    (["--input", "--flag"], "--input needs a value"),
    (["--input", "a.txt", "--flag", "--input=b.txt"], "--input is given twice"),
    (["--sizes=3", "config/small.py", "--sizes=4"], "--sizes is given twice"),
    (["word"], "unexpected word 'word'"),
    (["-x"], "unexpected word '-x'"),
    (["--flag", "False"], "unexpected word 'False'"),
    (["config/smal.py"], "no config file 'config/smal.py'; did you mean config/small.py?"),
    (["config/none.py"], "no config file 'config/none.py'; there are: config/list.py, config/small.py"),
    (["\0.py"], "no config file"),
])
def test_mistakes_on_the_command_line(folder, code, argv, expected):
    space = fresh(folder, code)
    before = dict(space)
    with pytest.raises(ValueError) as e:
        configurator.configure(space, ["--steps=99", *argv])
    assert expected in str(e.value) and len(str(e.value).splitlines()) == 1
    assert space == before  # nothing set unless all is valid


@pytest.mark.parametrize("text, expected", [
    (b"stepz = 1", "x.py: stepz: unknown setting; did you mean steps?"),
    (b"CONSTANT = 5", "x.py: CONSTANT: unknown setting"),
    (b"steps = 1.0", "x.py: steps: got 1.0, expected int"),
    (b"steps = True", "x.py: steps: got True, expected int"),
    (b"flag = 1", "x.py: flag: got 1, expected bool"),
    (b"start = 1", "x.py: start: got 1, expected str"),
    (b"start = None", "x.py: start: got None, expected str"),
    (b"import os as start", "x.py: start: got <module"),
    (b"rate = float('nan')", "x.py: rate: got nan, expected float"),
    (b"rate = 10 ** 400", "expected float"),
    (b"sizes = (1, 2)", "x.py: sizes: got (1, 2), expected list[int]"),
    (b"sizes = [1, 'a']", "x.py: sizes: got 'a', expected int"),
    (b"\nsteps = = 1", "x.py:2: SyntaxError: invalid syntax"),
    (b"\n\nsteps = nothing", "x.py:3: NameError: name 'nothing' is not defined"),
    (b"def f():\n  raise OSError('a\\nb')\nf()", "x.py:2: OSError: a b"),
    (b"import json\njson.loads('{')", "x.py:2: JSONDecodeError"),
    (b"start = '\xff'", "x.py"),
    (b"steps = 1\0", "x.py"),
    (None, "x.py: IsADirectoryError"),
])
def test_mistakes_in_a_config(tmp_path, monkeypatch, folder, code, text, expected):
    monkeypatch.chdir(tmp_path)
    Path("x.py").mkdir() if text is None else Path("x.py").write_bytes(text)
    space = fresh(folder, code)
    before = dict(space)
    with pytest.raises(ValueError) as e:
        configurator.configure(space, ["--steps=99", "x.py"])
    assert expected in str(e.value) and len(str(e.value).splitlines()) == 1
    assert "(x.py, line" not in str(e.value) and space == before


def test_config(tmp_path, monkeypatch, conf):
    """It sees the current values, may use helpers, and cannot reach into the script's lists."""
    monkeypatch.chdir(tmp_path)
    Path("x.py").write_text("import os\nfrom math import sqrt\n_n = 3\ndef f(): return _n * steps\n"
                            "class A: pass\nbatch = f()\ninput += ['x']\ntop_k = None\n"
                            "del rate\n")
    assert conf("--steps=2", "x.py", "--steps=4")[0]["batch"] == 6
    Path("bad.py").write_text("sizes.append(3)\nsteps = ''")
    space = conf()[0]
    with pytest.raises(ValueError):
        configurator.configure(space, ["x.py", "bad.py"])
    assert space["sizes"] == [1, 2] and space["input"] == []
    os.mkdir("config")
    Path("config/small.py").write_text("steps = 8")  # the one where the person stands comes first
    assert conf("config/small.py")[0]["steps"] == 8


def test_recipes_find_what_they_share_beside_another_config(tmp_path):
    (tmp_path / "config.py").write_text("")
    subprocess.run([sys.executable, "-c", "import config.muon_cpu"], check=True, timeout=60,
                   cwd=Path(configurator.__file__).parent,
                   env={**os.environ, "PYTHONPATH": str(tmp_path)})


def test_words(conf):
    two = {"commands": ("train", "show")}
    assert conf("--flag", "config/small.py", "show", **two)[1] == ["show"]
    assert conf("show", "a", "--flag", "b.py", **two, positionals=True)[1] == ["show", "a", "b.py"]
    assert conf("show", "config/small.py", **two)[0]["steps"] == 7
    space, words = conf("show", "config/small.py", "-x", **two, positionals=True)  # a file to show
    assert words == ["show", "config/small.py", "-x"] and space["steps"] == 10
    assert conf("a", "b", positionals=True)[1] == ["a", "b"]
    for argv, message in [(["shoe"], "'shoe'; the first word is one of train, show"),
                          ([], "a word is missing; the first word is one of train, show"),
                          (["show", "more"], "unexpected word 'more'")]:
        with pytest.raises(ValueError, match=message):
            conf(*argv, **two)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(conf, capsys, flag):
    with pytest.raises(SystemExit) as e:
        conf("--steps=3", flag, "--nonsense", commands=("a",))
    out = capsys.readouterr().out
    assert e.value.code == 0 and max(map(len, out.splitlines())) <= 100
    assert out.startswith("A small script.\n\npython script.py --steps=3\n")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("--"))
    rows = {name: " ".join(row.split()) for name, row in rows.items()}
    assert list(rows) == [f"--{name}" for name in KINDS]
    assert rows["--steps"] == "10 updates" and rows["--offset"] == "-1.5"
    assert rows["--batch"] == '65536 tokens, "#" and all that one update sees'
    assert rows["--start"] == "'a # b' prompt"
    assert "heading" not in out and out.count("very") == 40


@pytest.mark.parametrize("source, kind", [
    ("x = (1, 2)", "tuple"), ("x: set = {1}", "set"), ("x: int | str = 1", "int | str"),
])
def test_a_type_we_have_no_room_for_is_a_bug_of_the_script(tmp_path, source, kind):
    path = tmp_path / "odd.py"
    path.write_text(source)
    space = {"__file__": str(path)}
    exec(source, space)  # noqa: S102
    with pytest.raises(TypeError) as e:
        configurator.configure(space, [])
    assert f"setting x is a {kind};" in str(e.value)


def test_run(folder):
    done = script(folder, "--steps=4", "word")
    assert (done.returncode, done.stdout, done.stderr) == (0, "4 word\n", "")
    done = script(folder, "--steps=x", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "[rank 1] error: --steps: got 'x', expected int\n"
    done = script(folder, "ours", RANK="0", WORLD_SIZE="1")
    assert (done.returncode, done.stderr) == (2, "error: two lines\n")
    done = script(folder, "“naïve” 😀", PYTHONIOENCODING="cp1252:strict", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\\U0001f600\n")


@pytest.mark.parametrize("word, status, start", [
    ("open", 2, "error: [Errno 2] No such file or directory: 'missing.txt'\n"),
    ("import", 2, "error: No module named 'no_such_module'\n"),
    ("library", 1, "Traceback"),  # a ValueError too, but json's
    ("runtime", 1, "Traceback"),
    ("memory", 2, "error: out of memory (it tried to allocate 2.50 GiB); ask for less at once\n"),
    ("allocator", 2, "error: out of memory (it tried to allocate 9 B); ask for less at once\n"),
    ("interrupt", 130, "interrupted\n"),
])
def test_run_errors(folder, word, status, start):
    done = script(folder, word)
    assert done.returncode == status and done.stderr.startswith(start)
    assert status == 1 or done.stderr == start


@pytest.mark.parametrize("settings, told", [
    ("batch_size = 12", "--batch_size=12 does not fit, --batch_size=6 may"),
    ("batch_size = 1", "ask for less at once"),
    ("batch_size = 32\naccumulation = 2", "--accumulation=4 may fit")])
def test_out_of_memory_names_what_may_fit(tmp_path, settings, told, capsys):
    (tmp_path / "fork.py").write_text(settings)
    space = {"__file__": str(tmp_path / "fork.py")}
    exec(settings, space)  # noqa: S102
    with pytest.raises(SystemExit):
        configurator.run(Mock(side_effect=MemoryError), space, [])
    assert capsys.readouterr().err == f"error: out of memory; {told}\n"


@pytest.mark.parametrize("word", ["many", "--help"])
def test_output_piped_to_something_that_closes(folder, word):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, str(folder / "script.py"), word], stdout=write,
                              stderr=subprocess.PIPE, timeout=60, check=False,
                              env={**os.environ, "PYTHONUNBUFFERED": ""})
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


junk = st.text(max_size=8) | st.sampled_from(
    ["", "-", "--", "=", "None", "True", "nan", "inf", "1e999", "-1", "1_0", "3.5", "[1, 2]",
     "[1", "[[]]", "{[]}", "'", "word", "config/small.py", "none.py", "-x", "9" * 5000, "\ud800",
     "\u2028", "a\nb", "\0", "[nan]", "[1e999]", "(" * 300])
keys = st.sampled_from(list(KINDS)) | st.text(max_size=5)
argument = st.one_of(
    junk, keys.map("--{}".format), st.tuples(keys, junk).map("--{0[0]}={0[1]}".format),
    st.tuples(keys, st.integers() | st.floats()).map("--{0[0]}={0[1]}".format))


@hypothesis_settings(max_examples=400, deadline=None, database=None,
                     suppress_health_check=[HealthCheck.too_slow])
@given(argv=st.lists(argument, max_size=4), positionals=st.booleans())
def test_any_arguments_set_declared_types_or_fail_in_one_line(folder, code, argv, positionals):
    space = fresh(folder, code)
    before = dict(space)
    try:
        words = configurator.configure(space, argv, positionals=positionals)
    except ValueError as e:
        assert len(str(e).splitlines()) == 1 and space == before
        return
    except SystemExit as e:
        assert e.code == 0 and {"-h", "--help"} & set(argv)
        return
    assert words == [] or positionals
    for name, kind in KINDS.items():
        assert isinstance(space[name], kind), name
        assert kind is not int or not isinstance(space[name], bool)
    assert not math.isnan(space["rate"]) and not any(map(math.isnan, space["rates"]))
    assert {type(v) for v in space["sizes"]} <= {int}
    assert {type(v) for v in space["rates"]} <= {float}
    assert {type(v) for v in space["names"] or []} <= {str}


def test_what_people_type(tmp_path, monkeypatch, conf):
    """A home folder after a `=`, a config without its .py, nanoGPT's names, and which settings were given."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "x.py").write_text("steps = 10\nrate = 0.5\n")  # the first is the default
    found, _ = conf("config/x", "--start=~/a b", "--input", "~/x", "~y")
    assert (found["start"], found["input"]) == ("/home/me/a b", ["/home/me/x", "~y"])
    assert found["rate"] == 0.5 and found["_given"] == {"steps", "rate", "start", "input"}
    for name, told in (("eval_iters", "--eval_tokens, in tokens"), ("min_lr", "--min_lr_scale, a fraction of learning_rate"),
                       ("gradient_accumulation_steps", "--total_batch_tokens"), ("backend", "none: it is nccl")):
        with pytest.raises(ValueError, match=f"--{name} is nanoGPT's; here it is {told}"):
            configurator.configure({**vars(train)}, [f"--{name}=3"])
        with pytest.raises(ValueError, match="none: it is nccl" if name == "backend" else "unknown setting"):
            conf(f"--{name}=3")  # a script without what stands for it
    (tmp_path / "gpt.py").write_text("min_lr = 1\nbeta1 = 0.5\nwandb_log = 3\nfoo = 4\n")
    with pytest.raises(ValueError, match=r"gpt.py: min_lr is .*; wandb_log is .*; foo: unknown setting"):
        configurator.configure({**vars(train)}, ["gpt.py"])
