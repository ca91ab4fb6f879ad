"""Writes transformers' own logits in the raw format, as check.py reads ours.

    python3 logits.py DIR --prompts prompts.json --dtype float32 --out reference.f32

For looking at a difference in detail, and to try check.py on itself; check.py does not need it.
"""

import argparse
from pathlib import Path

import torch

from reference import CHUNK, default_device, hidden_states, load_model, logits_of, read_prompts


def write_logits(model, prompts, out: Path):
    """All positions of all prompts, one after the other."""
    with out.open("wb") as file:
        for prompt in prompts:
            for hidden in hidden_states(model, prompt).split(CHUNK):
                file.write(logits_of(model, hidden).cpu().numpy().astype("<f4").tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    model = load_model(arguments.folder, getattr(torch, arguments.dtype), arguments.device)
    write_logits(model, read_prompts(arguments.prompts, model.config.vocab_size), arguments.out)


if __name__ == "__main__":
    main()
