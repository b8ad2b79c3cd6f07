"""Quora's question pairs from the real GPT-2, for CS224n's default project: see docs/cs224n.md.

    python finetune_cls.py config/paraphrase_gpt2.py --data_dir=FOLDER
    python finetune_cls.py config/paraphrase_gpt2.py --data_dir=FOLDER --style=cloze \\
        --out_dir=out/paraphrase_gpt2_cloze    # the logits of " yes" and " no" instead
"""

# First the files, columns and classes, then the recipe.
from config.finetune_quora import *
from config.gpt2_cls import *

out_dir = "out/paraphrase_gpt2"
test_file = "quora-test-student.csv"
cs224n = True  # also writes OUT/predictions as the course's autograder reads them
epochs = 3
