"""What the recipes that fine-tune GPT-2 itself to classify share: AdamW, the last token, the usual
learning rates, which have not been measured here. For a table of your own:

    python finetune_cls.py config/gpt2_cls.py --train_file=mine.csv
"""

init_from = "gpt2"
lowercase = False  # GPT-2 knows upper case

pooling = "last"
dropout = 0.1
word_dropout = 0.0

optimizer = "adamw"
learning_rate = 2e-5  # of GPT-2
adamw_learning_rate = None
head_learning_rate = 1e-3  # of the new linear layer
