"""What the recipes that fine-tune the small base model to classify share. Each of them reads this
file first, then sets its own. For a table of your own:

    python finetune_cls.py config/muon_cls.py --train_file=mine.csv

Few values were compared, on held-out tenths of the training sets: docs/benchmarks.md has the
figures. The base model: python train.py config/pretrain_imdb.py.
"""

init_from = "out/pretrain_imdb"
lowercase = True  # as the base model's text

pooling = "mean"
dropout = 0.0
word_dropout = 0.2  # instead of dropout, which costs time on a CPU

optimizer = "muon"
learning_rate = 3e-3  # of the blocks' matrices
adamw_learning_rate = 1e-3  # of embeddings and vectors
head_learning_rate = 5e-3
