"""The changes of docs/hacking.md: each applied to a copy of the tree, which then trains, resumes,
evaluates, samples and exports as the unchanged tree does, plain and accelerated."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
DIFFS = dict(re.findall(r"^## (.+?)\n.*?```diff\n(.*?)```", (HERE / "docs/hacking.md").read_text("utf-8"),
                        re.DOTALL | re.MULTILINE))
OPTIONS = {"Squared ReLU": "--activation=relu2", "Rotary positions": "--rotary", "RMSNorm": "--rms_norm",
           "A sliding window": "--window=5", "Lion": "--optimizer=lion", "Label smoothing": "",
           "A metric of one's own": "", "Class weights": ""}

PIPELINE = '''
import contextlib, io, json, math, os, re, sys
import torch
import checkpoint, convert, decode, device, ops, run, train
from configurator import configure, find_settings
from data import write_data
from model import GPT, GPTConfig
from tokenizer import open_tokenizer

option = sys.argv[1:]
ops.THRESHOLDS.update(dict.fromkeys(ops.THRESHOLDS, 0))
text = "the cat sat on the mat and ran far away from the dog. " * 90
write_data("./data/t", open_tokenizer("bytes"), {"train": [text, text[::-1]], "val": [text[:700]]})

def script(module, *argv):
    """What a script prints, started from its defaults."""
    settings = vars(module)
    settings.update({name: default for name, (default, _, _) in DEFAULTS[module].items()})
    configure(settings, [*argv])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        module.main()
    return out.getvalue()

DEFAULTS = {module: find_settings(vars(module)) for module in (train, convert)}
COMMON = ["--dataset=./data/t", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=4",
          "--device=cpu", "--sample_tokens=4", "--eval_interval=2", "--log_interval=1", "--lr_schedule=constant",
          "--warmup_steps=0", "--dropout=0.1", "--learning_rate=1e-2", *option]

# ---- a resumed run is an uninterrupted one ----
said = script(train, *COMMON, "--max_steps=4", "--out_dir=out/four")
script(train, *COMMON, "--max_steps=2", "--out_dir=out/cut")
script(train, *COMMON, "--max_steps=4", "--out_dir=out/cut", "--init_from=resume")
four, cut = (torch.load(f"out/{name}/ckpt.pt") for name in ("four", "cut"))
for name, tensor in four["model"].items():
    assert torch.equal(tensor, cut["model"][name]), name
row = json.loads(open("out/four/metrics.jsonl").readlines()[-1])
if "--optimizer" not in str(option):  # plain, the same to rounding
    accelerate, device.accelerate = device.accelerate, lambda model: model
    script(train, *COMMON, "--max_steps=4", "--out_dir=out/plain")
    device.accelerate = accelerate
    plain = json.loads(open("out/plain/metrics.jsonl").readlines()[-1])
    assert math.isclose(row["train_loss"], plain["train_loss"], rel_tol=1e-3), (row, plain)

# ---- the evaluation of the best model is that of the training ----
found = script(train, *COMMON, "--eval_only", "--init_from=out/four")
best = min(json.loads(line).get("val_loss", 9) for line in open("out/four/metrics.jsonl"))
assert f"loss {best:.4f}" in found, (best, found)

# ---- losses and gradients, plain and accelerated ----
config = GPTConfig(**four["config"] | {"dropout": 0.0})
losses = []
for fast in (False, True):
    torch.manual_seed(0)
    model = GPT(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    if fast:
        ops.accelerate(model)
    x = torch.randint(256, (3, 33), generator=torch.Generator().manual_seed(1))
    loss = model(x[:, :-1], x[:, 1:])[1]
    loss.backward()
    losses.append([loss, *(p.grad for p in model.parameters())])
for a, b in zip(*losses):
    assert (a - b).abs().max() < 1e-10

# ---- decoding ----
model, tokenizer = checkpoint.load_model("out/four")
assert model.config == GPTConfig(**four["config"])
model = model.double()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.2)
prompt = x[:2, :7]
wanted = prompt
for _ in range(20):  # by full forward passes
    wanted = torch.cat([wanted, model(wanted)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
assert torch.equal(model.generate(prompt, 20, temperature=0), wanted)
short = model.generate(prompt[:1, 3:], 20, temperature=0)
idx, mask = decode.left_padded([prompt[0, 3:].tolist(), prompt[1].tolist()], "cpu")
assert torch.equal(model.generate(idx, 20, temperature=0, attention_mask=mask)[0, 3:], short[0])
step = model.next_logits = decode.GraphedStep(model)  # the step that a GPU replays
assert torch.equal(model.generate(prompt, 20, temperature=0), wanted)
assert torch.equal(model.generate(idx, 20, temperature=0, attention_mask=mask)[0, 3:], short[0])
del model.next_logits
model, before = model.float(), model.float()(wanted)[0]
after = decode.prepare(model, "int8")(wanted)[0]
assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()

# ---- exported, transformers computes the same or refuses ----
config = json.load(open("out/four/best/config.json"))
if option and "--optimizer" not in option[0]:
    import transformers
    said = script(convert, "--input=out/four", "--out=export")
    if "talegpt" not in config:
        assert "checked" in said and "not checked" not in said, said
    else:
        assert config["model_type"] == "talegpt"
        for kind in (transformers.AutoModelForCausalLM, transformers.GPT2LMHeadModel):
            try:
                kind.from_pretrained("export")
            except (ValueError, RuntimeError, KeyError):
                continue
            raise AssertionError(f"{kind} loads another network")
print(json.dumps({"said": said, "row": row}))
'''

CLASSES = '''
import contextlib, io, json, random
import torch
import finetune_cls
from configurator import configure
from model import GPT, GPTConfig
from tokenizer import open_tokenizer

tokenizer = open_tokenizer("bytes")
torch.manual_seed(0)
GPT(GPTConfig(64, 256, 1, 2, 16)).save_pretrained("base", tokenizer.eos_id)
tokenizer.save("base")
words = [("rare good", "a"), ("bad bad", "b"), ("poor", "b"), ("awful", "b")]
with open("t.csv", "w") as file:
    file.write("text,label\\n" + "".join(f"{text},{label}\\n" for text, label in words * 20))
losses = []
for number, weights in enumerate(([], ["--class_weights", "1", "1"], ["--class_weights", "9", "1"])):
    configure(vars(finetune_cls), ["--init_from=base", "--train_file=t.csv", "--epochs=1", "--device=cpu",
                                   "--log_interval=1", f"--out_dir=out/{number}", *weights])
    with contextlib.redirect_stdout(io.StringIO()):
        finetune_cls.main()
    rows = [json.loads(line) for line in open(f"out/{number}/metrics.jsonl")]
    losses.append([row["train_loss"] for row in rows])
assert losses[0] == losses[1] != losses[2], losses
print(json.dumps({}))
'''


def test_every_change_is_tried():
    assert DIFFS.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_change(tmp_path, name):
    shutil.copytree(HERE, tmp_path / "tree", ignore=lambda folder, names: [
        n for n in names if not (n.endswith(".py") or n == "config")])
    tree = tmp_path / "tree"
    (tmp_path / "diff").write_text(DIFFS[name], encoding="utf-8")
    done = subprocess.run(["git", "apply", "--verbose", tmp_path / "diff"], cwd=tree, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, f"docs/hacking.md, {name}, no longer applies: {done.stderr}"
    changed = [line for line in DIFFS[name].splitlines() if re.match(r"[+-](?![+-]{2})", line)]
    files = DIFFS[name].count("\n+++ ")
    if name == "Rotary positions":
        assert files <= 2 and len(changed) <= 25 + sum(line[0] == "-" for line in changed)
    if name == "Lion":
        assert files == 1 and len(changed) <= 20
    code, option = (CLASSES, []) if name == "Class weights" else (PIPELINE, OPTIONS[name].split())
    done = subprocess.run([sys.executable, "-c", code, *option], cwd=tree, capture_output=True, text=True,
                          check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "A metric of one's own":
        assert "wte_norm" in done.stdout.splitlines()[-1] and '"wte_norm": ' in done.stdout
