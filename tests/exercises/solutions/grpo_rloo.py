"""Lesson 5, extend: RLOO, each answer against the mean of the others. What is not here stays as it is in the trainer."""


@dataclass
class Config:
    # What is trained, and on what
    seed: int = hp(1, "same seed, same run on one CPU", low=0, high=2**31 - 1)
    model: str = hp("", "policy to train: path or hub name (default: weights/base)")
    reward_model: str = hp("", "classifier with one logit (default: weights/reward_model)")
    reward_input: str = hp("auto", "what the reward model reads: two texts, a chat, or one text; "
                           "auto asks its tokenizer", choices=("auto", "pair", "chat", "text"))
    prompt: str = hp("", "train on this one prompt")
    prompts: str = hp("", "file with one prompt per line, instead of --prompt (default: "
                      "weights/prompts_train.txt)")
    # Sampling
    updates: int = hp(40, "batches of answers. Too many: reward rises, real quality falls", low=1)
    batch_size: int = hp(256, "B, answers per update. Too low: noisy. Too high: slow", low=2)
    group_size: int = hp(8, "G, answers per prompt. Too low: mean and std are noisy. 4 to 16",
                         low=2)
    max_new_tokens: int = hp(64, "tokens after which an answer is cut off", low=1)
    temperature: float = hp(1.0, "logits are divided by it, in sampling and in training", low=1e-12)
    # The loss
    clip_eps: float = hp(0.2, "ε: beyond 1 ± ε a ratio brings no more gain", low=1e-12)
    scale_rewards: str = hp("group", "divide advantages by the std of the group (GRPO), of the "
                            "batch, or by none (Dr. GRPO)", choices=("group", "batch", "none"))
    advantages: str = hp("group", "what a reward is compared with: group, the mean of the group, "
                         "divided as above (GRPO); rloo, the mean of the other answers (RLOO)",
                         choices=("group", "rloo"))
    loss_norm: str = hp("sequence", "sequence: mean over each answer, then over answers (GRPO); "
                        "token: over all tokens (DAPO); constant: ÷ B·max_new_tokens",
                        choices=("sequence", "token", "constant"))
    kl: str = hp("k3", "form of the KL term (kl_estimate); reward: subtract it from rewards",
                 choices=("k1", "k2", "k3", "k3-ratio", "reward"))
    kl_coef: float = hp(0.2, "β, weight of the KL. 0: over-optimisation. Too high: nothing moves",
                        low=0)
    # The optimizer
    lr: float = hp(6e-4, "α, AdamW's step size. Too high: the text breaks. Too low: nothing moves. "
                   "5e-6 to 5e-5 for a model like GPT-2", low=1e-12)
    max_grad_norm: float = hp(1.0, "a longer gradient is shortened to this norm", low=1e-12)
    update_epochs: int = hp(1, "gradient steps per batch; from the second on, ratios leave 1 and "
                            "the clip acts", low=1)
    micro_batch: int = hp(32, "answers per forward pass: memory and speed, not the result", low=1)
    # For the reader
    save_every: int = hp(0, "keep the policy of every so many updates; 0: only the last", low=0)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


def leave_one_out_advantages(rewards, group_size):
    """How much better an answer is than the mean of the OTHER answers to the same prompt.

    rewards [P·G], the G answers to a prompt side by side. Returns advantages [P·G], no gradient.
    Example, G = 4: [2, 0, 1, 1] -> [1.33, −1.33, 0, 0]
    """
    grouped = rewards.detach().view(-1, group_size)                     # [P, G]
    others = grouped.sum(dim=1, keepdim=True) - grouped                 # [P, G]: sum of G − 1
    return (grouped - others / (group_size - 1)).flatten()              # [P·G]


def collect(config, accelerator, policy, reference, tokenizer, judge, prompts, generator):
    """Answers to this process's prompts, what they are worth, and how likely they were.

    judge: (reward model, its tokenizer). Returns (batch, texts). The batch holds prompt_ids and
    prompt_mask [B, T], completion_ids, completion_mask, old_logprobs and ref_logprobs [B, L],
    rewards and advantages [B].
    """
    prompt_ids, prompt_mask = prompt_tokens(tokenizer, prompts)
    prompt_ids, prompt_mask = prompt_ids.to(policy.device), prompt_mask.to(policy.device)
    completion_ids, completion_mask, old_logprobs = generate(
        policy, prompt_ids, prompt_mask, config.group_size, config.max_new_tokens,
        config.temperature, end_tokens(policy, tokenizer), generator)
    texts = answer_texts(tokenizer, completion_ids, completion_mask)
    asked = [prompt for prompt in prompts for _ in range(config.group_size)]          # B prompts
    rewards = reward_scores(*judge, asked, texts, config.reward_input).to(policy.device)    # [B]

    batch = dict(prompt_ids=prompt_ids.repeat_interleave(config.group_size, dim=0),   # [B, T]
                 prompt_mask=prompt_mask.repeat_interleave(config.group_size, dim=0),
                 completion_ids=completion_ids, completion_mask=completion_mask,
                 old_logprobs=old_logprobs, rewards=rewards)
    batch["ref_logprobs"] = batch_logprobs(reference, batch, config.temperature, config.micro_batch)
    if config.kl == "reward":         # an answer pays for its KL (batch["rewards"] stays as it is)
        kl = (batch["old_logprobs"] - batch["ref_logprobs"]).sum(dim=1)               # [B]
        rewards = rewards - config.kl_coef * kl
    if config.advantages == "rloo":   # a group is never split over processes: nothing to gather
        batch["advantages"] = leave_one_out_advantages(rewards, config.group_size)    # [B]
    else:
        # On one process this is group_advantages(rewards, …). On several, --scale-rewards batch
        # needs the rewards of all: gather them, and keep the own part
        all_advantages = group_advantages(accelerator.gather(rewards), config.group_size,
                                          config.scale_rewards)         # [processes·B]
        own = accelerator.process_index
        batch["advantages"] = all_advantages.view(-1, len(rewards))[own]              # [B]
    if config.broken:
        batch = sabotage(batch, config, policy, reference)              # BREAK
    return batch, texts
