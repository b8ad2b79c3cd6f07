"""Sentiment of sentences from movie reviews in 5 classes, very negative to very positive (SST).

    python finetune_cls.py config/finetune_sst.py --data_dir=FOLDER     # CS224n's files
    python finetune_cls.py config/finetune_sst.py --data_dir=FOLDER --mode=last_layer \\
        --epochs=10
    python finetune_cls.py config/finetune_sst.py                       # from the hub

The base model: python train.py config/pretrain_imdb.py.
"""

out_dir = "out/finetune_sst"
init_from = "out/pretrain_imdb"
train_file = "ids-sst-train.csv"
dev_file = "ids-sst-dev.csv"
test_file = "ids-sst-test-student.csv"
dataset = "SetFit/sst5"
text_column = ["sentence", "text"]
label_column = ["sentiment", "label"]
classes = ["0", "1", "2", "3", "4"]
lowercase = True
prompt = "{text} overall , this movie is"
verbalizers = [" terrible", " bad", " okay", " good", " great"]

epochs = 3
batch_size = 32
learning_rate = 8e-4
head_learning_rate = 5e-3
