"""Shakespeare, character by character, on a CPU: the quick start of README."""

out_dir = "out/quickstart"
dataset = "shakespeare"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
dropout = 0.0

max_steps = 2000
learning_rate = 1e-3
beta2 = 0.99
eval_interval = 500
log_interval = 100
