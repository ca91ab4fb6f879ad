"""What the oracle scripts share: transformers as the reference, prompts, and the raw logits format.

Raw logits are little-endian float32 [sum of the prompts' lengths, vocabulary], the positions of the first
prompt, then those of the second, and so on, without a header.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

# Positions whose logits are held at once: 256 · 151936 · 4 bytes = 156 MB.
CHUNK = 256


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(folder: Path, dtype: torch.dtype, device: str):
    """The checkpoint in transformers, in bfloat16 as a user would run it or in float32 as the reference.

    float32 takes plain attention and no TF32 anywhere: its error must be far below what is judged with it.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    attention = "eager" if dtype == torch.float32 else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def read_prompts(path: Path, vocabulary: int) -> list[list[int]]:
    """A JSON list of prompts, each a list of token ids of at least one token."""
    prompts = json.loads(path.read_text())
    for index, prompt in enumerate(prompts):
        if not prompt or not all(isinstance(t, int) and 0 <= t < vocabulary for t in prompt):
            raise SystemExit(f"{path}: prompt {index} must hold one or more token ids below {vocabulary}")
    return prompts


@torch.no_grad()
def hidden_states(model, prompt: list[int]) -> torch.Tensor:
    """[length, hidden] after the last norm, the whole prompt in one teacher-forced pass."""
    ids = torch.tensor([prompt], device=model.device)
    return model.model(input_ids=ids, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """[positions, vocabulary] in float32, rounded on the way to what the model's own type holds."""
    return model.lm_head(hidden).float()


def open_logits(path: Path, positions: int, vocabulary: int) -> np.ndarray:
    """Maps a raw logits file; its size must fit the prompts."""
    expected = positions * vocabulary * 4
    if path.stat().st_size != expected:
        raise SystemExit(
            f"{path}: {path.stat().st_size} bytes, but {positions} positions of {vocabulary} float32 logits are "
            f"{expected}; was it made with the same prompts and checkpoint?"
        )
    return np.memmap(path, dtype="<f4", mode="r", shape=(positions, vocabulary))
