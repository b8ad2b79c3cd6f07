"""Models to and from other people's formats.

    python convert.py --input=out/tinystories --out=export/tinystories --licence=cdla-sharing-1.0
    python convert.py --input=../nanoGPT/out-shakespeare-char/ckpt.pt --out=export/shakespeare \\
        --tokenizer=../nanoGPT/data/shakespeare_char/meta.pkl
    python convert.py config/weights.py

The folder it writes is complete: transformers' GPT2LMHeadModel, AutoTokenizer and
pipeline("text-generation") load it offline, and so does --init_from of the scripts here. Before it
gets there, transformers, where it is installed, must compute the same logits as model.py.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from checkpoint import adapter_base, load_model
from configurator import run as run_script
from files import read_json, write_text
from foreign import TOKENIZER_FILES
from hf import DROPOUTS, PREFIX, find_file, load_torch
from model import GPT, GPTConfig
from run import Metrics
from tokenizer import open_tokenizer

input: str | None = None  # run folder, Hugging Face folder, hub name, or nanoGPT's ckpt.pt
out: str | None = None  # the folder to write
tokenizer: str | None = None  # gpt2, bytes, a file or folder, nanoGPT's meta.pkl; None: the model's
dtype: str | None = None  # float32, bfloat16 or float16; None: as it is, merged adapters float32
revision: str | None = None  # of a hub name
licence = "unknown"  # of the weights, for the card: an SPDX-like id such as mit or cdla-sharing-1.0
notes: list[str] = []  # further lines of the card, `Name: text`

NANOGPT_ARGS = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}


def load_nanogpt(path) -> tuple[GPT, dict]:
    """(GPT, its checkpoint) of nanoGPT's ckpt.pt, with the same logits: erf GELU, biases or none,
    compiled or not. GPT-2's vocabulary padded to 50,304 is cut back to 50,257. Nothing in the file
    is run. ValueError for another file."""
    checkpoint = load_torch(path)
    try:
        args = checkpoint["model_args"]
        if more := args.keys() - NANOGPT_ARGS:
            raise ValueError(f"{path}: its network has the setting {min(more)!r}, which nanoGPT's "
                             "has not; convert.py cannot know what it computes")
        vocab_size = 50257 if args["vocab_size"] == 50304 else args["vocab_size"]
        state = {PREFIX.sub("", name, 1) if PREFIX.match(name) else name: t
                 for name, t in checkpoint["model"].items() if not name.endswith(".attn.bias")}
        for name in ("transformer.wte.weight", "lm_head.weight"):
            state[name] = state[name][:vocab_size]
        tied = torch.equal(state["transformer.wte.weight"], state["lm_head.weight"])
        if tied:
            del state["lm_head.weight"]
        config = GPTConfig(args["block_size"], vocab_size, args["n_layer"], args["n_head"],
                           args["n_embd"], args["dropout"], args["bias"], "gelu", tied)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is no checkpoint of nanoGPT's: it lacks {e}; of a run of the "
                         f"scripts here give its folder, --input={path.parent}") from None
    with torch.device("meta"):
        model = GPT(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise ValueError(f"{path} does not fit its own model_args: {e}") from None
    return model.eval(), checkpoint


@torch.inference_mode()
def check_export(folder) -> str:
    """In a sentence, how far transformers' logits of random token ids, by the model in a folder,
    are from those of model.py. ValueError where that is more than rounding."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        return "not checked: transformers is not installed"
    logging.disable_progress_bar()
    model = GPT.from_pretrained(folder).float()
    shape, generator = (1, min(16, model.config.block_size)), torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, shape, generator=generator)
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder).float()(idx).logits
    except KeyError as e:  # of an activation that it lacks
        raise ValueError(f"transformers cannot build this network: {e}") from None
    if (Path(folder) / "tokenizer.json").is_file():
        ours = open_tokenizer(folder)
        text = ours.decode([i for i in idx[0].tolist() if i < ours.vocab_size])
        if AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != ours.encode(
                text, special=True).tolist():
            raise ValueError(f"transformers' AutoTokenizer makes other ids of {text!r}")
    difference = (theirs - model(idx)[0]).abs().max().item()
    if not difference <= 1e-3:
        raise ValueError("transformers would compute other logits than model.py (largest "
                         f"difference {difference:.2g}); a change of the network needs a field of "
                         "GPTConfig whose default is plain GPT-2")
    return f"checked: transformers computes the same (largest difference {difference:.1g})"


