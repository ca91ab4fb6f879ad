"""Makes a checkpoint with random weights in the layout of a published one, for comparing logits.

    python3 make_checkpoint.py DIR --preset qwen3-0.6b --seed 1

The weights are random but behave like a trained model's: linears keep the scale of their input (std 1 / sqrt(fan
in), 0.02 to 0.06 here), norm gains differ by feature so that a missing gain shows, and the rows of the LM head
differ in length, which spreads the logits and makes most argmax margins larger than bfloat16's noise. The same
preset, seed and kind of device give the same weights.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from reference import default_device


def qwen3(layers, hidden, ffn, heads, kv_heads, head_dim=128, vocab=151936, tied=True):
    """config.json as Qwen publishes it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 0 if vocab < 151645 else 151645,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }


def llama(layers, hidden, ffn, heads, kv_heads, head_dim=64, vocab=4096, tied=False):
    """config.json as Llama 3.2 has it, but the rope scaling's original length is short, so that it acts on
    every frequency band within the prompts' few hundred positions."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 512,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab,
    }


# Preset -> (configuration, largest shard in bytes; None for a single file).
PRESETS = {
    "qwen3-test": (qwen3(2, 64, 128, 4, 2, head_dim=32, vocab=512), None),
    "qwen3-test-untied-sharded": (qwen3(2, 64, 128, 4, 2, head_dim=32, vocab=512, tied=False), 100_000),
    "llama-test": (llama(2, 64, 128, 4, 2, head_dim=16, vocab=512), None),
    "qwen3-small": (qwen3(4, 512, 1536, 8, 4, vocab=4096), None),
    "llama-small": (llama(4, 512, 1536, 8, 2), None),
    "qwen3-0.6b": (qwen3(28, 1024, 3072, 16, 8), None),
    "qwen3-0.6b-untied-sharded": (qwen3(28, 1024, 3072, 16, 8, tied=False), 400_000_000),
    "qwen3-1.7b": (qwen3(28, 2048, 6144, 16, 8), 4_000_000_000),
    "qwen3-4b": (qwen3(36, 2560, 9728, 32, 8), 4_000_000_000),
    "qwen3-8b": (qwen3(36, 4096, 12288, 32, 8, tied=False), 4_000_000_000),
}


@torch.no_grad()
def randomize(model, generator):
    """Draws every weight anew, in the order of the state dictionary."""
    draw = lambda p: torch.randn(p.shape, generator=generator, device=p.device)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.copy_(0.5 + torch.rand(p.shape, generator=generator, device=p.device))
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows, width = p.shape
            length = torch.exp(0.3 * torch.randn((rows, 1), generator=generator, device=p.device))
            p.copy_(draw(p) * length * width**-0.5)
        else:
            p.copy_(draw(p) * p.shape[1] ** -0.5)


def save(model, config, folder, shard_bytes):
    """config.json and the weights, in one file or in shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tied = config["tie_word_embeddings"]
    tensors = {n: t.cpu().contiguous() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}

    shards, filled = [{}], 0
    for name, tensor in tensors.items():
        if shard_bytes and filled and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= {name: file for name in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make(folder: Path, preset: str, seed: int, device: str):
    """Writes the preset's checkpoint into folder."""
    config, shard_bytes = PRESETS[preset]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))  # so that transformers reads what is published
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    randomize(model, torch.Generator(device=device).manual_seed(seed))
    save(model, config, folder, shard_bytes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    make(arguments.folder, arguments.preset, arguments.seed, arguments.device)
    size = sum(f.stat().st_size for f in arguments.folder.glob("*.safetensors"))
    print(f"{arguments.folder}: {arguments.preset}, seed {arguments.seed}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
