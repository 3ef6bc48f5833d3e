"""Dr. GRPO on word problems: this collection's trainer against TRL's GRPOTrainer; same model, problems, reward, group size, lengths and threads, one process.

    python tests/benchmarks/bench_kl_bernoulli.py         about two minutes; prints a Markdown table

Both do per step: draw 64 × 4 answers of at most 40 tokens, check them, one step of AdamW on the loss of Dr. GRPO. Steps alternate between the
two, after two for warming up; medians are printed. Ours leaves groups of equal rewards out of the update, TRL does not.
"""
import argparse
import itertools
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator

FOLDER = Path(__file__).resolve().parents[2] / "kl_bernoulli_gsm8k"
sys.path.insert(0, str(FOLDER))
import train_kl_bernoulli as ours

PROBLEMS, K, LONGEST = 64, 4, 40


def ours_stepper():
    """A function that makes one step and returns (drawing seconds, all seconds, tokens drawn)."""
    config = ours.Config(group_size=K, batch_size=PROBLEMS * K, max_new_tokens=LONGEST, lr=1e-6)
    accelerator = Accelerator(cpu=True)
    policy, tokenizer = ours.load_policy(config)
    policy, optimizer = accelerator.prepare(policy.eval(), torch.optim.AdamW(policy.parameters(), lr=config.lr))
    problems, _ = ours.load_problems(config)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def step():
        start = time.perf_counter()
        batch, _ = ours.collect(config, policy, tokenizer, [problems[k] for k in rng.choice(len(problems), PROBLEMS, replace=False)], generator)
        middle = time.perf_counter()
        ours.update(config, accelerator, policy, optimizer, batch)
        return middle - start, time.perf_counter() - start, batch["completion_mask"].sum().item()
    return step


def trl_stepper(rows):
    """The same for TRL; `rows` answers per forward pass."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    accumulation = PROBLEMS * K // rows
    policy, tokenizer = ours.load_policy(ours.Config())
    problems, _ = ours.load_problems(ours.Config())

    def reward(completions, result, **_):
        return [ours.reward_of(answer[0]["content"], Fraction(wanted), True) for answer, wanted in zip(completions, result)]
    args = GRPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1000, loss_type="dr_grpo", scale_rewards="none",
                      per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, num_generations=K, max_completion_length=LONGEST, temperature=1.0, top_k=0, top_p=1.0,
                      disable_dropout=True, beta=0.0, learning_rate=1e-6, max_steps=10**6, disable_tqdm=True)
    data = Dataset.from_dict(dict(prompt=[[dict(role="user", content=question)] for question, _, _ in problems], result=[str(result) for _, result, _ in problems]))
    trainer = GRPOTrainer(model=policy, reward_funcs=reward, processing_class=tokenizer, args=args, train_dataset=data)
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    dataloader = trainer.get_train_dataloader()
    loader = (batch for _ in itertools.count() for batch in dataloader)
    original, drawing = trainer._generate_and_score_completions, []

    def timed(inputs):
        start = time.perf_counter()
        result = original(inputs)
        drawing.append((time.perf_counter() - start, result["completion_mask"].sum().item()))
        return result
    trainer._generate_and_score_completions = timed
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = accumulation

    def step():
        drawing.clear()
        start = time.perf_counter()
        for _ in range(accumulation):
            trainer.training_step(trainer.model, next(loader), None)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        trainer.state.global_step += 1
        return drawing[0][0], time.perf_counter() - start, drawing[0][1]
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads (default 2)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    steppers = {"this trainer": ours_stepper(), "TRL, 256 answers a pass": trl_stepper(256), "TRL, 64 answers a pass": trl_stepper(64)}
    found = {name: [] for name in steppers}
    for number in range(args.steps + 2):
        for name, step in steppers.items():
            result = step()
            if number >= 2:
                found[name].append(result)
    median = {name: [statistics.median(values) for values in zip(*rows)] for name, rows in found.items()}
    best = min(seconds for name, (_, seconds, _) in median.items() if name != "this trainer")
    print(f"\n{args.threads} threads, {PROBLEMS} problems × {K} answers of at most {LONGEST} tokens, medians of {args.steps} steps\n")
    print("| | s a step | drawing | update | answers per second | tokens a step | times as fast as the faster TRL |\n|---|---|---|---|---|---|---|")
    for name, (drawing, seconds, tokens) in median.items():
        print(f"| {name} | {seconds:.2f} | {drawing:.2f} | {seconds - drawing:.2f} | {PROBLEMS * K / seconds:.0f} | {tokens:,.0f} | {best / seconds:.2f} |")


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_kl_bernoulli.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
