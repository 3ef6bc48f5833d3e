"""SPO: answers per second of the trainer's own update, many answers a step against one at a time; same model, same loss, one process.

    python tests/benchmarks/bench_spo.py                 under a minute; prints a Markdown table
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "spo_dummy"))
import train_spo as spo


def rate(accelerator, batch, steps, each_once):
    """Answers per second of complete training steps: draw, score by both models, backward, Adam. each_once: as train() does, equal answers
    are scored once and the reference is asked once; else every answer is scored by both models, as in a plain batched loop."""
    torch.manual_seed(0)
    policy, tokenizer = spo.load_model(str(spo.HERE / "weights" / "base"))
    reference, _ = spo.load_model(str(spo.HERE / "weights" / "base"))
    config, optimizer = spo.Config(behaviour="uniform"), torch.optim.Adam(policy.parameters(), lr=1e-4)
    prompt, rng, known = spo.prompt_tokens(tokenizer), np.random.default_rng(0), {}
    for step in range(steps + 3):
        if step == 3:
            start = time.perf_counter()                           # the first three warm up
        rows = spo.behave(config, policy, tokenizer, prompt, batch, rng, None, [])
        if each_once:
            spo.update(config, accelerator, policy, reference, tokenizer, prompt, optimizer, rows, -0.1, known)
            continue
        rewards = torch.tensor([spo.reward_of(spo.answer_text(tokenizer, row), 42) for row in rows])
        completions, mask = spo.pad(rows, tokenizer.pad_token_id)
        with torch.no_grad():
            old = spo.completion_logprobs(reference, prompt, completions, mask)
        loss, _ = spo.spo_loss(spo.completion_logprobs(policy, prompt, completions, mask) - old, rewards, -0.1, 0.05, "squared")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return steps * batch / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    accelerator, batch = Accelerator(cpu=True), spo.Config().batch
    rates = {"1": rate(accelerator, 1, 300, False), f"{batch}, each answer scored": rate(accelerator, batch, 40, False),
             f"{batch}, equal answers scored once (the trainer)": rate(accelerator, batch, 40, True)}
    print("| answers per step | answers per second | times as many |\n|---|---|---|")
    for name, value in rates.items():
        print(f"| {name} | {value:,.0f} | {value / rates['1']:.0f} |")
    print(f"\n{args.threads} thread")


if __name__ == "__main__":
    main()
