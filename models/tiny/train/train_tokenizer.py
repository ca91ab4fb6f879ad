"""Trains the byte-level BPE tokenizer: writes tokenizer.json and tokenizer_config.json.

4096 tokens: <|endoftext|> (0), the 256 bytes (so any UTF-8 text can be encoded), and merges learned from the
novels. The addresses are left out: the demo writes stories, and the few merges should serve those.

    python3 train_tokenizer.py [--out DIR]
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import corpus

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
SOURCES = ("austen", "moby_dick")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent)
    out = parser.parse_args().out

    texts, _ = corpus.load()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for source in SOURCES for text in texts[source]), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY and tokenizer.token_to_id(END_OF_TEXT) == 0

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
