"""A tiny checkpoint that can be talked to."""

from pathlib import Path

import transformers
from helpers import make_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "stop pad user assistant system one two three four five six seven eight nine ten".split()
WORDS += "red blue green black white".split()
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} stop {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_chat_checkpoint(folder: Path) -> Path:
    """Write a tiny random Llama whose tokenizer knows `WORDS`, with a chat template, and return the folder."""
    make_checkpoint("llama", folder, vocab_size=len(WORDS), eos_token_id=0, max_position_embeddings=256)
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="pad"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, eos_token="stop", pad_token="pad", unk_token="pad", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return folder
