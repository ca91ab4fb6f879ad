"""Compares our logits with transformers' in float32, and judges them by transformers' own bfloat16.

    python3 check.py DIR --prompts prompts.json --ours logits.f32 [--json report.json]

Loads the checkpoint twice (float32 and bfloat16), runs both over every prompt, and reads ours a few positions at a
time. With e = ours - float32 and n = bfloat16 - float32 it fails (exit code 1) if

  error     |e| / |float32| over all positions is above --tolerance times |n| / |float32|, or for one prompt above
            --prompt-tolerance times, or at one position above --position-tolerance times;
  argmax    float32's lead of its first token over its second is above --margin times max |n| at that position,
            and our argmax is another token. (With an error no larger than bfloat16's, 2 cannot be violated.)
  values    a logit of ours is not finite.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from reference import CHUNK, default_device, hidden_states, load_model, logits_of, open_logits, read_prompts


@dataclass
class Limits:
    """How much worse than bfloat16 ours may be; the narrower the average, the more chance is allowed for."""

    tolerance: float = 1.03
    prompt_tolerance: float = 1.5
    position_tolerance: float = 3.0
    margin: float = 2.0


@dataclass
class Tally:
    """Sums over positions: one prompt's, or all of them."""

    positions: int = 0
    reference_square: float = 0.0
    ours_square: float = 0.0
    bf16_square: float = 0.0
    ours_max: float = 0.0
    bf16_max: float = 0.0
    agree: int = 0  # our argmax is float32's
    bf16_agree: int = 0  # bfloat16's is
    decided: int = 0  # positions where the lead is above the noise
    violations: int = 0  # decided positions where our argmax is another
    not_finite: int = 0
    worst_ratio: float = 0.0  # of ours to bfloat16's error at one position
    worst_position: int = -1  # within the prompt

    def add(self, other: "Tally"):
        for name, value in asdict(other).items():
            if name in ("ours_max", "bf16_max", "worst_ratio"):
                setattr(self, name, max(getattr(self, name), value))
            elif name != "worst_position":
                setattr(self, name, getattr(self, name) + value)

    def relative(self, square: float) -> float:
        return math.sqrt(square / self.reference_square)

    def ratio(self) -> float:
        """Our error over bfloat16's."""
        return math.sqrt(self.ours_square / self.bf16_square) if self.bf16_square else math.inf

    def summary(self) -> dict:
        return {
            "positions": self.positions,
            "relative_error": self.relative(self.ours_square),
            "bf16_relative_error": self.relative(self.bf16_square),
            "ratio": self.ratio(),
            "max_error": self.ours_max,
            "bf16_max_error": self.bf16_max,
            "agree": self.agree,
            "bf16_agree": self.bf16_agree,
            "decided": self.decided,
            "below_margin": self.positions - self.decided,
            "violations": self.violations,
            "not_finite": self.not_finite,
            "worst_position": self.worst_position,
            "worst_position_ratio": self.worst_ratio,
        }


@dataclass
class Report:
    """What check() found."""

    overall: Tally = field(default_factory=Tally)
    prompts: list[Tally] = field(default_factory=list)
    violations: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict:
        overall = self.overall.summary()
        del overall["worst_position"]  # a position says nothing without its prompt
        return {
            "passed": not self.failures,
            "failures": self.failures,
            "overall": overall,
            "violations": self.violations,
            "prompts": [tally.summary() for tally in self.prompts],
        }


def compare(reference, bf16, ours, first, limits) -> tuple[Tally, list[dict]]:
    """One piece of a prompt, all three [positions, vocabulary] in float32; first is its position in the prompt."""
    finite = ours.isfinite()
    ours = torch.where(finite, ours, 0.0)
    error, noise = ours - reference, bf16 - reference
    ours_squares = error.square().sum(-1, dtype=torch.float64)
    bf16_squares = noise.square().sum(-1, dtype=torch.float64)
    ratios = (ours_squares / bf16_squares.clamp_min(1e-300)).sqrt()

    two = reference.topk(2, dim=-1)
    best, lead = two.indices[:, 0], two.values[:, 0] - two.values[:, 1]
    noise_at = noise.abs().amax(-1)
    decided = lead > limits.margin * noise_at
    chosen = ours.argmax(-1)
    violated = decided & (chosen != best)
    violations = [
        {
            "position": first + at,
            "expected": best[at].item(),
            "ours": chosen[at].item(),
            "margin": lead[at].item(),
            "noise": noise_at[at].item(),
        }
        for at in violated.nonzero().flatten().tolist()
    ]
    worst = ratios.argmax().item()
    tally = Tally(
        positions=len(reference),
        reference_square=reference.square().sum(dtype=torch.float64).item(),
        ours_square=ours_squares.sum().item(),
        bf16_square=bf16_squares.sum().item(),
        ours_max=error.abs().max().item(),
        bf16_max=noise_at.max().item(),
        agree=(chosen == best).sum().item(),
        bf16_agree=(bf16.argmax(-1) == best).sum().item(),
        decided=decided.sum().item(),
        violations=len(violations),
        not_finite=(~finite).sum().item(),
        worst_ratio=ratios[worst].item(),
        worst_position=first + worst,
    )
    return tally, violations


