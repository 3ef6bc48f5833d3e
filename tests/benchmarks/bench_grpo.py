"""GRPO: this collection's trainer against TRL's GRPOTrainer, same model, prompts, reward model, group size, lengths and threads, one process.

    python tests/benchmarks/bench_grpo.py                 about three minutes; prints a Markdown table

Both do the same work per update: sample 32 × 8 answers of at most 64 tokens, score them with the reward model, score them with the reference,
one step of AdamW with the KL term k3; the policy's log-probabilities come for free with sampling in ours, and TRL leaves them out too.
Updates alternate between the two, after three updates for warming up; medians are printed. First comes the floor: the multiplications that no
implementation can avoid, for the answers as long as they were, at the rate of a large matrix product on this machine.
"""
import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator

FOLDER = Path(__file__).resolve().parents[2] / "grpo_lm"
sys.path.insert(0, str(FOLDER))
import train_grpo as ours

PROMPTS, GROUP, LONGEST, KL_COEF = 32, 8, 64, 0.05


class Memory:
    """Peak resident memory in MB while a block runs."""
    def __enter__(self):
        self.peak, self.running = 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6)
            time.sleep(0.005)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()


def ours_stepper(judge, prompts):
    """A function that makes one update and returns (seconds of sampling and scoring, of the update, tokens, peak MB)."""
    config = ours.Config(batch_size=PROMPTS * GROUP, group_size=GROUP, max_new_tokens=LONGEST, kl_coef=KL_COEF, lr=1e-6)
    accelerator = Accelerator(cpu=True)
    policy, tokenizer = ours.load_policy(config)
    reference, _ = ours.load_policy(config)
    policy, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters(), lr=config.lr))
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def step():
        asked = [prompts[k] for k in rng.choice(len(prompts), PROMPTS, replace=False)]
        with Memory() as memory:
            start = time.perf_counter()
            batch, _ = ours.collect(config, accelerator, policy, reference, tokenizer, judge, asked, generator)
            middle = time.perf_counter()
            ours.update(config, accelerator, policy, optimizer, batch)
            end = time.perf_counter()
        return middle - start, end - middle, batch["completion_mask"].sum().item(), memory.peak
    return step, policy, tokenizer


def trl_stepper(judge, prompts, rows):
    """The same for TRL; `rows` answers per forward pass."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    accumulation = PROMPTS * GROUP // rows

    def reward(prompts, completions, **_):
        return ours.reward_scores(*judge, [p[-1]["content"] for p in prompts], [c[0]["content"] for c in completions], "auto").tolist()
    args = GRPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1000,
                      per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, num_generations=GROUP, max_completion_length=LONGEST,
                      temperature=1.0, top_k=0, top_p=1.0, disable_dropout=True, beta=KL_COEF, learning_rate=1e-6, loss_type="grpo", max_steps=10**6, disable_tqdm=True)
    policy, tokenizer = ours.load_policy(ours.Config())
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
        return sampling[0][0], seconds - sampling[0][0], sampling[0][1], memory.peak
    return step


def matrix_rate():
    """Multiply-adds per second of a large fp32 product, times two."""
    a, b = torch.randn(4096, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * a.numel() * 1024 / (time.perf_counter() - start))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=15, help="timed updates of each (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads (default 2)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    judge = ours.load_reward_model(ours.Config())
    prompts = ours.read_prompts(FOLDER / "weights" / "prompts_train.txt")
    rate = matrix_rate()
    print(f"{args.threads} threads, {rate / 1e9:.0f} GFLOP/s, {PROMPTS} prompts × {GROUP} answers of at most {LONGEST} tokens")
    mine, policy, tokenizer = ours_stepper(judge, prompts)
    contenders = {"this trainer": mine, "TRL, 256 answers a pass": trl_stepper(judge, prompts, 256), "TRL, 32 answers a pass": trl_stepper(judge, prompts, 32)}
    results = {name: [] for name in contenders}
    for k in range(args.updates + 3):
        for name, step in contenders.items():
            row = step()
            if k >= 3:
                results[name].append(row)
    # Multiply-adds: of the layers for every token read, of the head for every token of an answer, three times as many in the update (with gradient)
    weights = sum(p.numel() for name, p in policy.named_parameters() if not name.startswith(("transformer.wte", "transformer.wpe")))
    head = policy.get_output_embeddings().weight.numel()
    T = float(np.mean([ours.prompt_tokens(tokenizer, [prompt])[0].shape[1] for prompt in prompts]))
    floors = []
    for _, _, tokens, _ in results["this trainer"]:
        once = 2 * tokens * (weights + head) + 2 * PROMPTS * T * weights
        judging = 2 * (tokens + PROMPTS * GROUP * T) * weights
        floors.append((once + judging + once + 3 * once) / rate)  # sampling, reward model, reference, update

    def median(name, column):
        return statistics.median(row[column] for row in results[name])

    def total(name):
        return statistics.median(row[0] + row[1] for row in results[name])
    print("\n| | s per update | sampling and scoring | gradient step | answers per second | tokens | peak MB | times as fast as the faster TRL |\n|---|---|---|---|---|---|---|---|")
    print(f"| floor: its multiplications alone | {statistics.median(floors):.2f} | | | {PROMPTS * GROUP / statistics.median(floors):,.0f} | | | |")
    best = min(total(name) for name in results if name != "this trainer")
    for name in results:
        print(f"| {name} | {total(name):.2f} | {median(name, 0):.2f} | {median(name, 1):.2f} | {PROMPTS * GROUP / total(name):.0f} | {median(name, 2):,.0f} "
              f"| {median(name, 3):,.0f} | {best / total(name):.2f} |")


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_grpo.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
