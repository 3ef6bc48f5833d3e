"""Lesson 1, extend: a learned value function as the baseline. What is not here stays as it is in the trainer.

Seeds 0 to 4 need 304, 496, 336, 288 and 336 episodes; the leave-one-out baseline needs 352, 304, 304, 320 and 464. With 16 episodes
side by side there is a good baseline already. A critic needs no other episodes, and lesson 3 cannot do without one.
Scale and number of steps were chosen on these seeds. Scaled by 500 with one step per batch, seed 0 never solves the task.
"""

CRITIC_STEPS = 10


class Critic(nn.Module):
    """From observations [T, N, 4] to values [T, N]. Values reach 500, so the network says V/100."""

    def __init__(self, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, obs):
        return 100 * self.net(obs).squeeze(-1)


def make_critic(hidden):
    return Critic(hidden)


def critic_loss(values, returns, mask):
    """Mean squared error over the steps that were played."""
    return ((values - returns).square() * mask).sum() / mask.sum()


def update(policy, critic, optimizer, critic_optimizer, batch, config):
    """One gradient step on one batch of whole episodes (Eq. 2). Returns what to watch."""
    mask = batch["mask"]                                                # [T, N]
    returns = rewards_to_go(batch["rewards"] * mask, config.gamma)      # [T, N]
    with torch.no_grad():             # the policy's loss must not move V
        baseline = critic(batch["obs"])                                 # [T, N]
    advantages = (returns - baseline) * mask                            # [T, N]
    if config.broken:                                                   # only with --break
        mask, returns, advantages = sabotage(batch, config)             # BREAK
    # The policy looks at all T·N observations again, now with a gradient. It still holds the
    # weights that acted: one update per batch, then the data are thrown away (on-policy).
    logits = policy(batch["obs"])                                       # [T, N, 2]
    all_logprobs = torch.log_softmax(logits, dim=-1)                    # [T, N, 2]
    actions = batch["actions"].unsqueeze(-1)                            # [T, N, 1]
    logprobs = all_logprobs.gather(-1, actions).squeeze(-1)             # [T, N]
    loss = policy_gradient_loss(logprobs, advantages, mask)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), math.inf)     # inf: only measures
    if not torch.isfinite(grad_norm):                 # before it can touch the weights
        raise FloatingPointError("the gradient is not finite; start again with a lower --lr")
    optimizer.step()
    # Only now the critic sees this batch. Fitted before, it would know the luck of its actions.
    for _ in range(CRITIC_STEPS):
        critic_optimizer.zero_grad()
        critic_loss(critic(batch["obs"]), returns, mask).backward()
        critic_optimizer.step()
    entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)          # [T, N]; fair coin: log 2
    alive = mask.bool()
    return dict(loss=loss.item(), entropy=entropy[alive].mean().item(), grad_norm=grad_norm.item(),
                return_to_go_std=returns[alive].std().item(),
                advantage_std=advantages[alive].std().item())


def train(config, out, device, log=print):
    """Trains until the task is solved, or for config.updates. Writes into the directory `out`.

    Returns figures for train.json. The weights kept as best.pt are those that solved the task, else
    those that played the best batch. The last ones may be worse: nothing in Eq. 5 keeps a good
    policy good, and one unlucky batch can take a large step away from it.
    """
    torch.manual_seed(config.seed)
    policy = make_policy(config.hidden).to(device)
    critic = make_critic(config.hidden).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.lr)
    envs = make_envs(config.batch_episodes, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    # All that save_run needs, also after Ctrl-C. rows: for metrics.csv; clock: for timing.csv
    state = dict(update=0, env_steps=0, checks=0, solved=False, best_return=-math.inf, best=None,
                 rows=[], clock=[])
    log(HEADINGS)
    try:
        while state["update"] < config.updates and not state["solved"]:
            number = state["update"] + 1
            start = time.perf_counter()
            batch = collect(envs, policy, generator)
            row = describe(batch)
            if row["return_mean"] > state["best_return"]:
                state["best_return"] = row["return_mean"]
                state["best"] = copy_of_weights(policy)

            check_start = time.perf_counter()
            if row["return_mean"] >= SAMPLED_TARGET:
                # N episodes may be lucky: fresh ones decide. They need a new seed each time
                state["checks"] += 1
                seed = 1_000_000 + 1_000 * config.seed + number
                state["solved"] = is_solved(evaluate(policy, config.eval_episodes, seed))
            check_seconds = time.perf_counter() - check_start

            terms = {}
            if state["solved"]:
                state["best"] = copy_of_weights(policy)                 # those that were judged
            else:
                terms = update(policy, critic, optimizer, critic_optimizer, batch, config)
            seconds = time.perf_counter() - start - check_seconds
            state["update"] = number
            state["env_steps"] += batch["mask"].numel()     # masked steps were played too
            state["rows"].append(dict(update=number, episodes=number * config.batch_episodes,
                                      env_steps=state["env_steps"]) | row | terms)
            state["clock"].append(dict(update=number, seconds=seconds, check_seconds=check_seconds))
            log(table_line(state["rows"][-1] | state["clock"][-1]))
    finally:                          # after Ctrl-C or an error too: the best weights so far stay
        save_run(out, policy, state)
    return dict(solved=state["solved"], updates=state["update"], env_steps=state["env_steps"],
                checks=state["checks"], episodes=state["update"] * config.batch_episodes,
                train_seconds=sum(row["seconds"] for row in state["clock"]))
