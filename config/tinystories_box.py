"""The model in weights/: a small GPT-2 on TinyStories, about three hours on one core.

    python prepare_tinystories.py --name=tinystories_4k --tokenizer=weights/tokenizer.json \
        --limit=20000    # from the hub; docs/tinystories.md has it for local files
    OMP_NUM_THREADS=1 python train.py config/tinystories_box.py --dtype=bfloat16

It is config/tinystories_cpu.py with the largest width whose float16 weights fit into 9 MB, and ten
epochs of some 20,000 stories instead of 0.9, which need weight decay. For all of TinyStories leave
out --limit, set --weight_decay=0 and raise --max_steps.
"""

# First what the small recipes share: Muon, its learning rates and their schedule, GELU.
from config.muon_cpu import *

out_dir = "out/tinystories_box"
dataset = "tinystories_4k"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 512
batch_size = 8

max_steps = 9750  # 39.9 M tokens
weight_decay = 0.1  # a quarter of the stories as often: 2.33 nats, with 0 2.45, with 0.3 2.41
decay_fraction = 0.78  # under weight decay, a constant learning rate soon gains little

eval_interval = 650
log_interval = 50
sample_tokens = 200
