"""Counts where the losses of the GSM8K lesson have something to learn: one answer each to the first 256 training problems, by the base model, seed 0.

    python tests/benchmarks/count_kl_bernoulli.py         seconds; prints the figures that the lesson's README quotes
"""
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[2] / "kl_bernoulli_gsm8k"
sys.path.insert(0, str(FOLDER))
import train_kl_bernoulli as ours


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    config = ours.Config(group_size=1)
    model, tokenizer = ours.load_policy(config)
    batch, _ = ours.collect(config, model.eval(), tokenizer, ours.load_problems(config)[0][:256], torch.Generator().manual_seed(0))
    ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"].long()], dim=1) for kind in ("ids", "mask"))
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)).logits[:, -batch["completion_ids"].shape[1] - 1:-1]
    real = batch["completion_mask"] > 0
    logits, drawn, right = logits[real], batch["completion_ids"][real], (batch["rewards"][:, None] * batch["completion_mask"])[real] > 0
    logp, _, logP, _, _ = ours.token_terms(logits, drawn)
    naive = ours.token_terms(logits, drawn, naive=True)[3]
    other = right & (drawn != logits.argmax(dim=-1))
    print(f"{batch['rewards'].mean():.1%} of the answers are right; they have {int(right.sum()):,} tokens, of which {1 - other.sum() / right.sum():.1%} are the favourite")
    print(f"{int(other.sum())} are not: mean p {logp[other].exp().mean():.2f}, mean P {logP[other].exp().mean():.2f}")
    print(f"p > 1/2 at {(logp.exp() > 0.5).float().mean():.1%} of all {len(drawn):,} tokens; log1p(-P) is -inf at {(~torch.isfinite(naive)).float().mean():.1%}")


if __name__ == "__main__":
    main()
