"""Sonnets: files in and out, decoding in a batch and alone, measures against sacrebleu's own."""

import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HERE, check_equal, defaults, give, python, rows, start, untimed

import sonnet as script
from checkpoint import load_model, save_best
from decode import beam_search
from hf import load_torch
from model import GPT, GPTConfig, draw
from tokenizer import char_tokenizer, open_tokenizer

COURSE = HERE / "../shared/data/cs224n"
WORDS = ["rose", "time", "eyes", "love", "sweet", "fair", "summer", "death", "world", "beauty",
         "heart", "night", "day", "thee", "thy", "self", "old", "young", "hand", "art"]
TINY = ["--init_from=scratch", "--tokenizer=bytes", "--n_layer=1", "--n_head=2", "--n_embd=16",
        "--block_size=640", "--epochs=1", "--candidates=2", "--max_new_tokens=40", "--device=cpu"]

defaults(script)  # now, before a test changes them


@pytest.fixture(autouse=True)
def settings():
    give(script)


def invented(number: int, lines: int = 14) -> str:
    """A poem whose last two lines are indented."""
    rng = random.Random(number)
    text = [" ".join(rng.choices(WORDS, k=6)).capitalize() + "," for _ in range(lines)]
    return "\n".join([*text[:-2], *(f"  {line}" for line in text[-2:])])


def layout(poems: dict, end="\n") -> bytes:
    text = "Sonnets\nby nobody\nCreated on Jul 31, 2015\n\n\n\n\n"
    text += "".join(f"{number}\n\n{poem}\n\n" for number, poem in poems.items())
    return text.replace("\n", end).encode()


def course(folder, **changed) -> Path:
    """A folder in the course's format: 9 poems to train on, 3 for dev, 2 prompts for test. Changed:
    poems, or bytes, in place of `train`, `dev`, `gold` or `test`."""
    folder.mkdir(exist_ok=True)
    gold = {number: invented(number) for number in (132, 133, 134)}
    poems = {"train": {number: invented(number) for number in range(1, 10)}, "gold": gold,
             "dev": {n: "\n".join(poem.split("\n")[:3]) for n, poem in gold.items()},
             "test": {number: "\n".join(invented(number).split("\n")[:3]) for number in (145, 146)}}
    for part, file in zip(("train", "dev", "gold", "test"), script.FILES):
        content = changed.get(part, poems[part])
        (folder / file).write_bytes(content if isinstance(content, bytes) else layout(content))
    return folder


def run(folder, out, *argv) -> dict:
    start(script, *TINY, f"--data_dir={folder}", f"--out_dir={out}", *argv)
    results = Path(out) / "results.json"
    return json.loads(results.read_text("utf-8")) if results.is_file() else None


def dev_losses(out) -> list[float]:
    return [row["val_loss"] for row in rows(out) if "val_loss" in row]


