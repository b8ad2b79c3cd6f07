"""CFIMDB from the real GPT-2, for CS224n's default project: see docs/cs224n.md.

    python finetune_cls.py config/cfimdb_gpt2.py --data_dir=FOLDER
    python finetune_cls.py config/cfimdb_gpt2.py --data_dir=FOLDER --mode=last_layer --epochs=10 \\
        --out_dir=out/cfimdb_gpt2_last
"""

# First the files, columns and classes, then the recipe.
from config.finetune_cfimdb import *
from config.gpt2_cls import *

out_dir = "out/cfimdb_gpt2"
cs224n = True  # also writes OUT/predictions as the course's autograder reads them
epochs = 3
