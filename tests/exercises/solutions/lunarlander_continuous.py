"""Lesson 3, extend: continuous actions, two numbers from a Gaussian. What is not here stays as it is in the trainer.

--updates 75, seeds 0 and 1: greedy 270 and 277, return 150 and 155, entropy 2.54 and 2.08. The same with --ent-coef 0: greedy 279
and 276, return 197 and 185, entropy 1.30 and 1.54. The bonus keeps the standard deviation large, and the entropy of a Gaussian has no
upper limit. `return` is of flights with that noise, the greedy mean is of flights without it.
"""


def make_env():
    """One lander whose action is two numbers: main engine, side engines. The environment clips both
    to [-1, 1]. No render_mode: with one, it simulates the engines' sparks too."""
    return gym.make("LunarLander-v3", continuous=True, disable_env_checker=True)


class GaussianActor(nn.Module):
    """From observations [.., 8] to the means [.., 2] of the two engines.

    log_std [2] is learned too. It is the same in every state.
    """

    def __init__(self, hidden):
        super().__init__()
        self.net = make_network(hidden, 2, last_gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(2))     # std 1: the first flights try everything

    def forward(self, obs):
        return self.net(obs)


def make_agent(hidden):
    """Two networks: "actor" -> the mean of the two engines, "critic" -> 1 value."""
    return nn.ModuleDict(dict(actor=GaussianActor(hidden),
                              critic=make_network(hidden, 1, last_gain=1.0)))


def collect(envs, obs, actor, num_steps, generator):
    """Flies T = num_steps steps with each of N landers, from the observations obs [N, 8] on.

    As before, but actions is [T, N, 2]. It holds the actions as they were sampled. Only the
    environment clips them: log π of a clipped action would be that of another action.
    """
    N = envs.num_envs
    obs_buffer = np.zeros((num_steps, N, 8), np.float32)
    next_obs_buffer = np.zeros((num_steps, N, 8), np.float32)
    actions_buffer = np.zeros((num_steps, N, 2), np.float32)
    rewards_buffer = np.zeros((num_steps, N), np.float32)
    terminated_buffer = np.zeros((num_steps, N), np.float32)
    truncated_buffer = np.zeros((num_steps, N), np.float32)
    device = next(actor.parameters()).device
    noise = torch.randn(num_steps, N, 2, generator=generator).to(device)        # [T, N, 2]
    for t in range(num_steps):
        with torch.inference_mode():  # no gradient here: update() computes log π again, with one
            mean = actor(torch.from_numpy(obs).to(device))              # [N, 2]
            actions = (mean + actor.log_std.exp() * noise[t]).cpu().numpy()     # [N, 2]
        obs_buffer[t] = obs
        actions_buffer[t] = actions
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        rewards_buffer[t] = rewards
        terminated_buffer[t] = terminated         # crashed, flew off, or came to rest
        truncated_buffer[t] = truncated           # 1,000 steps are over
        next_obs_buffer[t] = obs
        for i in np.flatnonzero(terminated | truncated):
            next_obs_buffer[t, i] = infos["final_obs"][i]
    buffers = dict(obs=obs_buffer, next_obs=next_obs_buffer, actions=actions_buffer,
                   rewards=rewards_buffer, terminated=terminated_buffer, truncated=truncated_buffer)
    return {name: torch.from_numpy(buffer).to(device) for name, buffer in buffers.items()}, obs


def fly(actor, seeds, greedy):
    """One whole flight per seed, all landers side by side. Greedy: the mean, without noise.

    Returns NumPy arrays (returns, lengths, terminated), each [len(seeds)]. A finished lander leaves
    the batch, so that no step is wasted on flights that nobody counts.
    """
    landers = [make_env() for _ in seeds]
    obs = np.stack([lander.reset(seed=int(seed))[0] for lander, seed in zip(landers, seeds)])
    returns = np.zeros(len(seeds))
    lengths = np.zeros(len(seeds), int)
    terminated = np.zeros(len(seeds), bool)
    flying = np.arange(len(seeds))                                      # numbers of the landers
    generator = torch.Generator().manual_seed(int(seeds[0]))
    device = next(actor.parameters()).device
    while len(flying):
        with torch.inference_mode():
            actions = actor(torch.from_numpy(obs[flying]).to(device)).cpu()     # [flying, 2]
            if not greedy:
                noise = torch.randn(actions.shape, generator=generator)         # [flying, 2]
                actions = actions + actor.log_std.exp().cpu() * noise
        still_flying = []
        for i, action in zip(flying, actions.numpy()):
            obs[i], reward, terminated[i], truncated, _ = landers[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            if not (terminated[i] or truncated):
                still_flying.append(i)
        flying = np.array(still_flying, int)
    return returns, lengths, terminated


def logprobs_and_entropy(actor, obs, actions):
    """log π(a|s) of the actions, and the entropy of π(·|s) in nats.

    obs [.., 8], actions [.., 2]. Returns two tensors [..]. The two engines are independent, so the
    logarithms of their densities add up. A density can exceed 1, so an entropy can be below 0.
    """
    mean, log_std = actor(obs), actor.log_std                           # [.., 2], [2]
    noise = (actions - mean) / log_std.exp()                            # [.., 2]
    log_density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)         # [.., 2]
    logprobs = log_density.sum(dim=-1)                                  # [..]
    # The entropy of a Gaussian depends on its std only, so it is the same in every state
    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()    # a scalar
    return logprobs, entropy.expand_as(logprobs)
