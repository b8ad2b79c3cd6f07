"""nanoGPT's quick-start network, trained to the loss of its README in as few seconds as possible.

    python prepare_text.py --name=ts --input=input.txt
    python train.py config/race.py --dataset=ts
    python bench.py race --dataset=ts --peer=../nanoGPT

The network is nanoGPT's: 4 layers, 4 heads, width 128, context 64, no biases, erf GELU. All that
differs is in docs/training_speed.md, with the loss that each change saves.
"""

# First what the small recipes share: Muon, its learning rates and their schedule, GELU.
from config.muon_cpu import *

out_dir = "out/race"
dataset = "ts"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False
batch_size = 12
dtype = "bfloat16"  # for CPUs with units for it; on others float32 is as good, and faster

max_steps = 385
adamw_learning_rate = 0.03  # this and beta1 are better on characters than the shared ones
beta1 = 0.7
grad_clip = 0.0

eval_interval = 385
log_interval = 20
sample_tokens = 200