def check(folder: Path, prompts_file: Path, ours_file: Path, device: str, limits: Limits) -> Report:
    """Runs the comparison; the models stay loaded over all prompts, the logits never exist as a whole."""
    exact = load_model(folder, torch.float32, device)
    usual = load_model(folder, torch.bfloat16, device)
    prompts = read_prompts(prompts_file, exact.config.vocab_size)
    ours = open_logits(ours_file, sum(map(len, prompts)), exact.config.vocab_size)

    report, start = Report(), 0
    for index, prompt in enumerate(prompts):
        exact_hidden, usual_hidden = hidden_states(exact, prompt), hidden_states(usual, prompt)
        whole = Tally()
        for first in range(0, len(prompt), CHUNK):
            last = min(first + CHUNK, len(prompt))
            piece = torch.from_numpy(ours[start + first : start + last].copy()).to(device)
            reference = logits_of(exact, exact_hidden[first:last])
            tally, violations = compare(reference, logits_of(usual, usual_hidden[first:last]), piece, first, limits)
            if tally.worst_ratio > whole.worst_ratio:
                whole.worst_position = tally.worst_position
            whole.add(tally)
            report.violations += [{"prompt": index, **violation} for violation in violations]
        report.prompts.append(whole)
        report.overall.add(whole)
        start += len(prompt)
    report.failures = failures(report, limits)
    return report


def failures(report: Report, limits: Limits) -> list[str]:
    """Each rule that is broken, in words."""
    found = []
    if report.overall.not_finite:
        found.append(f"{report.overall.not_finite} logits are not finite")
    if report.overall.ratio() > limits.tolerance:
        found.append(f"error {report.overall.ratio():.3f} times bfloat16's, above {limits.tolerance}")
    for index, tally in enumerate(report.prompts):
        if tally.ratio() > limits.prompt_tolerance:
            found.append(f"prompt {index}: error {tally.ratio():.3f} times bfloat16's, above {limits.prompt_tolerance}")
        if tally.worst_ratio > limits.position_tolerance:
            place = f"prompt {index}, position {tally.worst_position}"
            found.append(f"{place}: error {tally.worst_ratio:.3f} times bfloat16's, above {limits.position_tolerance}")
    for v in report.violations:
        found.append(
            f"prompt {v['prompt']}, position {v['position']}: argmax {v['ours']}, but {v['expected']} leads by "
            f"{v['margin']:.4f} where bfloat16's noise is {v['noise']:.4f}"
        )
    return found


def print_table(report: Report):
    """A line a prompt, then all of them."""
    print(
        "prompt  length   rel.error   bf16's     ratio  worst@pos       max err  bf16's   agree  (bf16)  decided  violated"
    )
    rows = [(str(index), tally) for index, tally in enumerate(report.prompts)] + [("all", report.overall)]
    for name, t in rows:
        place = f"{t.worst_ratio:.2f}@{t.worst_position}" if t.worst_position >= 0 else f"{t.worst_ratio:.2f}"
        print(
            f"{name:>6} {t.positions:7}   {t.relative(t.ours_square):.3e}   {t.relative(t.bf16_square):.3e}  {t.ratio():5.3f}"
            f"  {place:<12}  {t.ours_max:8.4f} {t.bf16_max:8.4f} {t.agree:6} {t.bf16_agree:7} {t.decided:8} {t.violations:9}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--ours", type=Path, required=True, help="raw logits, see reference.py")
    parser.add_argument("--json", type=Path, help="write the whole report here")
    parser.add_argument("--device", default=default_device())
    for name, value in asdict(Limits()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=value)
    a = parser.parse_args()
    limits = Limits(**{name: getattr(a, name) for name in asdict(Limits())})

    report = check(a.folder, a.prompts, a.ours, a.device, limits)
    print_table(report)
    if a.json:
        a.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    for failure in report.failures[:20]:
        print(f"FAILED {failure}")
    print(f"{len(report.failures)} failures" if report.failures else "passed")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
