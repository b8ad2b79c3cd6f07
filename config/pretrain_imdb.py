"""A small GPT-2 on movie reviews, the base model for classification: about two hours on two cores.

    python docs/base_text.py IMDB CS224N MRPC data/base_text    # folders; its header says of what
    python tokenizer.py train --input=data/base_text/train.jsonl --lowercase --vocab_size=8192 \\
        --out=data/base8k.json
    python prepare_text.py --name=base --input=data/base_text/train.jsonl \\
        --val_input=data/base_text/val.jsonl --lowercase --tokenizer=data/base8k.json
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 train.py config/pretrain_imdb.py \\
        --batch_size=4 --dtype=bfloat16    # two cores, if they have bfloat16

The text, without labels, of 73,115 reviews of the Large Movie Review Dataset (Maas et al. 2011),
and of the training sets of SST, Quora (14,000 pairs of the course's 283,003) and MRPC.
"""

# First what the small recipes share: Muon, its learning rates and their schedule, GELU.
from config.muon_cpu import *

out_dir = "out/pretrain_imdb"
dataset = "base"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 512
batch_size = 8

max_steps = 10_600  # 43.4 M tokens, 1.6 epochs
decay_fraction = 0.6

eval_interval = 450
eval_tokens = 65_536
log_interval = 50
sample_tokens = 100
