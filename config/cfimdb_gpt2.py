"""CFIMDB from the real GPT-2, for CS224n's default project: see docs/cs224n.md.

    python finetune_cls.py config/cfimdb_gpt2.py --data_dir=FOLDER
    python finetune_cls.py config/cfimdb_gpt2.py --data_dir=FOLDER --mode=last_layer --epochs=10 \\
        --out_dir=out/cfimdb_gpt2_last

The learning rates are the usual ones for GPT-2. They have not been measured here.
"""

# First the files, columns and classes.
from config.finetune_cfimdb import *

out_dir = "out/cfimdb_gpt2"
init_from = "gpt2"
lowercase = False  # GPT-2 knows upper case
cs224n = True  # also writes OUT/predictions as the course's autograder reads them

epochs = 3
learning_rate = 2e-5  # of GPT-2
head_learning_rate = 1e-3  # of the new linear layer
