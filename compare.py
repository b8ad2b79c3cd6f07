"""Runs side by side: the settings that differ, losses, speed, and one picture of their curves.

    python compare.py out/a out/b
    python compare.py out/small out/wide out/seed* --png=out/sizes.png

Runs that differ only in their seed share a line of the table (mean ± standard deviation) and a
colour of the picture. Runs that are still going are read, too.
"""

import json
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from matplotlib.ticker import EngFormatter

from checkpoint import NEW, settings_of
from configurator import run as run_script
from data import digest
from files import read_json
from hf import load_torch
from run import Metrics, figure
from tokenizer import from_json

png = "out/compare.png"  # losses over tokens and over minutes

# Settings that do not change what is learned, and those by which losses are of other text.
IGNORED = ("out_dir", "overwrite", "verify", "log_interval", "sample_tokens", "wandb_project",
           "tensorboard", "keep_checkpoints", "eval_only", "predict", "predict_file", "seed")
OF_THE_TEXT = {"dataset", "eval_tokens", "data", "train_file", "dev_file", "data_dir", "tokenizer"}


class Group(NamedTuple):
    """Runs that differ only in their seed."""
    settings: dict  # without IGNORED
    names: list[str]  # their folders
    runs: list[list[dict]]  # the rows of each one's metrics.jsonl

    @property
    def label(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} … {self.names[-1]}"

    def each(self, key: str, pick) -> list:
        """pick(all values of a measure) for each run, None for one without."""
        values = [[row[key] for row in rows if key in row] for rows in self.runs]
        return [pick(found) if found else None for found in values]


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """(settings without IGNORED, rows of metrics.jsonl) of a run; before its first checkpoint there
    are only the rows, in OUT/.new. ValueError where there is none."""
    part = folder if (folder / "metrics.jsonl").is_file() else folder / NEW
    rows, settings = Metrics.read(part / "metrics.jsonl"), {}
    if not rows:
        raise ValueError(f"{folder} has no metrics.jsonl of a run; give the folders of runs: "
                         "python compare.py out/a out/b")
    if (file := part / "ckpt.pt").is_file():
        checkpoint = load_torch(file)
        settings = settings_of({"settings": {}, "config": {}} | checkpoint)
        if settings.get("init_from") in ("resume", "auto"):  # what it began with is what counts
            settings["init_from"] = checkpoint.get("base", "scratch")
        if isinstance(known := checkpoint.get("tokenizer"), str):
            tokenizer = from_json(known)
            settings["tokenizer"] = f"{tokenizer.name} {digest(tokenizer.definition())[:6]}"
    elif (file := part / "results.json").is_file():
        settings = read_json(file).get("settings", {})
    return {name: value for name, value in settings.items() if name not in IGNORED}, rows


def read_groups(folders) -> list[Group]:
    """The runs in groups, each once, named by the last part of their path where that tells them
    apart."""
    folders = [*{Path(folder).resolve(): folder for folder in folders}.values()]
    groups, short = {}, [Path(folder).resolve().name for folder in folders]
    for name, folder in zip(short if len({*short}) == len(short) else folders, folders):
        settings, rows = read_run(Path(folder))
        key = json.dumps(settings, sort_keys=True) if settings else folder
        groups.setdefault(key, Group(settings, [], [])).names.append(name)
        groups[key].runs.append(rows)
    return [*groups.values()]


def over_seeds(values: list, form: str) -> str:
    """Mean and, of several, standard deviation; a dash where a run lacks the measure."""
    if None in values:
        return "–"
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def measures(group: Group) -> dict[str, str]:
    """A line of the table."""
    loss = "train_loss" if None in group.each("val_loss", len) else "val_loss"
    return {
        "run": group.label, "runs": str(len(group.runs)),
        "steps": f"{mean(group.each('step', max)):,.0f}",
        "tokens": f"{mean(group.each('tokens', max)):,.0f}",
        "minutes": over_seeds(group.each("elapsed_s", lambda values: values[-1] / 60), ".1f"),
        "loss of": loss.removesuffix("_loss"),
        "final loss": over_seeds(group.each(loss, lambda values: values[-1]), ".4f"),
        "best loss": over_seeds(group.each(loss, min), ".4f"),
        "bits per byte": over_seeds(group.each("val_bpb", min), ".4f"),
        "accuracy": over_seeds(group.each("val_accuracy", max), ".4f"),
        "tokens/s": over_seeds(group.each("tokens_per_s", median), ",.0f")}


def table(lines: list[dict[str, str]]) -> str:
    """Lines as columns; a column without any value is left out."""
    columns = [[name, *(line[name] for line in lines)] for name in lines[0]
               if any(line[name] != "–" for line in lines)]
    widths = [max(map(len, column)) for column in columns]
    rows = [[f"{cell:>{width}}" for cell, width in zip(row, widths)] for row in zip(*columns)]
    return "\n".join("  ".join(row) for row in rows)


def draw(groups: list[Group]):
    """The losses over tokens and over minutes. The steep first twentieth of the runs is cut off."""
    styles = {"train_loss": {"lw": 0.7, "alpha": 0.35},
              "val_loss": {"lw": 1.8, "marker": "o", "ms": 3}}
    later = [row[key] for group in groups for rows in group.runs for row in rows for key in styles
             if key in row and row["step"] >= rows[-1]["step"] / 20]
    with figure(png, (10, 4.2), columns=2) as axes:
        for ax, x, scale in (axes[0], "tokens", 1), (axes[1], "elapsed_s", 60):
            for number, group in enumerate(groups):
                for rows in group.runs:
                    for key, style in styles.items():
                        points = [(row[x] / scale, row[key]) for row in rows if key in row]
                        ax.plot(*zip(*points or [(0, float("nan"))]), f"C{number}", **style)
                ax.plot([], [], f"C{number}", lw=1.8, label=group.label)
            ax.grid(alpha=0.25)
        axes[0].set(xlabel="training tokens", ylabel="loss (nats)")
        axes[0].set_ylim(top=max(later, default=None))
        axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[1].set(xlabel="minutes of training")
        axes[1].legend(frameon=False, title="validation; training is thin")


def main(*folders):
    if not folders:
        raise ValueError("name the folders of runs: python compare.py out/a out/b")
    groups = read_groups(folders)
    known = [group for group in groups if group.settings]
    names = dict.fromkeys(name for group in known for name in group.settings)
    values = {name: [str(group.settings.get(name, "none")) for group in known] for name in names}
    other = {name: found for name, found in values.items() if len(set(found)) > 1}
    if other:
        labels = ["setting", *(group.label for group in known)]
        print(table([dict(zip(labels, [name, *other[name]])) for name in other]), end="\n\n")
    print(table([measures(group) for group in groups]))
    for group in groups:
        if len(ends := {*group.each("step", max)}) > 1:
            print(f"note: the runs of {group.label} end at {min(ends):,} to {max(ends):,} steps")
    text = [name for name in OF_THE_TEXT & other.keys()  # a run of no steps keeps no tokenizer
            if name != "tokenizer" or len({*other[name]} - {"none"}) > 1]
    if text:
        print("note: the losses are of different text")
    draw(groups)
    print(f"curves: {png}")


if __name__ == "__main__":
    run_script(main, globals(), positionals=True)
