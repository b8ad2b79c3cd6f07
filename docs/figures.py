"""The figures and the PDF of the report (requirements-docs.txt; `make report` does the first two).

    python docs/figures.py loss      # docs/loss.png from docs/tinystories_*.jsonl, runs' metrics
    python docs/figures.py report    # docs/report.pdf from docs/report.md
    make run 2>&1 | python docs/figures.py terminal docs/terminal_run.png "make run"
"""

import json
import sys
from pathlib import Path
from textwrap import wrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
RUNS = {"tinystories_box": "4.3 M parameters, one core", "tinystories_cpu": "2.6 M, two cores"}
LAYOUT = {"papersize": '"a4"', "fontsize": '"9.2pt"', "margin": '{"x": "19mm", "y": "17mm"}'}


def loss():
    """Losses against tokens and minutes, a colour for each run; bits per byte on the right, where
    all runs share a tokenizer and some row has both."""
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.1), dpi=150, layout="constrained", sharey=True)
    ratios = []
    for colour, file in enumerate(sorted(HERE.glob("tinystories_*.jsonl"))):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        ratios += [row["val_bpb"] / row["val_loss"] for row in rows if "val_bpb" in row]
        for ax, key, scale in ((axes[0], "tokens", 1e6), (axes[1], "elapsed_s", 60)):
            for y, style in (("train_loss", {"lw": 0.7, "alpha": 0.45}),
                             ("val_loss", {"lw": 1.6, "marker": "o", "ms": 3.5,
                                           "label": RUNS.get(file.stem, file.stem)})):
                points = [(row[key] / scale, row[y]) for row in rows if y in row and key in row]
                if points:
                    ax.plot(*zip(*points), color=f"C{colour}", **style)
    axes[0].set(xlabel="training tokens (millions)", ylabel="loss (nats per token)",
                ylim=(None, 4.4))
    axes[1].set(xlabel="minutes of training")
    axes[0].legend(frameon=False, fontsize=8, title="thick: validation, thin: training",
                   title_fontsize=8)
    if ratios and max(ratios) < 1.01 * min(ratios):
        right = axes[1].secondary_yaxis("right", functions=(lambda x: x * ratios[0],
                                                            lambda x: x / ratios[0]))
        right.set_ylabel("bits per byte")
    for ax in axes:
        ax.grid(alpha=0.25)
    fig.savefig(HERE / "loss.png")


def terminal(png, title: str, width: int = 100, most: int = 44):
    """A picture of the text on standard input as a terminal shows it, `most` lines at most: of a
    line that was written over, what came last; of a long text, its begin and end."""
    lines = [part for line in sys.stdin.buffer.read().decode().expandtabs().split("\n")
             for part in wrap(line.rstrip("\r").rpartition("\r")[2], width,
                              drop_whitespace=False) or [""]]
    if len(lines) > most:
        lines = [*lines[:most // 2], "…", *lines[-(most - most // 2 - 1):]]
    lines = [f"$ {title}", *lines]
    inch, aspect = 0.165, 0.602  # of a line; width of a DejaVu Sans Mono character to its size
    size = 0.78 * inch * 72
    fig = plt.figure(figsize=(max(map(len, lines)) * size * aspect / 72 + 0.4,
                              len(lines) * inch + 0.3), dpi=150, facecolor="#16181d")
    height = fig.get_figheight()
    for i, line in enumerate(lines):
        fig.text(0.2 / fig.get_figwidth(), 1 - (0.15 + i * inch) / height, line, va="top",
                 size=size, family="DejaVu Sans Mono", color="#8fd18f" if i == 0 else "#d7dae0",
                 parse_math=False)
    fig.savefig(png, facecolor=fig.get_facecolor())


def report():
    import pypandoc
    import typst
    layout = [f"--variable-json={key}={value}" for key, value in LAYOUT.items()]
    source = HERE / "report.typ.tmp"
    try:
        pypandoc.convert_file(HERE / "report.md", "typst", outputfile=source,
                              format="gfm+tex_math_dollars+implicit_figures",
                              extra_args=["--standalone", *layout])
        text = source.read_text(encoding="utf-8")  # a table may go on over the page
        source.write_text(f"#show figure.where(kind: table): set block(breakable: true)\n{text}",
                          encoding="utf-8")
        pages = typst.compile(source, format="png", ppi=20)
        if isinstance(pages, list) and len(pages) > 5:
            sys.exit(f"docs/report.md makes {len(pages)} pages, five are allowed")
        typst.compile(source, output=HERE / "report.pdf")
    finally:
        source.unlink(missing_ok=True)
    print(f"docs/report.pdf: {len(pages) if isinstance(pages, list) else 1} pages")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("loss", "report", "terminal"):
        sys.exit(__doc__)
    {"loss": loss, "report": report, "terminal": terminal}[sys.argv[1]](*sys.argv[2:])
