"""Writes what transformers computes for the tiny model, for tests that run without a GPU and without Python.

    python3 tiny_logits.py models/tiny --out models/tiny/expected.json

For each prompt: the greedy continuation in float32, and then, from one pass over prompt and continuation,
float32's choice at every position with its lead over the second, bfloat16's noise there (max |bf16 - float32|),
and the highest logits after the prompt. README.md beside this file describes the fields.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

from reference import default_device, hidden_states, load_model, logits_of

# By name, so that a failing test can say which. Lengths from one token to more than two tiles of 128.
PROMPTS = {
    "end of text": "<|endoftext|>",
    "one word": "The",
    "novel": "It is a truth universally acknowledged, that",
    "chapter": "CHAPTER I\n\nThe family of",
    "speech": '"My dear sister," said she, "you must not',
    "sea": "The captain looked out over the dark water, and the men at the oars",
    "not English": "Über 3 €: naïve 你好 🎉\t\\n",
    "long": (
        "It was late in the autumn when the old house was opened again. The road from the village had been washed "
        "by a month of rain, and the carriage came up it slowly, with two men walking beside the wheels. Nobody had "
        "lived there for eleven years. The shutters were closed, the garden had gone to seed, and a great elm had "
        "fallen across the steps, so that the ladies were obliged to go round by the kitchen, where a fire had been "
        "lighted by the housekeeper, who was very old, and who cried when she saw them.\n\n"
        '"We did not think to see you before the spring," said she; "there is nothing ready, and the best rooms are '
        'so damp that I should be ashamed to show them."\n\n'
        '"Then show us the worst," replied the elder sister, who had been silent since the last turnpike, "for we '
        "shall be very well satisfied with four walls and a candle. My brother writes that the ship is expected on "
        "Thursday, and until she is safely in the harbour I do not mean to be particular about anything. Have you "
        'had any letters from the town?"\n\n'
        "There had been one letter. It had lain upon the kitchen table for a week, under a plate, because the "
        "housekeeper could not read and did not choose that any body should know it. The younger sister took it to "
        "the window. She read the first page with a smile, the second with attention, and the third"
    ),
}

CONTINUATION = 48
HIGHEST = 20
END_OF_TEXT = 0
FULL = ("one word", "novel")  # prompts whose logits are written whole


@torch.no_grad()
def greedy(model, ids: list[int], count: int) -> list[int]:
    """count more tokens, fewer if the text ends; every step runs the whole sequence, so no cache is trusted."""
    new = []
    while len(new) < count and END_OF_TEXT not in new:
        new.append(logits_of(model, hidden_states(model, ids + new)[-1:])[0].argmax().item())
    return new


def rounded(values: torch.Tensor) -> list[float]:
    """Five decimals: far below bfloat16's noise."""
    return [round(value, 5) for value in values.tolist()]


def expectation(exact, usual, tokenizer, name: str, text: str) -> dict:
    """One prompt's entry."""
    ids = tokenizer.encode(text).ids
    new = greedy(exact, ids, CONTINUATION)
    reference = logits_of(exact, hidden_states(exact, ids + new))
    noise = (logits_of(usual, hidden_states(usual, ids + new)) - reference).abs().amax(-1)
    two = reference.topk(2, dim=-1)
    top = reference[len(ids) - 1].topk(HIGHEST)
    entry = {
        "name": name,
        "text": text,
        "ids": ids,
        "greedy": new,
        "greedy_text": tokenizer.decode(new),
        "argmax": two.indices[:, 0].tolist(),
        "max_logit": rounded(two.values[:, 0]),
        "margin": rounded(two.values[:, 0] - two.values[:, 1]),
        "bf16_noise": rounded(noise),
        "top_ids": top.indices.tolist(),
        "top_logits": rounded(top.values),
    }
    if name in FULL:
        entry["logits"] = rounded(reference[len(ids) - 1])
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the tiny model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()

    exact = load_model(arguments.folder, torch.float32, arguments.device)
    usual = load_model(arguments.folder, torch.bfloat16, arguments.device)
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    prompts = [expectation(exact, usual, tokenizer, name, text) for name, text in PROMPTS.items()]
    weights = hashlib.sha256((arguments.folder / "model.safetensors").read_bytes()).hexdigest()
    made_with = {"transformers": transformers.__version__, "torch": torch.__version__, "device": arguments.device}

    # One line an entry: a diff shows which prompt changed.
    lines = ",\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
    head = f'"weights_sha256": "{weights}",\n"made_with": {json.dumps(made_with)}'
    arguments.out.write_text(f'{{\n{head},\n"prompts": [\n{lines}\n]\n}}\n', encoding="utf-8")
    for prompt in prompts:
        size = f"{len(prompt['ids'])} + {len(prompt['greedy'])} tokens"
        print(f"{prompt['name']} ({size}): {prompt['text'][-60:]!r} -> {prompt['greedy_text']!r}")


if __name__ == "__main__":
    main()
