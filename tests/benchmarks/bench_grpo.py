"""GRPO: this collection's trainer against TRL's GRPOTrainer, same model, prompts, reward model, group size, lengths and threads, one process.

    python tests/benchmarks/bench_grpo.py                 about three minutes; prints a Markdown table
    python tests/benchmarks/bench_grpo.py --model DIR --prompts 4 --rows 32 8 --updates 5          a real model (tests/real/smollm2.py), half an hour

Both do the same work per update: sample 8 answers to each of 32 prompts, of at most 64 tokens, score them with the reward model, score them with the reference,
one step of AdamW with the KL term k3; the policy's log-probabilities come for free with sampling in ours, and TRL leaves them out too.
Updates alternate between the two, after three updates for warming up; medians are printed. First comes the floor: the multiplications that no
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

FOLDER = Path(__file__).resolve().parents[2] / "grpo_lm"
sys.path.insert(0, str(FOLDER))
import train_grpo as ours

GROUP, LONGEST, KL_COEF = 8, 64, 0.05


def ours_stepper(model, judge, prompts, asked_at_once):
    """A function that makes one update and returns (seconds of sampling and scoring, of the update, tokens, peak MB)."""
    config = ours.Config(model=model, batch_size=asked_at_once * GROUP, group_size=GROUP, max_new_tokens=LONGEST, kl_coef=KL_COEF, lr=1e-6)
    accelerator = Accelerator(cpu=True)
    policy, tokenizer = ours.load_policy(config)
    reference, _ = ours.load_policy(config)
    policy, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters(), lr=config.lr))
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def step():
        asked = [prompts[k] for k in rng.choice(len(prompts), asked_at_once, replace=False)]
        with Memory() as memory:
            start = time.perf_counter()
            batch, _ = ours.collect(config, accelerator, policy, reference, tokenizer, judge, asked, generator)
            middle = time.perf_counter()
            ours.update(config, accelerator, policy, optimizer, batch)
            end = time.perf_counter()
        return middle - start, end - middle, batch["completion_mask"].sum().item(), memory.above
    return step, policy, tokenizer


def own_prompt(model, batch, temperature):
    """completion_logprobs as it is usually written: every answer has its own copy of the prompt."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"].long()], dim=1)
    found = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), use_cache=False,
                  logits_to_keep=batch["completion_ids"].shape[1] + 1)
    logits = found.logits[:, :-1].float() / temperature
    chosen = logits.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
    return (chosen - logits.logsumexp(dim=-1)) * batch["completion_mask"]


def trl_stepper(model, judge, prompts, asked_at_once, rows):
    """The same for TRL; `rows` answers per forward pass."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    accumulation = asked_at_once * GROUP // rows

    def reward(prompts, completions, **_):
        return ours.reward_scores(*judge, [p[-1]["content"] for p in prompts], [c[0]["content"] for c in completions], "auto").tolist()
    args = GRPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1000,
                      per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, num_generations=GROUP, max_completion_length=LONGEST,
                      temperature=1.0, top_k=0, top_p=1.0, disable_dropout=True, beta=KL_COEF, learning_rate=1e-6, loss_type="grpo", max_steps=10**6, disable_tqdm=True)
    policy, tokenizer = ours.load_policy(ours.Config(model=model))
    trainer = GRPOTrainer(model=policy, reward_funcs=reward, processing_class=tokenizer, args=args,
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
        sampling.append((time.perf_counter() - start, result["completion_mask"].sum().item()))
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
        return sampling[0][0], seconds - sampling[0][0], sampling[0][1], memory.above
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=15, help="timed updates of each (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads (default 2)")
    parser.add_argument("--model", default="", metavar="DIR", help="the policy (default: the shipped one)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per update (default 32)")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 32], help="TRL: answers per forward pass, for each of its contenders")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    judge = ours.load_reward_model(ours.Config())
    prompts = ours.read_prompts(FOLDER / "weights" / "prompts_train.txt")
    rate = matrix_rate()
    what = f"{args.prompts} prompts × {GROUP} answers of at most {LONGEST} tokens"
    print(f"{args.threads} threads, {rate / 1e9:.0f} GFLOP/s, {what}")
    mine, policy, tokenizer = ours_stepper(args.model, judge, prompts, args.prompts)
    contenders = {OURS: mine, OWN_PROMPT: swapped(ours, "completion_logprobs", own_prompt, mine)} | {f"TRL, {rows} answers a pass": trl_stepper(args.model, judge, prompts, args.prompts, rows) for rows in args.rows}
    results = in_turns(contenders, args.updates, warm=1 if args.model else 3)
    # Of the layers for every token read, of the head for every token of an answer, three times as many in the update (with gradient).
    # A prompt is read once for all its answers, except by the reward model, which sees texts one by one
    T = float(np.mean([ours.prompt_tokens(tokenizer, [prompt])[0].shape[1] for prompt in prompts]))
    floors = []
    for _, _, tokens, _ in results[OURS]:
        once = 2 * tokens * (layers(policy) + head(policy)) + 2 * args.prompts * T * layers(policy)
        judging = 2 * (tokens + args.prompts * GROUP * T) * layers(judge[0])
        floors.append((once + judging + once + 3 * once) / rate)                                   # sampling, reward model, reference, update
    found = table(results, args.prompts * GROUP, floors)
    write_json(args.json, lesson="grpo_lm", what=what, model=args.model and Path(args.model).name, threads=args.threads, rate=rate, **found)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_grpo.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
