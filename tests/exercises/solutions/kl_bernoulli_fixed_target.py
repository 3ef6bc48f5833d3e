"""Lesson 7, extend: any fixed target for p as another method. What is not here stays as it is in the trainer.

`--method fixed_target --target τ --updates 30 --batch-size 256`, all 500 test problems at the end (base: greedy 44.6 %, T = 1 33.8 %, entropy .224):
τ = 1, seeds 0, 1, 2: greedy 57.6, 58.0, 56.2 %; T = 1 48.2, 48.4, 47.5 %; entropy .081, .083, .081. Dr. GRPO: 58.0, 55.4, 57.6 %; 47.9, 47.0, 46.1 %; .086.
τ = .9, seed 0: greedy 3.6 %, T = 1 1.8 %, entropy .539. Most tokens of right answers have p > .9, and this loss pushes them down.
"""

METHODS = ("kl_batch", "kl_correct", "fixed_half", "fixed_target", "dr_grpo")


@dataclass
class Config:
    # What is trained, and on what
    seed: int = hp(1, "same seed, same run on one CPU", low=0, high=2**31 - 1)
    model: str = hp("", "model to train: path or hub name (default: weights/base)")
    data: str = hp("", "directory with train.jsonl and test.jsonl (default: data)")
    instruction: str = hp("", "put after each question (for gsm8k, one that asks for ####)")
    # The method
    # kl_batch: the sum over correct answers, divided by all; kl_correct: by the correct ones
    method: str = hp("dr_grpo", "kl_batch §3.1, kl_correct §3.2, fixed_half §3.3, fixed_target",
                     choices=METHODS)
    half_tokens: str = hp("confident", "fixed_half on: confident, tokens with p > ½ (the thesis's "
                          "code); all (its formula)", choices=("confident", "all"))
    target: float = hp(0.9, "τ of fixed_target. 1: log-likelihood. Low: sure tokens become unsure",
                       low=0, high=1)
    detach_max: bool = hp(False, "kl_*: no gradient through P, that of the likeliest token")
    ent_coef: float = hp(0.0, "c in loss − c·H. Negative: entropy is punished (the thesis: −0.1)",
                         low=-100, high=100)
    # Sampling
    updates: int = hp(100, "batches of answers. Too many: entropy is gone, nothing moves", low=1)
    batch_size: int = hp(512, "B, answers per update. Too low: noisy. Too high: slow", low=1)
    group_size: int = hp(4, "G, answers per problem; default 1 if the method is not dr_grpo", low=1)
    max_new_tokens: int = hp(40, "L_max, tokens after which an answer is cut off", low=1)
    temperature: float = hp(1.0, "logits are divided by it, in sampling and in training", low=1e-12)
    sampling_batch: int = hp(512, "answers sampled at a time: memory for keys and values", low=1)
    # The optimizer
    lr: float = hp(1e-4, "α, AdamW's step size. Too high: accuracy falls. 4 B: 1e-6", low=1e-12)
    weight_decay: float = hp(0.01, "AdamW's pull towards 0, as in the thesis", low=0)
    max_grad_norm: float = hp(1.0, "a longer gradient is shortened to this norm", low=1e-12)
    micro_batch: int = hp(64, "answers per forward pass: memory and speed, not the result", low=1)
    token_chunk: int = hp(4096, "tokens whose logits are held at a time: memory and speed", low=1)
    gradient_checkpointing: bool = hp(False, "less memory, more time")
    # For the reader
    eval_every: int = hp(5, "updates between two greedy tests, each with a checkpoint", low=1)
    eval_problems: int = hp(200, "problems of a greedy test; the eval script takes all", low=1)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


def target_loss(logp, log1mp, target):
    """KL of a coin with the fixed probability τ and the coin p, per token [n]; 0 at p = τ.

    Its gradient by the token's logit is p − τ. τ = ½: Eq. 3 for all tokens; τ = 1: −log p.
    """
    # τ·log τ + (1 − τ)·log(1 − τ): a constant. 0·log 0 counts as 0
    constant = sum(share * math.log(share) for share in (target, 1 - target) if share > 0)
    return constant - target * logp - (1 - target) * log1mp


def token_losses(config, terms):
    """The loss of each token [n], before weights and without the entropy."""
    if config.method == "dr_grpo":
        return -terms.logp                            # Eq. 5  the advantage is in the weight
    if config.method == "fixed_half":
        return half_loss(terms.logp, terms.log1mp, config.half_tokens)
    if config.method == "fixed_target":               # sequence_weights: those of Eq. 4, N = correct
        return target_loss(terms.logp, terms.log1mp, config.target)
    return kl_loss(terms.logp, terms.log1mp, terms.logP, terms.log1mP, config.detach_max)
