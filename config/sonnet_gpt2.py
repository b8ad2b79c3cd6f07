"""Sonnets from the real GPT-2, for CS224n's default project: see docs/cs224n.md.

    python sonnet.py config/sonnet_gpt2.py --data_dir=FOLDER
    python sonnet.py config/sonnet_gpt2.py --data_dir=FOLDER --mode=lora --learning_rate=1e-3 \\
        --out_dir=out/sonnet_gpt2_lora

The learning rates are the usual ones for GPT-2. They have not been measured here.
"""

from config.sonnet import *

out_dir = "out/sonnet_gpt2"
init_from = "gpt2"
cs224n = True  # generated_sonnets.txt in the layout of the course's submissions

learning_rate = 5e-5
