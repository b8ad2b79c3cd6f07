"""A small GPT-2 on TinyStories for a machine without a GPU: about 10 minutes on 2 cores.

    python prepare_tinystories.py --name=tinystories_4k --tokenizer=weights/tokenizer.json \
        --limit=20000    # from the hub; docs/tinystories.md has it for local files
    python train.py config/tinystories_cpu.py

docs/tinystories.md has its loss, with 19,837 stories for training and 7,002 for validation.
"""

# First what the small recipes share: Muon, its learning rates and their schedule, GELU.
from config.muon_cpu import *

out_dir = "out/tinystories_cpu"
dataset = "tinystories_4k"

n_layer = 4
n_head = 6
n_embd = 192
block_size = 256
batch_size = 8

max_steps = 1700  # 3.5 M tokens

eval_interval = 850
log_interval = 100
sample_tokens = 200
