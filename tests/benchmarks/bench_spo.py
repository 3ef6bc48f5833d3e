"""SPO: answers per second of the trainer's own update, many answers a step against one at a time.

    python tests/benchmarks/bench_spo.py                          under a minute; prints a Markdown table
    python tests/benchmarks/bench_spo.py --model DIRECTORY        a real model (tests/real/smollm2.py): what
                                                                  it brings to read the prompt once

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
from common import OURS, write_json

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


def own_prompt(model, prompt_ids, completion_ids, completion_mask):
    """completion_logprobs as it is usually written: every answer has its own copy of the prompt."""
    ids = torch.cat([prompt_ids.expand(len(completion_ids), -1), completion_ids], dim=1)
    found = model(input_ids=ids, use_cache=False, logits_to_keep=completion_ids.shape[1] + 1)
    logprobs = found.logits[:, :-1].float().log_softmax(dim=-1)
    return (logprobs.gather(-1, completion_ids[..., None])[..., 0] * completion_mask).sum(dim=-1)


def compare_prompts(accelerator, model, steps):
    """Prints the seconds of a training step with and without a shared prompt, taken in turns."""
    config = replace(CONFIG, **spo.PRESETS["smollm2"] | dict(model=str(model), behaviour="uniform"))
    policy, tokenizer = spo.load_policy(config)
    reference, _ = spo.load_policy(config)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.0)      # the same weights for both
    ways = {"own prompt": own_prompt, "shared prompt": spo.completion_logprobs}
    seconds, gradients = {name: [] for name in ways}, {}
    for step in range(steps + 1):                                  # the first warms up
        for name, way in ways.items():
            spo.completion_logprobs, known, rng = way, {}, np.random.default_rng(step)
            start = time.perf_counter()
            batch, _ = spo.collect(config, accelerator, policy, reference, tokenizer, rng, None, [], known)
            spo.update(config, accelerator, policy, optimizer, torch.tensor(-0.1), batch)
            seconds[name] += [time.perf_counter() - start] * (step > 0)
            gradients[name] = torch.cat([p.grad.flatten() for p in policy.parameters()])
    T, (own, shared) = spo.prompt_tokens(tokenizer).shape[1], gradients.values()
    different = len(batch["completion_ids"])
    print(f"a prompt of {T} tokens, {config.batch_size} answers ({different} different ones in the last step)\n")
    print("| | seconds per step, median | answers per second |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {np.median(values):.2f} | {config.batch_size / np.median(values):.1f} |")
    ratio = np.median(seconds["own prompt"]) / np.median(seconds["shared prompt"])
    gap = ((own - shared).norm() / own.norm()).item()
    print(f"\n{ratio:.1f} times as many; the gradients differ by {gap:.1e} of their length")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=5, help="with --model")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spo.transformers.logging.disable_progress_bar()
    accelerator, B = Accelerator(cpu=True), CONFIG.batch_size
    if args.model:
        return compare_prompts(accelerator, args.model, args.steps)
    rates = {"1": rate(accelerator, 1, 300, False),
             f"{B}, each answer scored": rate(accelerator, B, 40, False),
             f"{B}, equal answers scored once (the trainer)": rate(accelerator, B, 40, True)}
    print("| answers per step | answers per second | times as many |\n|---|---|---|")
    for name, value in rates.items():
        print(f"| {name} | {value:,.0f} | {value / rates['1']:.0f} |")
    print(f"\n{args.threads} thread")
    plain, ours = list(rates.values())[1:]
    rows = [dict(name=name, rate=value, seconds=B / value, times_ours=ours / value) for name, value in ((OURS, ours), ("a plain batched loop (no library has SPO)", plain))]
    write_json(args.json, lesson="spo_dummy", what=f"{B} answers a step", model="", threads=args.threads, rows=rows)


if __name__ == "__main__":
    main()
