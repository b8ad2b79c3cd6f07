"""Fine-tunes the model in weights/ to follow instructions: two minutes on one core.

    python finetune_instruct.py config/finetune_instruct.py --data=instruction-data.json
    python finetune_instruct.py config/finetune_instruct.py --data=instruction-data.json \\
        --mode=lora --lora_rank=4 --lora_alpha=8 --learning_rate=1e-2 \\
        --epochs=10 --out_dir=out/instruct_lora
    python sample.py --init_from=out/finetune_instruct --instruct "Convert 2 kilometers to meters."

instruction-data.json: the 1,100 Alpaca-style records of S. Raschka's "Build a Large Language Model
(From Scratch)", in its repository rasbt/LLMs-from-scratch. Most of their words are rare in the
children's stories of the base model: full fine-tuning trains the embeddings, too, which adapters
do not; docs/benchmarks.md has the difference.
"""

out_dir = "out/finetune_instruct"
data = "instruction-data.json"
init_from = "weights"

mode = "full"
epochs = 5  # at 10 it overfits
learning_rate = 2e-3