def kept_fields(name) -> dict:
    """The fields of a model's config.json that GPTConfig has no place for."""
    path = find_file(name, "config.json", revision)
    config = read_json(path) if path else {}
    return {key: config[key] for key in (*DROPOUTS, "task_specific_params") if key in config}


def keep_generation_config(file: Path):
    """Adds what the source says of decoding to the generation_config.json of the new folder."""
    source = find_file(adapter_base(input) or input, file.name, revision)
    said, ours = read_json(source) if source else {}, read_json(file)
    never = {*(said.get("suppress_tokens") or []), *ours.get("suppress_tokens", [])}
    said |= ours | ({"suppress_tokens": sorted(never)} if never else {})
    write_text(file, json.dumps(said, indent=2) + "\n")


def facts(folder: Path) -> dict:
    """What a run folder says of its training: settings, step, losses."""
    if not (folder / "ckpt.pt").is_file():
        return {}
    checkpoint = load_torch(folder / "ckpt.pt")
    settings = checkpoint["settings"]
    found = {"Training": f"{checkpoint['step']:,} steps, {checkpoint['tokens']:,} tokens"}
    if "dataset" not in settings:  # a fine-tuning's
        return found | {"Data": settings.get("data", "unknown")}
    found = {"Data": settings["dataset"], "Command": f"`{checkpoint['command']}`"} | found
    rows = [row for row in Metrics.read(folder / "metrics.jsonl") if "val_loss" in row]
    if not (folder / "best" / "config.json").is_file():  # the checkpoint is what is exported
        rows = [row for row in rows if row["step"] == checkpoint["step"]]
    if rows:
        best = min(rows, key=lambda row: row["val_loss"])
        parts = [f"loss {best['val_loss']:.4f}, perplexity {best['val_ppl']:.3f}"]
        if best["step"] < checkpoint["step"]:
            found["Training"] += f"; this is step {best['step']:,}, the best"
        if "val_bpb" in best:
            parts.append(f"{best['val_bpb']:.4f} bits per byte")
        if settings.get("eval_tokens"):
            parts.append(f"on the first {settings['eval_tokens']:,} tokens")
        if dtype not in (None, "float32"):
            parts.append(f"before rounding to {dtype}")
        found["Validation"] = ", ".join(parts)
    found["Evaluation"] = (f"`python train.py --eval_only --init_from={out} "
                           f"--dataset={settings['dataset']}`")
    return found


def describe_tokenizer(tok) -> dict:
    """What the card says of a tokenizer, and of what does not work with it elsewhere."""
    if tok is None:
        return {"Tokenizer": "none came with it: weights only"}
    said = {"Tokenizer": f"{tok.name}, {tok.vocab_size:,} ids"}
    if tok.eos_id is None:
        said["Elsewhere"] = ("there is no end-of-text, so what needs one to stop or to pad does "
                             "not work: lm_eval, TRL, llama.cpp, batches of texts")
    if tok.special:
        said["Special tokens"] = (", ".join(f"`{token}`" for token in tok.special) + "; "
                                  "transformers makes them of every text that has them written out")
    return said


