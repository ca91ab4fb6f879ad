"""Trains the tiny model on one GPU and writes it in Hugging Face layout.

The architecture is transformers' own Qwen3ForCausalLM built from ../config.json; the loop is plain PyTorch:
AdamW, warm-up and cosine, bfloat16 autocast over float32 weights. The text is small (3 million tokens), so
what limits quality is overfitting: dropout on what every block adds to the residual stream, weight decay, and
the weights with the best held-out loss are the ones saved.

    python3 train.py OUT [--steps N] [--seed N]

OUT receives model.safetensors (bfloat16), copies of the configuration and the tokenizer, and
training_log.json: the command, the losses, and a few samples.
"""

import argparse
import json
import math
import platform
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

import corpus

HERE = Path(__file__).parent
MODEL = HERE.parent
END_OF_TEXT = 0

# How often a training window comes from a source: mostly the novels, the rest for a wider vocabulary.
SHARES = {"austen": 0.6, "moby_dick": 0.15, "sotu": 0.25}

# Steps take turns: many short windows teach to start from little context, few long ones to use all positions.
WINDOWS = (512, 2048)

PROMPTS = ("It is a truth", "The captain looked out over the sea, and", '"My dear sister," said she,')


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300, help="stop early, keeping the best, past this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def token_streams(tokenizer, texts, device):
    """{source: the tokens of its documents one after the other, <|endoftext|> before, between and after}."""
    streams = {}
    for source, documents in texts.items():
        tokens = [END_OF_TEXT]
        for encoding in tokenizer.encode_batch(documents):
            tokens += encoding.ids + [END_OF_TEXT]
        streams[source] = torch.tensor(tokens, device=device)
    return streams


def sample_batch(streams, window, count, generator):
    """count windows at random places, [count, window + 1]; the source of each is drawn by SHARES."""
    sources = list(SHARES)
    picks = torch.multinomial(torch.tensor([SHARES[s] for s in sources]), count, True, generator=generator)
    rows = []
    for pick in picks.tolist():
        stream = streams[sources[pick]]
        start = torch.randint(len(stream) - window, (1,), generator=generator).item()
        rows.append(stream[start : start + window + 1])
    return torch.stack(rows)


def loss_of(model, rows):
    """Mean next-token loss of rows [windows, length + 1], in nats."""
    hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model, streams, autocast):
    """Held-out loss by source over consecutive windows of 512, and their mean weighted by SHARES."""
    model.eval()
    losses = {}
    for source, stream in streams.items():
        count = (len(stream) - 1) // WINDOWS[0]
        rows = torch.stack([stream[i * WINDOWS[0] : (i + 1) * WINDOWS[0] + 1] for i in range(count)])
        with autocast():
            total = sum(loss_of(model, part).item() * len(part) for part in rows.split(32))
        losses[source] = total / count
    losses["mean"] = sum(share * losses[source] for source, share in SHARES.items())
    model.train()
    return {source: round(loss, 4) for source, loss in losses.items()}


def add_residual_dropout(model, rate):
    """Dropout on the output of every attention and feed-forward block; returns the hooks, to be removed."""
    drop = lambda module, _inputs, output: F.dropout(output, rate, module.training)
    blocks = [m for layer in model.model.layers for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [module.register_forward_hook(drop) for module in [model.model.embed_tokens, *blocks]]


def make_optimizer(model, arguments):
    """AdamW; matrices decay, the norms' gains do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": arguments.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    fused = arguments.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=fused)


def learning_rate(step, arguments):
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < arguments.warmup:
        return arguments.learning_rate * (step + 1) / arguments.warmup
    done = (step - arguments.warmup) / max(1, arguments.steps - arguments.warmup)
    return arguments.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model, streams, held_out, arguments, autocast):
    """Runs the loop; leaves the best weights in the model; returns the log's entries and the best step."""
    generator = torch.Generator().manual_seed(arguments.seed)
    optimizer = make_optimizer(model, arguments)
    hooks = add_residual_dropout(model, arguments.dropout)
    entries, best, best_loss, recent, started = [], None, math.inf, [], time.monotonic()
    for step in range(arguments.steps):
        window = WINDOWS[step % len(WINDOWS)]
        rows = sample_batch(streams, window, max(1, arguments.batch_tokens // window), generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments)
        with autocast():
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())

        out_of_time = time.monotonic() - started > arguments.seconds
        last = out_of_time or step + 1 == arguments.steps
        if (step + 1) % arguments.evaluate_every == 0 or last:
            losses = evaluate(model, held_out, autocast)
            entry = {
                "step": step + 1,
                "seconds": round(time.monotonic() - started, 1),
                "train_loss": round(torch.stack(recent).mean().item(), 4),
                "held_out_loss": losses,
            }
            recent.clear()
            entries.append(entry)
            print(json.dumps(entry), flush=True)
            if losses["mean"] < best_loss:
                best_loss, best_step = losses["mean"], step + 1
                best = {name: value.clone() for name, value in model.state_dict().items()}
        if last:
            break
    for hook in hooks:
        hook.remove()
    model.load_state_dict(best)
    return entries, best_step


@torch.no_grad()
def continue_text(model, tokenizer, prompt, tokens, seed, temperature=0.8, top_k=40):
    """A sampled continuation; recomputes the whole sequence each step, which is quick enough at this size."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].float().cpu()
        values, choices = (logits / temperature).topk(top_k)
        token = choices[torch.multinomial(values.softmax(-1), 1, generator=generator)].item()
        if token == END_OF_TEXT:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def save(model, out):
    """model.safetensors as a published tied checkpoint has it: no lm_head beside the embedding."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        n: t.to(torch.bfloat16).cpu().contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file makes it readable by its owner only
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (MODEL / name).resolve() != (out / name).resolve():
            shutil.copyfile(MODEL / name, out / name)


def main():
    arguments = parse_arguments()
    device = arguments.device
    torch.manual_seed(arguments.seed)
    autocast = lambda: torch.autocast(device.split(":")[0], dtype=torch.bfloat16)

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    streams, held_out = (token_streams(tokenizer, texts, device) for texts in corpus.load())
    model = Qwen3ForCausalLM._from_config(Qwen3Config.from_pretrained(MODEL), dtype=torch.float32).to(device)
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    sizes = {source: len(stream) for source, stream in streams.items()}
    print(f"{parameters / 1e6:.2f} M parameters, training tokens {sizes}", flush=True)

    entries, best_step = train(model, streams, held_out, arguments, autocast)
    model.to(torch.bfloat16).eval()
    save(model, arguments.out)
    log = {
        "command": " ".join(["python3", "train.py", *sys.argv[1:]]),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": parameters,
        "training_tokens": sizes,
        "entries": entries,
        "best_step": best_step,
        "held_out_loss_as_saved": evaluate(model, held_out, autocast),
        "samples": [continue_text(model, tokenizer, prompt, 160, arguments.seed) for prompt in PROMPTS],
    }
    (arguments.out / "training_log.json").write_text(json.dumps(log, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(log["held_out_loss_as_saved"]))
    print("\n---\n".join(log["samples"]))


if __name__ == "__main__":
    main()
