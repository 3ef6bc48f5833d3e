"""Lesson 6, extend: the mean of two reward models, each standardised. What is not here stays as it is in the trainer.

A reader's own version, seed 1, the second command of the task: gold peaks near 5.3 at update 20, falls from about update 30, and is where the
SFT model is by update 65; 2.9 on the held-out prompts, distinct-2 .59. With one judge, gold is 1.0 to 1.6 there (section 6 of the lesson, three
seeds). So a second judge delays the fall and does not prevent it, in this one run.
"""


@dataclass
class Config:
    # What is trained, and on what
    level: int = hp(1, "reward model: 1, one number; 2, ten grades", choices=(1, 2))
    seed: int = hp(1, "same seed, same run on one CPU", low=0, high=2**31 - 1)
    model: str = hp("", "model to start from: path or hub name (default: weights/sft)")
    reward_model: str = hp("", "directory of a trained reward model (default: train one)")
    second_reward_model: str = hp("", "directory of a reward model of the other level: the reward "
                                  "is then the mean of both, each standardised")
    max_length: int = hp(128, "tokens of a prompt and its answer together", low=8)
    dataset: str = hp("", "preference data for train_reward_model.py (default: data)")
    config: str = hp("", "YAML file of settings, for train_reward_model.py too; flags win")
    # Sampling
    updates: int = hp(40, "batches of answers. Too many, with too little KL: over-optimisation",
                      low=1)
    batch_size: int = hp(256, "B, answers per update. Too low: noisy. Too high: slow", low=1)
    group_size: int = hp(0, "G, answers per prompt; 0 becomes 1 (reinforce) or 4 (rloo)", low=0)
    max_new_tokens: int = hp(64, "L, tokens after which an answer is cut off", low=1)
    temperature: float = hp(1.0, "logits are divided by it, in sampling and in training", low=1e-12)
    repetition_penalty: float = hp(1.0, "lowers tokens that the text has; 1: off", low=1, high=10)
    # The loss
    estimator: str = hp("reinforce", "baseline from earlier batches (reinforce), or from the other "
                        "answers to the prompt (rloo)", choices=("reinforce", "rloo"))
    baseline: str = hp("ema", "of reinforce: moving average that forgets (ema), or the mean of all "
                       "earlier batches (mean, the paper's)", choices=("ema", "mean"))
    kl_coef: float = hp(0.2, "β, price of a nat of KL. 0: the text breaks. Too high: nothing moves",
                        low=0)
    gamma: float = hp(1.0, "γ, discount per token that follows; 1: none", low=1e-12, high=1)
    # The optimizer
    lr: float = hp(5e-4, "α, AdamW's step size. Too high: the text breaks. Too low: nothing moves. "
                   "1e-6 to 1e-5 for 135 M parameters", low=1e-12)
    max_grad_norm: float = hp(1.0, "a longer gradient is shortened to this norm", low=1e-12)
    micro_batch: int = hp(32, "answers per forward pass: memory and speed, not the result", low=1)
    # For the reader
    save_every: int = hp(0, "keep the policy of every so many updates; 0: only the last", low=0)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))



def standardised_mean(rewards, scales):
    """The mean over the judges, each in its own unit.

    rewards: a list of [B], one for each judge; scales: a list of their (mean, std) for the SFT
    model's answers. Returns [B]: 0 is what the SFT model gets, 1 is one standard deviation better.
    """
    # A judge that calls all answers equal has std 0: it says nothing, and must not make a NaN
    parts = [(reward - mean) / max(std, 1e-6) for reward, (mean, std) in zip(rewards, scales)]
    return torch.stack(parts).mean(dim=0)


def rewards_of(config, judges, asked, texts):
    """What each judge gives to the answers: a list of [B]."""
    return [reward_from_logits(reward_logits(*judge, asked, texts, config.max_length))
            for judge in judges]


def first_scales(config, accelerator, reference, tokenizer, judges, prompts):
    """(mean, std) of each judge's rewards for a batch of the SFT model's answers.

    It is the batch of the first baseline, and it follows from the seed alone. So a resumed run has
    the same scales, and they stay the same during training: a scale that moved with the policy
    would take its progress away.
    """
    asked, generator = choose(config, accelerator, prompts, 0)
    _, texts = collect(config, reference, reference, tokenizer, (judges[:1], None), asked,
                       generator)
    asked = [prompt for prompt in asked for _ in range(config.group_size)]
    rewards = rewards_of(config, judges, asked, texts)                  # a list of [B]
    return [(reward.mean().item(), reward.std().item()) for reward in rewards]


