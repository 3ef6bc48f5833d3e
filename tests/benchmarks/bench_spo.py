"""SPO: answers per second of the trainer's own update, many answers a step against one at a time.

    python tests/benchmarks/bench_spo.py        under a minute; prints a Markdown table

Same model, same loss, one process.
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "spo_dummy"))
import train_spo as spo

CONFIG = spo.Config(behaviour="uniform", max_grad_norm=1.0)


def rate(accelerator, batch_size, steps, each_once):
    """Answers per second of complete training steps: answers, both models' scores, backward, Adam.

    each_once: as train() does, equal answers are scored once and the reference is asked once. Else
    every answer is scored by both models, as in a plain batched loop.
    """
    torch.manual_seed(0)
    config = replace(CONFIG, batch_size=batch_size)
    policy, tokenizer = spo.load_policy(config)
    reference, _ = spo.load_policy(config)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)
    rng, q0, known = np.random.default_rng(0), torch.tensor(-0.1), {}
    for step in range(steps + 3):
        if step == 3:
            start = time.perf_counter()               # the first three warm up
        if each_once:
            batch, _ = spo.collect(config, accelerator, policy, reference, tokenizer, rng, None, [], known)
            spo.update(config, accelerator, policy, optimizer, q0, batch)
        else:
            plain_step(config, policy, reference, tokenizer, optimizer, rng, q0)
    return steps * batch_size / (time.perf_counter() - start)


def plain_step(config, policy, reference, tokenizer, optimizer, rng, q0):
    """The step that whoever does not look for equal answers would write."""
    answers = spo.behave(config, policy, tokenizer, config.batch_size, rng, None, [])
    texts = [spo.answer_text(tokenizer, answer) for answer in answers]
    rewards = torch.tensor([spo.reward_of(text, config.target) for text in texts])
    completions = spo.pad(answers, tokenizer.eos_token_id)
    prompt_ids = spo.prompt_tokens(tokenizer)
    with torch.no_grad():
        ref_logprobs = spo.completion_logprobs(reference, prompt_ids, *completions)
    logprobs = spo.completion_logprobs(policy, prompt_ids, *completions)
    loss, _ = spo.spo_loss(logprobs - ref_logprobs, rewards, q0, config.beta, config.loss)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spo.transformers.logging.disable_progress_bar()
    accelerator, B = Accelerator(cpu=True), CONFIG.batch_size
    rates = {"1": rate(accelerator, 1, 300, False),
             f"{B}, each answer scored": rate(accelerator, B, 40, False),
             f"{B}, equal answers scored once (the trainer)": rate(accelerator, B, 40, True)}
    print("| answers per step | answers per second | times as many |\n|---|---|---|")
    for name, value in rates.items():
        print(f"| {name} | {value:,.0f} | {value / rates['1']:.0f} |")
    print(f"\n{args.threads} thread")


if __name__ == "__main__":
    main()
