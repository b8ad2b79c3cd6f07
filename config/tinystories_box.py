"""The model in weights/: a small GPT-2 on TinyStories, about 40 minutes on one core.

    python prepare_tinystories.py --name=tinystories_4k --tokenizer=weights/tokenizer.json \
        --limit=20000    # from the hub; docs/tinystories.md has it for local files
    OMP_NUM_THREADS=1 python train.py config/tinystories_box.py --dtype=bfloat16

It is config/tinystories_cpu.py with the largest width whose float16 weights fit into 9 MB, and 2.4
epochs of 19,837 stories instead of 0.9. For all of TinyStories leave out --limit and raise
--max_steps.
"""

# First what the small recipes share: Muon, its learning rates and their schedule, GELU.
from config.muon_cpu import *

out_dir = "out/tinystories_box"
dataset = "tinystories_4k"

n_layer = 4
n_head = 8
n_embd = 256
block_size = 256
batch_size = 16

max_steps = 2400  # 9.8 M tokens

eval_interval = 300
log_interval = 50
sample_tokens = 200
