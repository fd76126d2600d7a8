"""Fine-tune a model on the shop's requests with the five-line API, and ask it something.

python examples/train.py --model HuggingFaceTB/SmolLM2-135M-Instruct
python examples/train.py --model my/checkpoint --data my.jsonl --output out/mine --max-steps 200
"""

import argparse
from pathlib import Path

from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer

SHOP = Path(__file__).parent / "shop"

parser = argparse.ArgumentParser(description="Fine-tune a model on the shop's requests.")
parser.add_argument("--model", required=True, help="checkpoint folder, .gguf file or Hugging Face id")
parser.add_argument("--data", default=str(SHOP / "train.jsonl"), help="training rows (default: %(default)s)")
parser.add_argument(
    "--output", default="out/train", help="folder for everything that is written (default: %(default)s)"
)
parser.add_argument("--max-steps", type=int, default=40, help="optimizer updates (default: %(default)s)")
parser.add_argument("--max-seq-length", type=int, default=512, help="tokens of a row (default: %(default)s)")
args = parser.parse_args()

model, tokenizer = FastLanguageModel.from_pretrained(args.model, max_seq_length=args.max_seq_length, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules="all-linear")
model.print_trainable_parameters()
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=args.data,
    args=SFTConfig(
        output_dir=args.output,
        max_steps=args.max_steps,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        assistant_only_loss=True,
        logging_steps=1,
    ),
)
trainer.train()
model.save_pretrained(f"{args.output}/adapter", tokenizer)
model.save_pretrained_merged(f"{args.output}/merged", tokenizer, save_method="merged_16bit")

messages = [
    {"role": "system", "content": "Answer with a JSON object: action, order, item."},
    {"role": "user", "content": "Hello, where is my copper teapot? The order was KX-2291. Thanks!"},
]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
ids = model.generate([prompt], max_new_tokens=48)
print(tokenizer.decode(ids[0, len(prompt) :].tolist(), skip_special_tokens=True))
