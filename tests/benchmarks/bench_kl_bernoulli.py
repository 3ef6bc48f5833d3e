"""Dr. GRPO on word problems: this collection's trainer against TRL's GRPOTrainer; same model, problems, reward, group size, lengths and threads, one process.

    python tests/benchmarks/bench_kl_bernoulli.py         about two minutes; prints a Markdown table
    python tests/benchmarks/bench_kl_bernoulli.py --model DIR --problems 4 --longest 64 --rows 32 8 --steps 5      a real model (tests/real/smollm2.py)

Both do per step: sample 4 answers of at most 40 tokens to each of 64 problems (a real model: 8 answers), check them, one step of AdamW on the loss of Dr. GRPO.
Steps alternate between the two, after two for warming up; medians are printed. Ours leaves groups of equal rewards out of the update, TRL does not. A real model
solves none of these problems, so there would be nothing to learn from: there, an answer of an even number of characters counts as right, in both.
The floor is the multiplications that no implementation can avoid, for the answers as long as they were, at the rate of a large matrix product.
"""
import argparse
import itertools
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from common import OURS, OWN_PROMPT, Memory, head, in_turns, layers, matrix_rate, swapped, table, write_json

FOLDER = Path(__file__).resolve().parents[2] / "kl_bernoulli_gsm8k"
sys.path.insert(0, str(FOLDER))
import train_kl_bernoulli as ours



def settings(args):
    return ours.Config(model=args.model, group_size=args.group, batch_size=args.problems * args.group, max_new_tokens=args.longest, micro_batch=args.micro_batch, lr=1e-6)


def ours_stepper(args):
    """A function that makes one step and returns (sampling seconds, update seconds, tokens, peak MB)."""
    config = settings(args)
    accelerator = Accelerator(cpu=True)
    policy, tokenizer = ours.load_policy(config)
    policy, optimizer = accelerator.prepare(policy.eval(), torch.optim.AdamW(policy.parameters(), lr=config.lr))
    problems, _ = ours.load_problems(config)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def step():
        asked = [problems[k] for k in rng.choice(len(problems), args.problems, replace=False)]
        with Memory() as memory:
            start = time.perf_counter()
            batch, _ = ours.collect(config, policy, tokenizer, asked, generator)
            middle = time.perf_counter()
            done = ours.update(config, accelerator, policy, optimizer, batch)
            end = time.perf_counter()
        trained.append(done["trained"] / len(batch["rewards"]))
        return middle - start, end - middle, batch["completion_mask"].sum().item(), memory.above
    trained = []
    return step, policy, tokenizer, problems, trained


def trl_stepper(args, rows):
    """The same for TRL; `rows` answers per forward pass."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    accumulation = args.problems * args.group // rows
    config = settings(args)
    policy, tokenizer = ours.load_policy(config)
    problems, _ = ours.load_problems(config)

    def reward(completions, result, **_):
        return [ours.reward_of(answer[0]["content"], Fraction(wanted), True) for answer, wanted in zip(completions, result)]
    setup = GRPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1000, loss_type="dr_grpo", scale_rewards="none",
                      per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, num_generations=args.group, max_completion_length=args.longest, temperature=1.0, top_k=0, top_p=1.0,
                      disable_dropout=True, beta=0.0, learning_rate=1e-6, max_steps=10**6, disable_tqdm=True)
    data = Dataset.from_dict(dict(prompt=[[dict(role="user", content=question)] for question, _, _ in problems], result=[str(result) for _, result, _ in problems]))
    trainer = GRPOTrainer(model=policy, reward_funcs=reward, processing_class=tokenizer, args=setup, train_dataset=data)
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
        with Memory() as memory:
            start = time.perf_counter()
            for _ in range(accumulation):
                trainer.training_step(trainer.model, next(loader), None)
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.model.zero_grad()
            trainer.state.global_step += 1
            seconds = time.perf_counter() - start
        return drawing[0][0], seconds - drawing[0][0], drawing[0][1], memory.above
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads (default 2)")
    parser.add_argument("--model", default="", metavar="DIR", help="the policy (default: the shipped one)")
    parser.add_argument("--problems", type=int, default=64, help="problems per step (default 64)")
    parser.add_argument("--longest", type=int, default=40, help="tokens of an answer (default 40)")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 64], help="TRL: answers per forward pass, for each of its contenders")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    args.group, args.micro_batch = (8, 8) if args.model else (4, ours.Config.micro_batch)
    if args.model:
        ours.reward_of = lambda text, *_: float(len(text) % 2 == 0)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    rate = matrix_rate()
    what = f"{args.problems} problems × {args.group} answers of at most {args.longest} tokens"
    print(f"{args.threads} threads, {rate / 1e9:.0f} GFLOP/s, {what}")
    mine, policy, tokenizer, problems, trained = ours_stepper(args)
    shared = ours.answer_states
    own = swapped(ours, "answer_states", lambda policy, head, part, **_: shared(policy, head, part, shared=False), mine)
    contenders = {OURS: mine, OWN_PROMPT: own} | {f"TRL, {rows} answers a pass": trl_stepper(args, rows) for rows in args.rows}
    results = in_turns(contenders, args.steps, warm=1 if args.model else 2)
    texts = [ours.prompt_text(tokenizer, problem.question, settings(args).instruction) for problem in problems[:500]]
    T = float(np.mean([ours.prompt_tokens(tokenizer, [text])[0].shape[1] for text in texts]))
    floors = []
    for share, (_, _, tokens, _) in zip(trained[-2 * args.steps::2], results[OURS]):     # OWN_PROMPT's steps are in between
        # A prompt's tokens need no more than one pass for all its answers. The update (three times as much) reads only the answers of unequal groups
        once = 2 * tokens * (layers(policy) + head(policy)) + 2 * args.problems * T * layers(policy)
        floors.append((once + 3 * share * once) / rate)
    found = table(results, args.problems * args.group, floors)
    write_json(args.json, lesson="kl_bernoulli_gsm8k", what=what, model=args.model and Path(args.model).name, threads=args.threads, rate=rate, **found)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_kl_bernoulli.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