def tiny(vocab_size: int, block_size: int = 64) -> GPT:
    """All parameters random at std 0.3, in float64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, 2, 2, 16)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


# ---- files ----

@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_poems_are_read_as_they_stand(tmp_path, end):
    poems = {99: invented(99, 15), 126: invented(126, 12), 132: invented(132)}
    (tmp_path / "s.txt").write_bytes(b"\xef\xbb\xbf" + layout(poems, end))
    read = script.read_poems(tmp_path / "s.txt")
    assert read == poems and list(read) == [99, 126, 132]
    assert [poem.count("\n") + 1 for poem in read.values()] == [15, 12, 14]
    assert read[132].split("\n")[12].startswith("  ")


def test_the_courses_own_files():
    if not COURSE.is_dir():
        pytest.skip("../shared/data/cs224n is not here")
    train, dev, gold, test = script.read_data(str(COURSE))
    assert list(train) == list(range(1, 132)) and list(test) == list(range(145, 157))
    assert list(dev) == list(gold) == list(range(132, 144))
    lines = {number: poem.count("\n") + 1 for number, poem in train.items()}
    assert (lines.pop(99), lines.pop(126)) == (15, 12) and set(lines.values()) == {14}
    assert all(prompt.count("\n") == 2 for prompt in (dev | test).values())
    assert not any("\r" in poem for poem in train.values())

    def judge(poems):
        return script.measure(poems, dev, gold, set())
    found = script.baselines(train, dev, gold, judge)
    drawn = found["random training sonnets"]
    assert abs(drawn["chrf"] - 41.5) < 0.3 and abs(drawn["chrf_continuation"] - 26.2) < 0.3
    assert 0.2 < drawn["deviation"] < 0.7
    assert found["the true poems"]["chrf"] == pytest.approx(100)


def test_poems_are_closed_and_padding_is_never_trained_on():
    tok, model = open_tokenizer("bytes"), tiny(256, 700)
    poems = {1: invented(1), 2: invented(2, 5), 3: "O\n  me"}
    rows = script.encode(poems, tok, 700)
    assert all(row[0] == row[-1] == tok.eos_id and tok.eos_id not in row[1:-1] for row in rows)
    assert [tok.decode(row[1:-1]) for row in rows] == list(poems.values())
    assert script.encode(poems, tok, max(map(len, rows)) - 1) == rows  # the last id is never read
    ids, targets = script.collate(rows, "cpu")
    assert (targets >= 0).sum(1).tolist() == [len(row) - 1 for row in rows]
    alone = [model(torch.tensor([row[:-1]]), torch.tensor([row[1:]]))[1].item() for row in rows]
    mean = sum(loss * (len(row) - 1) for loss, row in zip(alone, rows)) / sum(
        len(row) - 1 for row in rows)
    assert model(ids, targets)[1].item() == pytest.approx(mean, abs=1e-12)


def test_prompts_are_the_beginnings_of_poems_in_tokens():
    tok = open_tokenizer("bytes")
    poem = invented(1)
    prompt = "\n".join(poem.split("\n")[:3])
    whole, begun = (script.encode({1: text}, tok, 700, w)[0] for text, w in ((poem, True),
                                                                             (prompt, False)))
    assert whole[:len(begun)] == begun and begun[-1] == ord("\n")


# ---- decoding ----

CHARS = char_tokenizer("ab \n", "|")  # breaks and end-of-text are often drawn
PROMPTS = [[4, 2, 3, 0], [4, 2, 0, 2, 2, 3, 1, 3, 0], [4, 0], [4, 3, 3, 1, 0]]


def plainly(model, row, u=None) -> list[int]:
    """What follows a prompt, without cache, padding or batch; u: its uniform numbers."""
    ids = list(row)
    for i in range(script.max_new_tokens):
        logits = model(torch.tensor([ids]))[0][:, -1]
        token = (logits.argmax(-1) if u is None else
                 draw(logits, u[i].view(1, 1), 1.3, 4, 0.95)).item()
        ids.append(token)
        *lines, _ = CHARS.decode(ids).split("\n")
        if token == 4 or sum(bool(line.strip()) for line in lines) == 14:
            break
    return ids[len(row):]


@pytest.mark.parametrize("read", [1, 16])
def test_a_batch_decodes_as_one_at_a_time(monkeypatch, read):
    monkeypatch.setattr(script, "READ", {"cpu": read})
    model, script.max_new_tokens = tiny(5), 40
    assert CHARS.eos_id == 4 and CHARS.tokens[0] == b"\n"
    greedy = script.continue_rows(model, CHARS, PROMPTS, None, temperature=0.0)
    assert greedy == [plainly(model, row) for row in PROMPTS]
    rows = PROMPTS * 5
    found = script.continue_rows(model, CHARS, rows, torch.Generator().manual_seed(3),
                                 temperature=1.3, top_k=4, top_p=0.95)
    first = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(3)).item()
    u = [torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(first + i))
         for i in range(len(rows))]
    assert found == [plainly(model, row, u[i]) for i, row in enumerate(rows)]
    ends = [new[-1] for new in found]
    assert 4 in ends and len({tuple(new) for new in found}) > 10


@pytest.mark.parametrize("read", [1, 16])
def test_decoding_stops_at_fourteen_lines(monkeypatch, read):
    monkeypatch.setattr(script, "READ", {"cpu": read})
    model = tiny(5, block_size=160)
    monkeypatch.setattr(script, "max_new_tokens", 150)
    model.lm_head = torch.nn.Linear(16, 5).double()
    with torch.no_grad():  # whatever came before: a break, or an "a"
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.tensor([0.0, -99, 0.0, -99, -99]))
    steps, stream = [], model.stream
    model.stream = lambda *args: (steps.append(token) or token for token in stream(*args))
    for new, row in zip(script.continue_rows(model, CHARS, PROMPTS, torch.Generator()), PROMPTS):
        lines = CHARS.decode(row + new).split("\n")
        assert sum(bool(line.strip()) for line in lines) == 14 and new[-1] == 0
    assert 12 < len(steps) < 150  # the batch ends when all have


def test_blank_lines_do_not_count(monkeypatch):
    monkeypatch.setattr(script, "max_new_tokens", 200)
    model, tok = tiny(256, block_size=256), open_tokenizer("bytes")
    told = tok.encode("".join(f"line {n},\n\n" for n in range(4, 17))).tolist()
    model.stream = lambda idx, n, *options: (torch.tensor([token] * len(idx)) for token in told[:n])
    row = [tok.eos_id, *b"a\nb\nc\n"]
    new, = script.continue_rows(model, tok, [row], None)
    assert tok.decode(new).split() == [word for n in range(4, 15) for word in ("line", f"{n},")]


def test_beams_of_many_prompts_are_those_of_each():
    model, script.max_new_tokens = tiny(5), 20
    many = script.continue_rows(model, CHARS, PROMPTS, None, num_beams=3)
    for row, new in zip(PROMPTS, many):
        assert [new] == script.continue_rows(model, CHARS, [row], None, num_beams=3)
        ids = beam_search(model, torch.tensor([row]), 20, 3, eos_id=4)[0][0].tolist()
        assert ids[len(row):][:len(new)] == new
        assert len(new) == len(ids) - len(row) or new[-1] == 4


def test_the_likeliest_candidate_is_taken():
    model, script.max_new_tokens, script.candidates = tiny(5), 30, 6
    prompts = {7: "ab a", 9: "b\n  aa", 4: "a"}
    poems, scores = script.finish(model, CHARS, prompts, {"temperature": 1.0})
    assert poems == script.finish(model, CHARS, prompts, {"temperature": 1.0})[0]  # of one seed
    rows = script.encode(prompts, CHARS, 64, whole=False)
    drawn = script.continue_rows(model, CHARS, [row for row in rows for _ in range(6)],
                                 torch.Generator().manual_seed(script.seed))
    for i, (number, row) in enumerate(zip(prompts, rows)):
        logs = []
        for new in drawn[6 * i:6 * i + 6]:
            ids = torch.tensor(row + new)
            each = model(ids[None])[0][0].log_softmax(-1)[:-1].gather(1, ids[1:, None])
            logs.append(each[len(row) - 1:].mean().item())
        assert scores[number] == pytest.approx(max(logs), abs=1e-6) and len(set(logs)) > 3
        assert poems[number].startswith(prompts[number])
        best = drawn[6 * i + logs.index(max(logs))]
        text = CHARS.decode([t for t in best if t != 4])
        assert poems[number].split() == f"{prompts[number]}\n{text}".split()
    script.seed = 1
    assert poems != script.finish(model, CHARS, prompts, {"temperature": 1.0})[0]


# ---- measures ----

def test_measures_by_hand():
    prompts = {1: "a b\nc d\ne f", 2: "u v\nw x\ny z"}
    poems = {1: prompts[1] + "\nOne two three four five, six;\n  one two", 2: prompts[2] + "\nTwo"}
    known = set(script.ngrams(script.words("And one, two three\n four FIVE"), 5))
    found = script.measure(poems, prompts, poems, known)
    assert found["chrf"] == found["chrf_continuation"] == pytest.approx(100)
    assert found["lines"] == 4.5 and found["copied_5grams"] == 1 / 4  # of 4 5-grams, one
    assert found["distinct_1"] == 6 / 9 and found["distinct_2"] == 6 / 7
    assert script.measure(prompts, prompts, poems, known)["chrf_continuation"] == 0


def test_rhymes():
    pytest.importorskip("pronouncing")
    ends = ["day", "night", "may", "light", "love", "moon", "above", "star", "fire", "sea",
            "desire", "free", "hand", "hand"]
    poem = "\n".join(f"it was the {end}," for end in ends)
    prompt = "\n".join(poem.split("\n")[:3])
    # day/may is the prompt's; of the 6 others moon/star is no rhyme, nor a word with itself
    assert script.rhyme_hits(poem, prompt) == 4 / 6
    assert script.rhyme_hits(prompt, prompt) == 0
    assert script.rhyme_hits(poem, poem) is None  # nothing is left to rhyme; others still count
    poems = {1: poem, 2: poem}
    assert script.measure(poems, {1: poem, 2: prompt}, poems, set())["rhymes"] == 4 / 6


# ---- the whole ----

def test_a_run_and_its_files(tmp_path, capsys):
    folder, out = course(tmp_path / "data"), tmp_path / "out"
    found = run(folder, out, "--temperature=1.0")
    for name, key in (("poems", "chrf"), ("continuations", "chrf_continuation")):
        files = [out / f"dev_{name}_{kind}.txt" for kind in ("references", "hypotheses")]
        assert [len(file.read_text("utf-8").splitlines()) for file in files] == [3, 3]
        said = subprocess.run([sys.executable, "-m", "sacrebleu", files[0], "-i", files[1],
                               "-m", "chrf", "-b", "-w", "10"],
                              capture_output=True, text=True, check=True)
        assert float(said.stdout) == pytest.approx(found[key], abs=1e-8) and 0 < found[key] < 100
    test, done = script.read_poems(folder / script.FILES[3]), (out / "generated_sonnets.txt")
    poems = script.read_poems(done)
    assert list(poems) == [145, 146] and all(p.startswith(test[n]) for n, p in poems.items())
    assert list(script.read_poems(out / "generated_dev.txt")) == [132, 133, 134]
    shown = capsys.readouterr().out
    assert "poem 133" in shown and "the prompt repeated" in shown and "random training" in shown
    model, tok = load_model(out)
    dev = script.collate(script.encode(script.read_poems(folder / script.FILES[2]), tok, 640), "cpu")
    assert model(*dev)[1].item() == pytest.approx(found["dev_loss"], abs=1e-5)
    losses = dev_losses(out)
    assert len(losses) == 2 and min(losses) == pytest.approx(found["dev_loss"], abs=1e-5)
    letters = sum(len(poem.encode()) for poem in script.read_poems(folder / script.FILES[2]).values())
    assert found["bits_per_byte"] == pytest.approx(
        found["dev_loss"] / math.log(2) * (letters + 3) / letters)  # a byte a token, and the ends

    text = done.read_text("utf-8")
    again = run(folder, tmp_path / "again", "--temperature=1.0")
    assert (tmp_path / "again" / "generated_sonnets.txt").read_text("utf-8") == text
    assert again["dev_loss"] == found["dev_loss"]
    run(folder, tmp_path / "third", f"--init_from={out}", "--epochs=0", "--temperature=1.0",
        "--cs224n")  # the model as it is, in the course's layout
    assert (tmp_path / "third" / "generated_sonnets.txt").read_text("utf-8") == (
        "--Generated Sonnets-- \n\n" + "".join(f"\n{n}\n{poem}\n\n" for n, poem in poems.items()))
    assert run(folder, tmp_path / "fourth", "--temperature=1.0", "--seed=2")["dev_loss"] != (
        found["dev_loss"])


def test_the_sweeps_winner_writes_the_test_poems(tmp_path):
    folder = course(tmp_path / "data")
    found = run(folder, tmp_path, "--sweep", "--max_new_tokens=12")
    assert len(found["tried"]) == len(script.SWEEP)
    best = max(found["tried"], key=lambda name: found["tried"][name]["chrf_continuation"])
    assert ", ".join(f"{name} {value}" for name, value in found["decoding"].items()) == best
    assert found["chrf_continuation"] == found["tried"][best]["chrf_continuation"]
    model, tok = load_model(tmp_path)
    test = script.read_poems(folder / script.FILES[3])
    assert script.read_poems(tmp_path / "generated_sonnets.txt") == script.finish(
        script.prepare(model), tok, test, found["decoding"])[0]


def test_training_keeps_the_best_epoch_and_stops(tmp_path):
    folder = course(tmp_path / "data")
    run(folder, tmp_path / "a", "--epochs=6", "--learning_rate=0.01", "--patience=6")
    losses = dev_losses(tmp_path / "a")
    assert len(losses) == 7 and losses[-1] < losses[0] - 1
    found = run(folder, tmp_path / "b", f"--init_from={tmp_path / 'a'}", "--epochs=9",
                "--learning_rate=1.0", "--patience=2")  # far too much: nothing gets better
    assert found["best_epoch"] == 0
    assert len(dev_losses(tmp_path / "b")) == 3
    again = run(folder, tmp_path / "b", "--init_from=resume", "--epochs=9", "--patience=2",
                "--learning_rate=1.0")  # one that has stopped by itself trains no further
    assert again["best_epoch"] == 0 and len(dev_losses(tmp_path / "b")) == 3
    check_equal(*(load_model(tmp_path / name)[0].state_dict() for name in "ab"))


def test_parts_of_the_model(tmp_path):
    folder, base = course(tmp_path / "data"), tmp_path / "base"
    run(folder, base, "--n_layer=2", "--epochs=0")
    before = load_model(base)[0].state_dict()
    for mode, moved in (("lora", lambda name: ".h." in name and name.endswith("weight")
                         and "ln_" not in name),
                        ("last_blocks", lambda name: ".h.1." in name or ".ln_f." in name)):
        run(folder, tmp_path / mode, f"--init_from={base}", f"--mode={mode}", "--train_blocks=1",
            "--lora_rank=2", "--learning_rate=0.01")
        after = load_model(tmp_path / mode)[0].state_dict()
        assert after.keys() == before.keys()
        for name in before:
            assert torch.equal(before[name], after[name]) != moved(name), (mode, name)


BEGIN = {number: "\n".join(invented(number).split("\n")[:3]) for number in (5, 132, 133, 134, 135)}


@pytest.mark.parametrize(("changed", "argv", "said"), [
    ({"train": b"From fairest creatures\nwe desire\n"}, [], "sonnets.txt has no numbers"),
    ({"test": {5: BEGIN[5]}}, [], "poem 5 of .* held out, too; --allow_overlap"),
    ({"dev": {n: BEGIN[n] for n in (132, 133, 134, 135)}}, [], "poem 135 is not begun in "),
    ({"gold": {n: invented(n) for n in (132, 134)}}, [], "poem 133 is not begun in .* whole in"),
    ({"gold": {n: invented(n) for n in (132, 133, 134, 136)}}, [], "poem 136 is not begun in"),
    ({"gold": {n: invented(n + (n == 133)) for n in (132, 133, 134)}}, [], "poem 133 .* whole in"),
    ({"dev": {n: invented(n) for n in (132, 133, 134)}}, [], "poem 132 .* whole in"),
    ({"train": {1: invented(1), 2: ""}}, [], "poem 2 is empty"),
    ({"train": layout({1: "a"}) + layout({1: "a"})}, [], "poem 1 is there twice"),
    ({"train": layout({1: "a"}) + b"\xff"}, [], "not UTF-8"),
    ({"train": {1: invented(1), 8: invented(8, 40)}}, [], "poem 8 has .* of 640 fits 639"),
    ({"test": {145: invented(145, 40)}}, [], "poem 145 has .* of 640 fits 638"),
    ({}, ["--init_from=scratch", "--tokenizer=CHAR"], "no end-of-text"),
    ({}, ["--init_from=scratch", "--tokenizer=FEW"], "poem 1: character"),
    ({}, ["--num_beams=99999"], r"num_beams must be in 1 … \d+"),
    ({}, ["--candidates=0"], "candidates must be at least 1, got 0"),
    ({}, ["--mode=last_layer"], "mode must be full or lora or last_blocks, got 'last_layer'"),
])
def test_bad_input_is_one_line(tmp_path, changed, argv, said):
    folder = course(tmp_path / "data", **changed)
    for name, tok in (("CHAR", char_tokenizer([invented(n) for n in range(200)])),
                      ("FEW", char_tokenizer("abc", "|"))):
        (tmp_path / name).write_text(tok.to_json())
        argv = [word.replace(name, str(tmp_path / name)) for word in argv]
    with pytest.raises(ValueError, match=said) as caught:
        run(folder, tmp_path / "out", *argv)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "best").exists()  # before anything is trained or written


def test_overlap_can_be_allowed(tmp_path):
    folder = course(tmp_path / "data", test={5: BEGIN[5]})
    run(folder, tmp_path / "out", "--allow_overlap")
    assert list(script.read_poems(tmp_path / "out" / "generated_sonnets.txt")) == [5]


def test_without_data_it_says_where_to_get_it(tmp_path):
    folder = course(tmp_path / "data")
    (folder / script.FILES[2]).unlink()
    said = [python(HERE / "sonnet.py", f"--out_dir={tmp_path / 'out'}", fails=True)]
    for name in (tmp_path, folder):
        with pytest.raises(ValueError, match="CS224n") as caught:
            run(name, tmp_path / "out")
        said.append(str(caught.value))
    assert all(word in text for text in said for word in (script.FILES[2], "--data_dir", "number"))
    assert script.FILES[0] in said[1] and script.FILES[0] not in said[2]  # what is there of them


def test_it_runs_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr("device.Device", lambda *args: SimpleNamespace(world=2, type="cpu"))
    with pytest.raises(ValueError, match="one process"):
        run(course(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys):
    folder, options = course(tmp_path / "data"), ["--epochs=3", "--mode=lora", "--log_interval=1"]
    whole, kept = run(folder, tmp_path / "whole", *options), []

    def save_and_stop(*args):
        save_best(*args)
        kept.append(args)
        if len(kept) == 2:  # after the first epoch
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(script, "save_best", save_and_stop)
    assert run(folder, tmp_path / "cut", *options) is None  # no results yet
    assert "stopped by SIGTERM at step 3; go on with: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="n_embd=16, not 32"):
        run(folder, tmp_path / "cut", *options, "--init_from=resume", "--n_embd=32")
    changed = course(tmp_path / "changed", gold={n: invented(n) + "!" for n in (132, 133, 134)})
    with pytest.raises(ValueError, match="trained on other data"):
        run(changed, tmp_path / "cut", *options, "--init_from=resume")
    cut = run(folder, tmp_path / "cut", *options, "--init_from=resume")
    for key in whole.keys() - {"seconds", "settings"}:
        assert whole[key] == cut[key], key
    one, two = (load_torch(tmp_path / name / "ckpt.pt") for name in ("whole", "cut"))
    assert one["step"] == two["step"] == 6 and one["best_loss"] == two["best_loss"]
    check_equal(one["model"], two["model"])
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"holds a run already \(best, ckpt.pt, results.json\)"):
        run(folder, tmp_path / "cut", "--epochs=0")
    found = run(folder, tmp_path / "cut", "--epochs=0", "--overwrite", "--seed=2")
    assert found["best_epoch"] == 0 and not (tmp_path / "cut" / "ckpt.pt").exists()


def test_a_base_model_of_other_sizes_is_resumed(tmp_path, monkeypatch):
    """By the command that is printed, which names no sizes."""
    folder = course(tmp_path / "data")
    assert run(folder, tmp_path / "base", "--epochs=1")
    update = script.Run.update
    monkeypatch.setattr(script.Run, "update", lambda *args, **more: (
        signal.raise_signal(signal.SIGTERM), update(*args, **more)))
    argv = ["--device=cpu", f"--data_dir={folder}", f"--out_dir={tmp_path}/cut", "--epochs=2",
            "--max_new_tokens=8", "--candidates=1"]
    start(script, *argv, f"--init_from={tmp_path}/base")
    assert load_torch(tmp_path / "cut" / "ckpt.pt")["step"] == 1
    monkeypatch.undo()
    start(script, *argv, "--init_from=resume")
    saved = load_torch(tmp_path / "cut" / "ckpt.pt")
    assert saved["config"]["n_embd"] == 16 and saved["step"] > 1


def test_words_of_a_verse():
    assert script.words("Feed'st thy 'self-substantial' fuel; -- '") == [
        "feed'st", "thy", "self", "substantial", "fuel"]
