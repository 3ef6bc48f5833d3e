"""Counts where the losses of the GSM8K lesson have something to learn: one answer each to the first 256 training problems, by the base model, seed 0.

And asks what the base model knows already: the test problems, with the sentence "I see it at once." forbidden, so that it has to write its working.

    python tests/benchmarks/count_kl_bernoulli.py         a minute; prints the figures that the lesson's README quotes
"""
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[2] / "kl_bernoulli_gsm8k"
sys.path.insert(0, str(FOLDER))
import kl_bernoulli_eval
import train_kl_bernoulli as ours


def forbid(model, token):
    """The model never writes this token again."""
    def never(module, args, kwargs, output):
        output.logits[..., token] = -torch.inf
        return output
    model.register_forward_hook(never, with_kwargs=True)


def share_right(config, model, tokenizer, problems, samples, temperature):
    """The share of right answers to the problems, each answered `samples` times."""
    results = kl_bernoulli_eval.solve(config, model, tokenizer, problems, samples, temperature, seed=0)["results"]
    wanted = [problem.result for problem in problems for _ in range(samples)]
    return sum(result == number for result, number in zip(results, wanted)) / len(wanted)


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

    problems = ours.load_problems(config)[1]
    for name in ("base model", "base model without 'I see it at once.'"):
        if name != "base model":
            forbid(model, tokenizer("I see it at once.", add_special_tokens=False)["input_ids"][0])
        print(f"{name}, {len(problems)} test problems: greedy {share_right(config, model, tokenizer, problems, 1, 0.0):.1%}, "
              f"T = 1 {share_right(config, model, tokenizer, problems, 16, 1.0):.1%}")


if __name__ == "__main__":
    main()
