"""RLOO: this collection's trainer against TRL's RLOOTrainer, same SFT model, prompts, reward model, group size, lengths and threads, one process.

    python tests/benchmarks/bench_rlhf.py                 about five minutes; prints a Markdown table
    python tests/benchmarks/bench_rlhf.py --reward-model reinforce_rlhf/runs/mine/reward_model_run/reward_model
    python tests/benchmarks/bench_rlhf.py --model DIR --prompts 8 --rows 32 8 --steps 5            a real model (tests/real/smollm2.py), half an hour

Both do the same work per step: sample 4 answers to each of 64 prompts, of at most 64 tokens, score them with the level-1 reward model and with the reference, take the KL off the
reward, and make one step of AdamW on the leave-one-out advantages. The policy's log-probabilities come for free in ours, because they are those it sampled with;
TRL computes them once more, and that work is not in the floor.
Steps alternate between the contenders, after three steps for warming up; medians are printed. First comes the floor: the multiplications that no
implementation can avoid, for the answers as long as they were, at the rate of a large matrix product on this machine.
"""
import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from common import OURS, OWN_PROMPT, Memory, head, in_turns, layers, matrix_rate, swapped, table, write_json

FOLDER = Path(__file__).resolve().parents[2] / "reinforce_rlhf"
sys.path.insert(0, str(FOLDER))
import train_reinforce_rlhf as ours

GROUP, LONGEST, BETA, LR = 4, 64, 0.2, 1e-6


def ours_stepper(config, judge, prompts):
    """A function that makes one step and returns (sampling and scoring seconds, update seconds, tokens, peak MB)."""
    accelerator = Accelerator(cpu=True)
    policy, tokenizer = ours.load_policy(config)
    reference, _ = ours.load_policy(config)
    policy, optimizer = accelerator.prepare(policy.eval(), torch.optim.AdamW(policy.parameters(), lr=config.lr))
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def step():
        asked = [prompts[k] for k in rng.choice(len(prompts), config.batch_size // GROUP, replace=False)]
        with Memory() as memory:
            start = time.perf_counter()
            batch, _ = ours.collect(config, policy, reference.requires_grad_(False).eval(), tokenizer, judge, asked, generator)
            middle = time.perf_counter()
            advantages = ours.answer_advantages(config, batch["returns"], None)
            ours.update(config, accelerator, policy, optimizer, batch | dict(advantages=advantages))
            end = time.perf_counter()
        return middle - start, end - middle, batch["completion_mask"].sum().item(), memory.above
    return step, policy, tokenizer


def own_prompt(model, batch, temperature, _):
    """completion_logprobs as it is usually written: every answer has its own copy of the prompt."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"].long()], dim=1)
    found = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), use_cache=False,
                  logits_to_keep=batch["completion_ids"].shape[1] + 1)
    logits = found.logits[:, :-1].float() / temperature
    chosen = logits.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
    return (chosen - logits.logsumexp(dim=-1)) * batch["completion_mask"]


def trl_stepper(config, judge, prompts, rows):
    """The same for TRL; `rows` answers per forward pass."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer
    accumulation = config.batch_size // rows

    def reward(prompts, completions, **_):
        return ours.reward_from_logits(ours.reward_logits(*judge, [p[-1]["content"] for p in prompts], [c[0]["content"] for c in completions], config.max_length)).tolist()
    args = RLOOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1000,
                      per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, num_generations=GROUP, max_completion_length=LONGEST, num_iterations=1,
                      temperature=1.0, top_k=0, top_p=1.0, normalize_advantages=False, disable_dropout=True, beta=BETA, learning_rate=LR, max_steps=10**6, disable_tqdm=True)
    policy, tokenizer = ours.load_policy(config)
    trainer = RLOOTrainer(model=policy, reward_funcs=reward, processing_class=tokenizer, args=args,
                          train_dataset=Dataset.from_dict(dict(prompt=[[dict(role="user", content=prompt)] for prompt in prompts])))
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    if trainer.ref_model is None:
        raise SystemExit("TRL made no reference model; this comparison would not be fair")
    dataloader = trainer.get_train_dataloader()
    loader = (batch for _ in itertools.count() for batch in dataloader)
    sampling = []
    original = trainer._generate_and_score_completions

    def timed(inputs):
        start = time.perf_counter()
        result = original(inputs)
        sampling.append((time.perf_counter() - start, len(inputs), result["completion_mask"].sum().item()))
        return result
    trainer._generate_and_score_completions = timed
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = accumulation

    def step():
        sampling.clear()
        with Memory() as memory:
            start = time.perf_counter()
            for _ in range(accumulation):
                trainer.training_step(trainer.model, next(loader), None)
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.model.zero_grad()
            trainer.state.global_step += 1
            seconds = time.perf_counter() - start
        assert [count for _, count, _ in sampling] == [config.batch_size]
        return sampling[0][0], seconds - sampling[0][0], sampling[0][2], memory.above
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads (default 2)")
    parser.add_argument("--reward-model", default=str(FOLDER / "weights" / "reward_model_level1"), metavar="PATH", help="a level-1 reward model (default: the shipped one)")
    parser.add_argument("--model", default="", metavar="DIR", help="the policy (default: the shipped SFT model)")
    parser.add_argument("--prompts", type=int, default=64, help="prompts per step (default 64)")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 32], help="TRL: answers per forward pass, for each of its contenders")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    judge = ours.load_reward_model(args.reward_model, 1)
    config = ours.Config(model=args.model, estimator="rloo", group_size=GROUP, batch_size=args.prompts * GROUP, max_new_tokens=LONGEST, kl_coef=BETA, lr=LR)
    sft, tokenizer = ours.load_policy(ours.Config())
    prompts = ours.load_prompts(ours.Config(), Path(args.reward_model), sft, judge[0], tokenizer)
    rate = matrix_rate()
    what = f"{args.prompts} prompts × {GROUP} answers of at most {LONGEST} tokens"
    print(f"{args.threads} threads, {rate / 1e9:.0f} GFLOP/s, {what}")
    mine, policy, tokenizer = ours_stepper(config, judge, prompts)
    contenders = {OURS: mine, OWN_PROMPT: swapped(ours, "completion_logprobs", own_prompt, mine)} | {f"TRL, {rows} answers a pass": trl_stepper(config, judge, prompts, rows) for rows in args.rows}
    results = in_turns(contenders, args.steps, warm=1 if args.model else 3)
    T = float(np.mean([ours.prompt_tokens(tokenizer, [prompt])[0].shape[1] for prompt in prompts]))
    floors = []
    for _, _, tokens, _ in results[OURS]:
        # A prompt's tokens need no more than one pass for all its answers, except in the reward model, which sees texts one by one
        once = 2 * tokens * (layers(policy) + head(policy)) + 2 * args.prompts * T * layers(policy)
        judging = 2 * (tokens + args.prompts * GROUP * T) * layers(judge[0])
        floors.append((once + judging + once + 3 * once) / rate)                                   # sampling, reward model, reference, update
    found = table(results, args.prompts * GROUP, floors)
    write_json(args.json, lesson="reinforce_rlhf", what=what, model=args.model and Path(args.model).name, threads=args.threads, rate=rate, **found)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_rlhf.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