def card(name: str, model: GPT, tok, unknown: dict | None, found: dict) -> str:
    """A model card: front matter for the hub, then what is known. unknown: the network's settings
    that transformers does not have."""
    c = model.config
    found = {"Architecture": f"GPT-2, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, "
                             f"context {c.block_size}: {model.num_params():,} parameters",
             **describe_tokenizer(tok), "Licence": licence} | found
    for note in notes:
        key, _, text = note.partition(": ")
        found[key] = text
    library, code = "transformers", ("python\nfrom transformers import pipeline\n"
                                     f'print(pipeline("text-generation", "{name}")("Once upon"))')
    if tok is None:
        code = ("python\nfrom transformers import GPT2LMHeadModel\n"
                f'model = GPT2LMHeadModel.from_pretrained("{name}")')
    if unknown:
        found["Architecture"] += f"; with {unknown}, which only taleGPT's scripts load"
        library, code = "taleGPT", f'sh\npython sample.py --init_from={name} --start "Once upon"'
    lines = "\n".join(f"- **{key}**: {value}" for key, value in found.items())
    return (f"---\nlicense: {licence}\nlibrary_name: {library}\npipeline_tag: text-generation\n"
            f"---\n\n# {name}\n\nA GPT-2 language model, trained or converted with taleGPT.\n\n"
            f"{lines}\n\n```{code}\n```\n")


def main():
    if not input or not out:
        raise ValueError("give --input=RUN_OR_MODEL and --out=FOLDER")
    path, found, kept, tok = Path(input), {}, {}, None
    bad = [note for note in notes if not all(part.strip() for part in note.partition(": "))]
    if bad:
        raise ValueError(f"notes: got {bad[0]!r:.60}, expected `Name: text`")
    if tokenizer is not None:
        tok = open_tokenizer(tokenizer)
    if path.is_file():
        model, checkpoint = load_nanogpt(path)
        if tok is None and model.config.vocab_size == 50257:
            tok = open_tokenizer("gpt2")
        found = {"Converted from": "a nanoGPT checkpoint",
                 "Training": f"{checkpoint.get('iter_num', 'unknown')} steps"}
        if tok and not 0 <= model.config.vocab_size - tok.vocab_size < 128:  # some fill it up
            raise ValueError(f"{input} has a vocabulary of {model.config.vocab_size}, the "
                             f"tokenizer ({tok.name}) one of {tok.vocab_size}; name its own with "
                             "--tokenizer (nanoGPT's meta.pkl serves)")
        if tok:
            model.num_tokens = tok.vocab_size
    else:  # adapters are merged in float32
        model, tok = load_model(input, tok, revision=revision,
                                dtype=torch.float32 if adapter_base(input) else None)
        found, kept = facts(path), kept_fields(input)
    if dtype is not None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r} is unknown: float32, bfloat16 or float16")
        model.to(getattr(torch, dtype))
    folder = Path(out)
    for name in ("ckpt.pt", "best", "adapter_config.json"):
        if (folder / name).exists():
            raise ValueError(f"{folder} holds {name}, which would be loaded instead of what is "
                             "written there; give another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as tmp:
        new = Path(tmp)
        model.save_pretrained(new, **(tok.model_ids() if tok else {}) | kept)
        if tok:
            tok.save(new, model_max_length=model.config.block_size)
        if not path.is_file():
            keep_generation_config(new / "generation_config.json")
            if template := find_file(input, "template.txt", revision):  # of finetune_instruct.py
                shutil.copyfile(template, new / "template.txt")
        unknown = read_json(new / "config.json").get("talegpt")
        write_text(new / "README.md", card(folder.resolve().name, model, tok, unknown, found))
        checked = check_export(new) if not unknown else (
            f"not checked: only the scripts here load a network with {unknown}")
        folder.mkdir(exist_ok=True)
        for name in (*TOKENIZER_FILES, "template.txt") if tok else ():  # of another model
            if not (new / name).exists():
                (folder / name).unlink(missing_ok=True)
        for file in new.iterdir():
            os.replace(file, folder / file.name)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    tokens = f"{tok.name} tokens" if tok else "weights only, as no tokenizer came with them"
    print(f"{folder}: {model.num_params():,} parameters, {tokens}; {files}\n{checked}")


if __name__ == "__main__":
    run_script(main, globals())
