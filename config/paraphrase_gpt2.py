"""Quora's question pairs from the real GPT-2, for CS224n's default project: see docs/cs224n.md.

    python finetune_cls.py config/paraphrase_gpt2.py --data_dir=FOLDER
    python finetune_cls.py config/paraphrase_gpt2.py --data_dir=FOLDER --style=cloze \\
        --out_dir=out/paraphrase_gpt2_cloze    # the logits of " yes" and " no" instead

The learning rates are the usual ones for GPT-2. They have not been measured here.
"""

# First the files, columns and classes.
from config.finetune_quora import *

out_dir = "out/paraphrase_gpt2"
init_from = "gpt2"
test_file = "quora-test-student.csv"
lowercase = False  # GPT-2 knows upper case
cs224n = True  # also writes OUT/predictions as the course's autograder reads them

epochs = 3
learning_rate = 2e-5  # of GPT-2
head_learning_rate = 1e-3  # of the new linear layer
