"""Models to and from other people's formats.

    python convert.py --input=out/tinystories --out=export/tinystories-124m --licence=cdla-sharing-1.0
    python convert.py --input=../nanoGPT/out-shakespeare-char/ckpt.pt --out=export/shakespeare \\
        --tokenizer=../nanoGPT/data/shakespeare_char/meta.pkl
    python convert.py config/weights.py

The folder it writes is complete: transformers' GPT2LMHeadModel, AutoTokenizer and
pipeline("text-generation") load it offline, and so does --init_from of the scripts here.
"""

import json
from pathlib import Path

import torch

from common import Metrics, load_model
from configurator import run
from files import load_torch, write_text
from model import GPT, GPTConfig
from tokenizer import open_tokenizer

input: str | None = None  # run folder, Hugging Face folder, hub name, or nanoGPT's ckpt.pt
out: str | None = None  # the folder to write
tokenizer: str | None = None  # gpt2, bytes, a file or folder, nanoGPT's meta.pkl; None: the model's
dtype: str | None = None  # float32, bfloat16 or float16; None: as it is
revision: str | None = None  # of a hub name
licence = "unknown"  # of the weights, for the card: an SPDX-like id such as mit or cdla-sharing-1.0
notes: list[str] = []  # further lines of the card, `Name: text`


def load_nanogpt(path) -> tuple[GPT, dict]:
    """(GPT, its checkpoint) of nanoGPT's ckpt.pt, with the same logits: erf GELU, biases or none,
    compiled or not. GPT-2's vocabulary padded to 50,304 is cut back to 50,257. Nothing in the file
    is run. ValueError for another file."""
    checkpoint = load_torch(path)
    if "model_args" not in checkpoint and {"model", "config", "settings"} <= checkpoint.keys():
        raise ValueError(f"{path} is a checkpoint of the scripts here, not nanoGPT's: give its folder, "
                         f"--input={path.parent}")
    try:
        args = checkpoint["model_args"]
        vocab_size = 50257 if args["vocab_size"] == 50304 else args["vocab_size"]
        config = GPTConfig(args["block_size"], vocab_size, args["n_layer"], args["n_head"],
                           args["n_embd"], args["dropout"], args["bias"], activation="gelu")
        state = {name.removeprefix("_orig_mod."): t for name, t in checkpoint["model"].items()}
        state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab_size]
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is no checkpoint of nanoGPT's: it lacks {e}") from None
    with torch.device("meta"):
        model = GPT(config)
    state = {name: t for name, t in state.items()
             if name != "lm_head.weight" and not name.endswith(".attn.bias")}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise ValueError(f"{path} does not fit its own model_args: {e}") from None
    return model.eval(), checkpoint


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
    if (folder / "metrics.jsonl").is_file():
        kept = (folder / "best" / "config.json").is_file()  # what is exported, else the checkpoint
        rows = [row for row in Metrics.read(folder / "metrics.jsonl")
                if "val_loss" in row and (kept or row["step"] == checkpoint["step"])]
        if rows:
            best = min(rows, key=lambda row: row["val_loss"])
            if best["step"] < checkpoint["step"]:  # best/ is what is exported
                found["Training"] += f"; this is step {best['step']:,}, the best"
            part = settings.get("eval_tokens")
            found["Validation"] = (
                f"loss {best['val_loss']:.4f}, perplexity {best['val_ppl']:.3f}"
                + (f", {best['val_bpb']:.4f} bits a byte" if "val_bpb" in best else "")
                + (f"; on the first {part:,} tokens" if part else "")
                + (f"; before rounding to {dtype}" if dtype not in (None, "float32") else ""))
    found["Evaluation"] = (f"`python train.py --eval_only --init_from={out} "
                           f"--dataset={settings['dataset']}`")
    return found


def card(name: str, model: GPT, tok, found: dict) -> str:
    """A model card: front matter for the hub, then what is known."""
    c = model.config
    found = {"Architecture": f"GPT-2, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, "
                             f"context {c.block_size}: {model.num_params():,} parameters",
             "Tokenizer": f"{tok.name}, {tok.vocab_size:,} ids", "Licence": licence} | found
    for note in notes:
        key, _, text = note.partition(": ")
        found[key] = text
    lines = "\n".join(f"- **{key}**: {value}" for key, value in found.items())
    return (f"---\nlicense: {licence}\nlibrary_name: transformers\npipeline_tag: text-generation\n"
            f"---\n\n# {name}\n\nA GPT-2 language model, trained or converted with taleGPT.\n\n"
            f"{lines}\n\n```python\nfrom transformers import pipeline\n"
            f"print(pipeline(\"text-generation\", \"{name}\")(\"Once upon\"))\n```\n")


def main():
    if not input or not out:
        raise ValueError("give --input=RUN_OR_MODEL and --out=FOLDER")
    path, found, tok = Path(input), {}, None
    bad = [note for note in notes if not all(part.strip() for part in note.partition(": "))]
    if bad:
        raise ValueError(f"notes: got {bad[0]!r:.60}, expected `Name: text`")
    if tokenizer is not None:
        tok = open_tokenizer(tokenizer)
    if path.is_file():
        model, checkpoint = load_nanogpt(path)
        tok = tok or open_tokenizer("gpt2")
        found = {"Converted from": "a nanoGPT checkpoint",
                 "Training": f"{checkpoint.get('iter_num', 'unknown')} steps"}
        if tok.vocab_size != model.config.vocab_size:
            raise ValueError(f"{input} has a vocabulary of {model.config.vocab_size}, the tokenizer "
                             f"({tok.name}) one of {tok.vocab_size}; name its own with --tokenizer "
                             "(nanoGPT's meta.pkl serves)")
    else:
        model, tok = load_model(input, tok, revision=revision)
        found = facts(path)
    if dtype is not None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r} is unknown: float32, bfloat16 or float16")
        model.to(getattr(torch, dtype))
    folder = Path(out)
    model.save_pretrained(folder, tok.eos_id)
    tok.save(folder)
    ids = {"bos_token_id": tok.eos_id, "eos_token_id": tok.eos_id, "pad_token_id": tok.eos_id}
    for file, text in (("generation_config.json", json.dumps(ids, indent=2) + "\n"),
                       ("README.md", card(folder.resolve().name, model, tok, found))):
        write_text(folder / file, text)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    print(f"{folder}: {model.num_params():,} parameters, {tok.name} tokens; {files}")


if __name__ == "__main__":
    run(main, globals())
