"""What the small recipes for a CPU share. Each of them reads this file first, then sets its own.

The values were found in short runs of networks of 4 layers, on Shakespeare's characters (batches of
768 tokens) and on TinyStories (2,048 tokens); docs/training_speed.md has the losses.
"""

activation = "gelu"  # as good as GPT-2's tanh form, and twice as fast on a CPU

optimizer = "muon"  # 300 steps on characters: loss 2.00, with AdamW 2.91
learning_rate = 0.03  # of the blocks' matrices: better than 0.02 in short runs
momentum = 0.85  # lower than the usual 0.95, which is worse in short runs
adamw_learning_rate = 0.01  # of all other parameters, embeddings above all
beta1 = 0.8  # of AdamW: lower than the usual 0.9 for the same reason as momentum
weight_decay = 0.0  # 0.1 is slightly worse: these runs end before they overfit

# The learning rate is at its peak for half of the run and then falls linearly to zero.
lr_schedule = "wsd"
warmup_steps = 0  # 15 steps of warmup are worse than none
decay_fraction = 0.5  # 0.35 and 0.65 are no better
min_lr_scale = 0.0
