"""Shakespeare's sonnets, completed by a small GPT-2 trained on his plays: 90 seconds on one core.

    python train.py config/pretrain_plays.py    # the base model, out/pretrain_plays: see there
    python sonnet.py config/sonnet.py --data_dir=FOLDER
    python sonnet.py config/sonnet.py --data_dir=FOLDER --init_from=scratch --out_dir=out/scratch

FOLDER: sonnets.txt and the held-out files of Stanford's CS224n default project "Build GPT-2".
"""

out_dir = "out/sonnet"
init_from = "out/pretrain_plays"

epochs = 10
learning_rate = 1e-3
dropout = 0.1
temperature = 0.8
top_p = 0.9
candidates = 8
