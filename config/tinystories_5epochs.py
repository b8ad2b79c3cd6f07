"""GPT-2 124M on TinyStories for five epochs: 4,518 steps of 524,288 tokens.

Half as long again as config/tinystories.py, with a little more regularisation, as the text repeats.
Not run to the end on this tree.
"""

out_dir = "out/tinystories_5epochs"
dataset = "tinystories"

batch_size = 16
total_batch_tokens = 524_288
max_steps = 4518  # 5 x 473.8 M tokens

learning_rate = 6e-4
weight_decay = 0.1
dropout = 0.1
warmup_steps = 200
lr_schedule = "cosine"
grad_clip = 1.0

eval_interval = 250