def collect(config, policy, reference, tokenizer, judge, prompts, generator):
    """Answers to this process's prompts, and what they are worth.

    judge: (list of (reward model, its tokenizer), their scales or None). Returns (batch, texts).
    The batch holds prompt_ids and prompt_mask [B, T], completion_ids, completion_mask and logprobs
    [B, L], and r, Σ_t log π/π_ref and R of Eq. 4 as rewards, kl, returns [B].
    """
    prompt_ids, prompt_mask = prompt_tokens(tokenizer, prompts)
    prompt_ids, prompt_mask = prompt_ids.to(policy.device), prompt_mask.to(policy.device)
    completion_ids, completion_mask, logprobs = generate(
        policy, prompt_ids, prompt_mask, config.group_size, config.max_new_tokens,
        config.temperature, config.repetition_penalty, end_tokens(policy, tokenizer), generator)
    texts = answer_texts(tokenizer, completion_ids, completion_mask)

    batch = dict(prompt_ids=prompt_ids.repeat_interleave(config.group_size, dim=0),   # [B, T]
                 prompt_mask=prompt_mask.repeat_interleave(config.group_size, dim=0),
                 completion_ids=completion_ids, completion_mask=completion_mask, logprobs=logprobs)
    ref_logprobs = batch_logprobs(reference, batch, config.temperature, config.repetition_penalty,
                                  config.micro_batch)                   # [B, L]
    asked = [prompt for prompt in prompts for _ in range(config.group_size)]          # B prompts
    judges, scales = judge
    rewards = rewards_of(config, judges, asked, texts)                  # one or two of [B]
    rewards = standardised_mean(rewards, scales) if scales else rewards[0]            # [B]
    rewards = rewards.to(policy.device)
    # Eq. 4  No gradient flows through these log-probabilities. Nothing is lost: the missing term
    # is E[∇log π] = 0, and Eq. 7 does the rest (README.md, section 3). One answer's kl may be
    # negative; the mean estimates the KL
    kl = (logprobs - ref_logprobs).sum(dim=1)                           # [B]
    returns = rewards - config.kl_coef * kl                             # [B]
    return batch | dict(rewards=rewards, kl=kl, returns=returns), texts


def train(config, out, accelerator, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Writes into the directory `out`.

    Returns (policy, tokenizer, figures for train.json).
    """
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config)
    reward_model = Path(config.reward_model or out / PART_1)
    judges = [load_reward_model(reward_model, config.level, accelerator.device)]
    if config.second_reward_model:
        judges.append(load_reward_model(config.second_reward_model, 3 - config.level,
                                        accelerator.device))
    prompts = load_prompts(config, reward_model, policy, judges[0][0], tokenizer)
    # Before a checkpoint is loaded: the reference is where the run has STARTED
    reference = copy.deepcopy(policy).requires_grad_(False).eval().to(accelerator.device)
    scales = None
    if config.second_reward_model:
        scales = first_scales(config, accelerator, reference, tokenizer, judges, prompts)
    judge = judges, scales
    # Adam remembers the size of the gradients for some 20 steps (second beta .95): a run has 40. No
    # weight decay, which would pull the weights to 0: the KL term holds the policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0)
    state = load_checkpoint(out, policy, optimizer, accelerator.num_processes)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model = accelerator.unwrap_model(policy)          # sampling needs no exchange between processes
    if state["baseline"] is None:
        state["baseline"] = first_baseline(config, accelerator, model, reference, tokenizer, judge,
                                           prompts)
    log(f"{model.num_parameters()} parameters · {len(prompts)} prompts")
    log(HEADINGS)
    for number in tqdm(range(state["update"] + 1, config.updates + 1), initial=state["update"],
                       total=config.updates, disable=not bar, unit="update", leave=False):
        start = time.perf_counter()
        asked, generator = choose(config, accelerator, prompts, number)
        with accelerator.autocast():
            batch, texts = collect(config, model, reference, tokenizer, judge, asked, generator)
        batch["advantages"] = answer_advantages(config, batch["returns"], state["baseline"])
        terms = update(config, accelerator, policy, optimizer, batch)
        row = dict(update=number) | describe(config, accelerator, batch, texts) | terms
        if config.estimator == "reinforce":
            row["baseline"] = state["baseline"]
            state["baseline"] = baseline_after(config.baseline, state["baseline"], number,
                                               row["shaped_reward"])
        end = time.perf_counter()
        state["update"] = number
        state["rows"].append(row)
        state["clock"].append(dict(update=number, seconds=end - start))
        log(table_line(row | state["clock"][-1], left=config.updates - number))
        if number == 1 or number % 10 == 0:
            show_answers(log, asked[0], texts[:config.group_size], batch["rewards"])
        if accelerator.is_main_process:
            write_samples(out, number, asked, texts, batch["rewards"])
            if config.save_every and number % config.save_every == 0:
                save(model, tokenizer, out / f"policy-{number:04d}")
            if number % 10 == 0 or number == config.updates:
                save_checkpoint(out, model, optimizer, state)
    seconds = sum(row["seconds"] for row in state["clock"])
    return model, tokenizer, dict(updates=state["update"], train_seconds=seconds)
