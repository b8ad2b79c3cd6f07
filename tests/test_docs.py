"""README and docs: every command has a script, settings and configs that exist, every link leads
somewhere, the Python for a notebook runs, and README stays a front page; docs/base_text.py."""

import importlib
import json
import lzma
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from configurator import configure

HERE = Path(__file__).resolve().parent.parent
PAGES = [HERE / "README.md", *sorted(HERE.glob("docs/*.md"))]
FREE_WORDS = ("tokenizer.py", "bench.py", "compare.py")  # scripts that take words of their own
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path):
    """(script, its words) of each command in a block of the shell, or between backticks."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    for line in [*lines, *(code for code in inline if re.match(r"(\w+=\S+ )*python ", code))]:
        words = shlex.split(line, comments=True)
        scripts = [i for i, word in enumerate(words) if re.fullmatch(r"\w+\.py", word)]
        if scripts and "…" not in line:
            stops = [i for i, word in enumerate(words) if word in ("&&", "|", ">")]
            last = next((i for i in stops if i > scripts[0]), len(words))
            yield words[scripts[0]], words[scripts[0] + 1:last]


@named
def test_commands(page):
    for script, words in commands(page):
        assert (HERE / script).is_file(), script
        settings = vars(importlib.import_module(script.removesuffix(".py"))).copy()
        configure(settings, words, positionals=script in FREE_WORDS)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named
def test_links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@named
def test_notebook_code(page):
    for code in blocks(page, "python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                              text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr


def test_front_page():
    lines = PAGES[0].read_text("utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100
    for name, count in re.findall(r"(\w+\.py) (\d+)", "\n".join(lines)):
        real = len((HERE / name).read_text("utf-8").splitlines())
        assert abs(int(count) - real) <= 0.1 * real, f"{name} has {real} lines"


def test_base_text_leaves_out_what_is_reported_on(tmp_path):
    """docs/base_text.py: no review that shares 12 words with one of a test set; pairs together."""
    def write(name, columns, *rows):
        lines = ["\t".join(row) + "\n" for row in (columns, *rows)]
        (tmp_path / name).write_text("".join(lines), "utf-8")

    def reviews(name, texts):
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    eleven = "one Two three four five six seven, eight nine ten eleven"
    reviews("train", [f"Review {i}." for i in range(755)] + [f"It has {eleven} <br />twelve."])
    letters = "a b c d e f g h i j k l"
    reviews("unsup", [f"{eleven} and no more", f"Well, {eleven} THIRTEEN!", f"See {letters}."])
    reviews("test_10k", ["It is a test, with " + eleven + " thirteen."])
    for part, text in (("dev", f"{eleven} twelve"), ("test-student", letters)):
        write(f"ids-cfimdb-{part}.csv", ("id", "sentence"), ("1", text))
    write("ids-sst-train.csv", ("id", "sentence", "sentiment"), ("1", "A joy.", "4"))
    write("quora-train.csv", ("sentence1", "sentence2", "is_duplicate"), ("Why?", "How?", "0"))
    write("msr_paraphrase_train.txt", ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
          ("1", "7", "8", 'He "said', "He spoke"), ("1", "-1", "-1", "no", "news"))
    subprocess.run([sys.executable, HERE / "docs/base_text.py", *[tmp_path] * 3, tmp_path / "out"],
                   check=True, capture_output=True)
    train, val = ([json.loads(line)["text"] for line in
                   (tmp_path / "out" / f"{name}.jsonl").read_text("utf-8").splitlines()]
                  for name in ("train", "val"))
    assert len(val) == 750 and len({*train, *val}) == 755 + 1 + 5  # one of four with such words
    assert f"{eleven} and no more" in {*train, *val} and train.count("A joy.") == 2
    for one, two in (("Why?", "How?"), ('He "said', "He spoke")):
        for a, b in ((one, two), (two, one)):
            assert sum(pair == (a, b) for pair in pairwise(train)) >= 2
