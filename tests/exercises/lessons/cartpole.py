"""Exercises of lesson 1, REINFORCE on CartPole. If you want to solve them, do not read on: the answers stand here."""
import math

import torch
from common import Blank, Bug, Case, Extend, Measure, Predict

ONES = torch.ones(3, 2)
REWARDS = torch.tensor([[1.0, 2.0], [3.0, 0.0], [4.0, 1.0]])                 # [T = 3, N = 2]
RETURNS = torch.tensor([[5.0, 3.0, 9.0], [4.0, 1.0, 6.0], [3.0, 0.0, 2.0], [1.0, 0.0, 0.0]])      # [T = 4, N = 3]
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


# ---- rewards_to_go --------------------------------------------------------------------------------

def rewards_to_go(rewards, gamma):
    """Eq. 3 as the sum that it stands for."""
    T, N = rewards.shape
    return torch.tensor([[sum(gamma ** (k - t) * rewards[k, i].item() for k in range(t, T)) for i in range(N)] for t in range(T)])


def rewards_to_go_cases(module):
    cases = [("γ = 1, one episode", torch.ones(3, 1), 1.0), ("γ = 0.5, one episode", torch.ones(3, 1), 0.5),
             ("two episodes with different rewards", REWARDS, 1.0), ("two episodes, γ = 0.9", REWARDS, 0.9)]
    return [Case(words, (rewards, gamma), rewards_to_go(rewards, gamma)) for words, rewards, gamma in cases]


REWARDS_TO_GO = Blank(
    name="rewards_to_go", minutes=10,
    asks="""Reward-to-go of every step of every episode (Eq. 3).

    rewards [T, N]: T time steps of N episodes, 0 after an episode's end; gamma: the discount, in (0, 1].
    Returns [T, N].""",
    hint="Eq. 3 needs G of the next step. So begin at the last step and go backwards. After the last step nothing follows: G = 0.",
    cases=rewards_to_go_cases,
    wrong={"you sum the rewards up to step t. Which rewards can the action of step t still change?":
               lambda rewards, gamma: torch.stack([sum(gamma ** (t - k) * rewards[k] for k in range(t + 1)) for t in range(len(rewards))]),
           "every step gets the return of the whole episode. What was earned before step t does not belong to it.":
               lambda rewards, gamma: rewards_to_go(rewards, gamma)[:1].expand_as(rewards),
           "γ is missing.": lambda rewards, gamma: rewards_to_go(rewards, 1.0),
           "you discount from the beginning of the episode. In G_t the reward of step t itself has weight 1.":
               lambda rewards, gamma: torch.stack([sum(gamma ** k * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]),
           "the reward of step t itself is missing (off by one).": lambda rewards, gamma: rewards_to_go(rewards, gamma) - rewards})


# ---- leave_one_out_baseline -------------------------------------------------------------------------

def baseline(returns, mask, with_itself=False, with_ended=False, divisor=None):
    """Eq. 4 with loops; the options are typical mistakes."""
    T, N = returns.shape
    result = torch.zeros(T, N)
    for t in range(T):
        for i in range(N):
            others = [returns[t, j].item() * mask[t, j].item() for j in range(N)
                      if (j != i or with_itself) and (mask[t, j] or with_ended)]
            if mask[t, i] and others:
                result[t, i] = sum(others) / (divisor(t, len(others)) if divisor else len(others))
    return result


LEAVE_ONE_OUT = Blank(
    name="leave_one_out_baseline", minutes=10,
    asks="""The baseline of every step of every episode (Eq. 4).

    returns [T, N]: reward-to-go; mask [T, N]: 1 while an episode lasts, 0 after its end.
    Returns [T, N]: 0 where an episode is over, and where no other episode is alive at that step.""",
    hint="Sum over the episodes (dim=1), then subtract the own value. How many episodes are left in the mean? It must work without a division by 0.",
    cases=lambda module: [
        Case("all episodes last to the end", (RETURNS, torch.ones(4, 3)), baseline(RETURNS, torch.ones(4, 3))),
        Case("episodes of different length; at the last step one is alone", (RETURNS * MASK, MASK), baseline(RETURNS, MASK)),
        Case("the returns after an episode's end are not 0", (RETURNS + 7, MASK), baseline(RETURNS + 7, MASK))],
    wrong={"the episode itself is in its own mean. Eq. 4 says: the OTHER episodes.":
               lambda returns, mask: baseline(returns, mask, with_itself=True),
           "episodes that are over still count as alive. Use the mask in the number of episodes too.":
               lambda returns, mask: baseline(returns, mask, with_ended=True),
           "the mask is missing everywhere. After its end an episode is in no mean, and has no baseline.":
               lambda returns, mask: (returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1),
           "the mask is missing in the sum: what stands in `returns` after an episode's end is added.":
               lambda returns, mask: (returns.sum(1, keepdim=True) - returns) / (mask.sum(1, keepdim=True) - 1).clamp(min=1) * mask,
           "the baseline is not 0 where an episode is over.":
               lambda returns, mask: ((returns * mask).sum(1, keepdim=True) - returns * mask) / (mask.sum(1, keepdim=True) - 1).clamp(min=1),
           "it divides by 0 where an episode is alone.":
               lambda returns, mask: ((returns * mask).sum(1, keepdim=True) - returns * mask) / (mask.sum(1, keepdim=True) - 1) * mask,
           "you divide the sum over the others by the number of all that are alive, the episode itself included.":
               lambda returns, mask: baseline(returns, mask, divisor=lambda t, others: others + 1),
           "you average over time (dim=0) instead of over episodes (dim=1).":
               lambda returns, mask: ((returns * mask).sum(0, keepdim=True) - returns * mask) / (mask.sum(0, keepdim=True) - 1).clamp(min=1) * mask})


# ---- policy_gradient_loss ----------------------------------------------------------------------------

LOGPROBS = torch.tensor([[-0.7, -0.2], [-0.4, -0.9], [-1.2, -0.3]])
ADVANTAGES = torch.tensor([[2.0, -1.0], [1.0, 3.0], [-2.0, 0.5]])
TWO_MASK = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])


def loss(logprobs, advantages, mask):
    T, N = logprobs.shape
    total = sum(logprobs[t, i] * advantages[t, i] for t in range(T) for i in range(N) if mask[t, i])
    return -total / N


def loss_and_gradient(function, logprobs, advantages, mask):
    """The loss, and its derivative by each log-probability."""
    logprobs = logprobs.clone().requires_grad_()
    value = function(logprobs, advantages, mask)
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return value, "no gradient comes back from the loss"
    value.backward()
    return value, logprobs.grad


LOSS = Blank(
    name="policy_gradient_loss", minutes=10,
    asks="""The loss whose gradient is minus the policy gradient (Eq. 5); a scalar with a gradient.

    logprobs [T, N]: log-probabilities of the actions taken, with gradient;
    advantages [T, N]: constants; mask [T, N]: 1 while an episode lasts, 0 after its end.""",
    hint="Translate Eq. 5 from left to right. The number in front of the sums is the number of episodes, not of steps.",
    cases=lambda module: [Case(words, (LOGPROBS, ADVANTAGES, mask), loss_and_gradient(loss, LOGPROBS, ADVANTAGES, mask), look=loss_and_gradient)
                          for words, mask in (("no episode ends early", ONES), ("episodes of different length", TWO_MASK))],
    wrong={"the sign is wrong. An optimizer makes the loss smaller; what happens then to an action with A > 0?":
               lambda logprobs, advantages, mask: -loss(logprobs, advantages, mask),
           "steps after an episode's end count too. Where is the mask?":
               lambda logprobs, advantages, mask: loss(logprobs, advantages, torch.ones_like(mask)),
           "you divide by the number of steps. That number is random: an action would count less in a long batch.":
               lambda logprobs, advantages, mask: loss(logprobs, advantages, mask) * mask.shape[1] / mask.sum(),
           "you average over all T·N places; Eq. 5 divides by N only.":
               lambda logprobs, advantages, mask: loss(logprobs, advantages, mask) / len(mask),
           "you divide by the number of time steps T; N is the number of columns.":
               lambda logprobs, advantages, mask: loss(logprobs, advantages, mask) * mask.shape[1] / len(mask),
           "the gradient is cut off: do not detach the log-probabilities.":
               lambda logprobs, advantages, mask: loss(logprobs.detach(), advantages, mask)})


# ---- silent bugs ----------------------------------------------------------------------------------------

def batch_of(module, N=6):
    torch.manual_seed(0)
    policy = module.make_policy(8)
    return policy, module.collect(module.make_envs(N, 3), policy, torch.Generator().manual_seed(3))


def last_step_is_missing(module):
    _, batch = batch_of(module)
    # The longest episode is alive in each row of the batch, the last one included
    return "" if batch["mask"][-1].any() else "in the last row of the batch no episode is alive: who was it played for?"


def gradients_pile_up(module):
    policy, batch = batch_of(module)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)                   # the weights stay, so the gradient must stay
    norms = [module.update(policy, optimizer, batch, module.Config())["grad_norm"] for _ in range(2)]
    return "" if math.isclose(*norms, rel_tol=1e-4) else f"two updates with the same weights and batch have the gradients {norms[0]:.2f} and {norms[1]:.2f}."


def observations_do_not_fit(module):
    _, batch = batch_of(module)
    # A push to the right makes the cart faster; the velocity is the second number of an observation
    faster = batch["obs"][1:, :, 1] - batch["obs"][:-1, :, 1]
    goes_on = batch["mask"][1:].bool()
    pushes = batch["actions"][:-1] * 2 - 1
    agree = (faster.sign() == pushes)[goes_on].float().mean().item()
    return "" if agree > 0.999 else f"in {100 * agree:.0f} % of the steps the cart's velocity changes in the direction of the push; it must be 100 %."


BUGS = [
    Bug(number=1, minutes=15,
        symptom="""The pole stands like a rock, but training is never satisfied: the return stays at 499 and the run goes on. Compare
also the first line of both tables:

  python runs/exercises/cartpole/bug_1.py --updates 60
  python cartpole_reinforce/train_cartpole.py --updates 60""",
        hint="The first line says 18.5 instead of 19.5, the best possible episode 499 instead of 500. Which step is missing in the return of an episode?",
        old="""            mask_buffer[t] = alive
            obs, rewards, terminated, truncated, _ = envs.step(actions)
            rewards_buffer[t] = rewards
            # The pole fell (terminated) or time ran out (truncated). Our objective is the return
            # within 500 steps, so both end the sum. Lesson 3 estimates what would come after a
            # time limit, and must tell the two apart.
            alive &= ~(terminated | truncated)
""",
        new="""            obs, rewards, terminated, truncated, _ = envs.step(actions)
            rewards_buffer[t] = rewards
            # The pole fell (terminated) or time ran out (truncated). Our objective is the return
            # within 500 steps, so both end the sum. Lesson 3 estimates what would come after a
            # time limit, and must tell the two apart.
            alive &= ~(terminated | truncated)
            mask_buffer[t] = alive
""",
        reveal="The mask is written after the step instead of before it, so the last step of each episode counts as over: off by one.",
        notices=last_step_is_missing),
    Bug(number=2, minutes=15,
        symptom="""The default seed never solves the task: the return rises late, then falls to about 25 and stays there (seeds 0 and 2
still get through, later than they should). The column `gradient` does not come down again. Compare:

  python runs/exercises/cartpole/bug_2.py --updates 100
  python cartpole_reinforce/train_cartpole.py --updates 100""",
        hint="Follow a gradient from `backward` to the optimizer. What else is in it when the second batch arrives?",
        old="    optimizer.zero_grad()\n    loss.backward()", new="    loss.backward()",
        reveal="Without `zero_grad`, PyTorch adds each gradient to those of all earlier batches.",
        notices=gradients_pile_up),
    Bug(number=3, minutes=20,
        symptom="""No error, and the table looks as usual, but the task is solved late: after 400, 496 and 640 episodes with seeds 0, 1
and 2 instead of 352, 304 and 304. Compare:

  python runs/exercises/cartpole/bug_3.py --seed 0
  python cartpole_reinforce/train_cartpole.py --seed 0""",
        hint="In CartPole a push to the right makes the cart faster at once. Take one episode out of `collect` and look whether that is so in the batch.",
        old="""            obs_buffer[t] = obs
            actions_buffer[t] = actions
            mask_buffer[t] = alive
            obs, rewards, terminated, truncated, _ = envs.step(actions)
""",
        new="""            actions_buffer[t] = actions
            mask_buffer[t] = alive
            obs, rewards, terminated, truncated, _ = envs.step(actions)
            obs_buffer[t] = obs
""",
        reveal="The observation is stored after the step: each action is paired with the state that it led to, not with the state in which it was chosen.",
        notices=observations_do_not_fit)]


# ---- predict, measure, extend ---------------------------------------------------------------------------

DISCOUNT = Predict(
    name="discount", minutes=15,
    question="""With --gamma 0.5 a reward counts less than 1 % after seven steps. A falling pole takes longer than that from its cause to the end; a cart
that leaves the track takes a hundred steps and more. What will training do, compared with γ = 1 (seeds 0 to 4)?""",
    choices={"a": "It never reaches a mean return of 475: seven steps are too few.",
             "b": "It solves the task, but most seeds need several times as many episodes.",
             "c": "It solves the task in fewer episodes, because short sums have less noise."},
    command="python cartpole_reinforce/train_cartpole.py --gamma 0.5 --seed 0",
    answer="b",
    explanation="""Five of five seeds solve it, after 784, 3,232, 1,728, 400 and 2,176 episodes; with γ = 1 after 352, 304, 304, 320 and 464. Every step earns 1,
so G_t at γ = 0.5 is 2 far from the end and less in the last steps: the signal is there, but only in the last steps of an episode. STUDY.md ("What
the discount does") shows what is lost on the way: the cart leaves the track more often.""",
    hint="G_t is nearly 2 as long as the end is more than seven steps away. In which steps does it differ from that, and which pushes are chosen there?")

OWN_MEAN = Predict(
    name="own_mean", minutes=10,
    question="""Take the mean over ALL episodes that are alive at step t as the baseline, the own one included. By which factor does that multiply
the advantage G − b, when n episodes are alive? Adam divides by the size of the gradient, so a constant factor would change nothing. Does this one change something?""",
    choices={"a": "By 1: one episode more or less in a mean does not matter.",
             "b": "By (n − 1)/n, which depends on the step, so the late steps of an episode count less.",
             "c": "By n/(n − 1), which depends on the step, so the late steps of an episode count more."},
    command='python -c "import torch; G = torch.tensor([5., 3., 9.]); others = (G.sum() - G) / 2; print((G - G.mean()) / (G - others))"',
    answer="b",
    explanation="""The command prints 2/3 for n = 3. In general G − mean = (n − 1)/n · (G − mean of the others). With 16 episodes alive that is .94. The fewer are alive,
the smaller it is: .5 for two, 0 for the last one. Late steps are those of the longest episodes. A constant factor is cancelled by Adam, one that differs from step to step is not.""",
    hint="Write the mean over n as (own + (n − 1) · mean of the others)/n and subtract it from the own value.")

SPREAD = Measure(
    name="spread", minutes=10,
    question="""Train with a seed of your own, 5 or above. Bring back `std G`, the standard deviation of the rewards-to-go, from the last line of the table that
has a number there. Before you run it: in that batch nearly all episodes last 500 steps. Which numbers are the rewards-to-go, and how far do they spread?""",
    command="python cartpole_reinforce/train_cartpole.py --seed 5",
    values=(137.6, 144.225, 133.919, 142.114, 144.054),
    explanation="""The rewards-to-go of a perfect episode are 500, 499, …, 1. Their standard deviation is 500/√12 = 144.3. That is the noise that a constant baseline
would leave in every product of Eq. 5. The leave-one-out baseline compares equal steps, so `std A` falls to 0 when all episodes are perfect.""",
    hint="It is the column `std G`, not `std A`. The very last line has a dash: there the policy was judged and not updated.")


def critic_gives_one_value_per_state(module):
    critic = module.make_critic(16)
    values = critic(torch.zeros(5, 3, 4))
    assert values.shape == (5, 3), f"make_critic(16) applied to [5, 3, 4] gives the shape {list(values.shape)}, expected [5, 3]."


def critic_loss_is_right(module):
    values, returns, mask = (RETURNS / 2).requires_grad_(), RETURNS + 1, MASK
    right = sum((values[t, i] - returns[t, i]).item() ** 2 for t in range(4) for i in range(3) if mask[t, i]) / mask.sum().item()
    came = module.critic_loss(values, returns, mask)
    assert math.isclose(came.item(), right, rel_tol=1e-4), f"critic_loss gives {came.item():.4f}, expected {right:.4f}: the mean squared error of the steps under the mask."
    came.backward()
    assert values.grad is not None and values.grad.abs().sum() > 0, "No gradient reaches the values."


def optimizers_of(policy, critic, lr):
    return torch.optim.SGD(policy.parameters(), lr=0.0), torch.optim.Adam(critic.parameters(), lr=lr)


def policy_gets_the_gradient_of_eq_5(module):
    policy, batch = batch_of(module)
    critic = module.make_critic(16)
    for parameter in critic.parameters():
        torch.nn.init.zeros_(parameter)                       # V = 0: the advantage is the return itself
    terms = module.update(policy, critic, *optimizers_of(policy, critic, 0.0), batch, module.Config())
    assert math.isclose(terms["advantage_std"], terms["return_to_go_std"], rel_tol=1e-4), \
        "With a critic that says 0 everywhere, `advantage_std` must equal `return_to_go_std`."
    logprobs = torch.log_softmax(policy(batch["obs"]), -1).gather(-1, batch["actions"][..., None]).squeeze(-1)
    G = rewards_to_go(batch["rewards"] * batch["mask"], 1.0)
    right = torch.autograd.grad(loss(logprobs, G, batch["mask"]), list(policy.parameters()))
    for mine, theirs in zip(policy.parameters(), right):
        assert torch.allclose(mine.grad, theirs, rtol=1e-3, atol=1e-3), "The policy's gradient is not that of Eq. 5 with A = G − V(s)."


def critic_is_fitted_after_it_was_used(module):
    policy, batch = batch_of(module)
    critic = module.make_critic(16)
    G, mask = rewards_to_go(batch["rewards"] * batch["mask"], 1.0), batch["mask"]
    spread = (G - critic(batch["obs"]).detach())[mask.bool()].std().item()
    before = ((critic(batch["obs"]) - G).square() * mask).sum().item()
    terms = module.update(policy, critic, *optimizers_of(policy, critic, 0.02), batch, module.Config())
    assert math.isclose(terms["advantage_std"], spread, rel_tol=1e-4), \
        "The advantages are not those of the critic as it was before this batch. One that has seen the batch knows the actions' luck."
    for _ in range(20):
        module.update(policy, critic, *optimizers_of(policy, critic, 0.02), batch, module.Config())
    after = ((critic(batch["obs"]) - G).square() * mask).sum().item()
    assert after < 0.5 * before, f"After 21 updates on one batch, the critic's squared error is {after / before:.2f} of what it was; expected: below half."


def it_learns(module):
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as place:
        result = module.train(module.Config(seed=1), Path(place), torch.device("cpu"), log=lambda *words: None)
    assert result["solved"], f"Seed 1 is not solved after {result['updates']} updates."


CRITIC = Extend(
    name="critic", minutes=60,
    asks="""Replace the leave-one-out baseline by a learned value function V(s), as lessons 2 and 3 do. Write

  make_critic(hidden)                     a network: observations [T, N, 4] to values [T, N]
  critic_loss(values, returns, mask)      mean squared error over the steps under the mask
  update(policy, critic, optimizer, critic_optimizer, batch, config)
                                          A = G − V(s), V as earlier batches have left it; then
                                          several steps of the critic's optimizer on this batch

and call them in train. --break may stay as it is. Then train seeds 0 to 4, and compare the episodes with the row "as it is" of the table in section 7.
Do not expect fewer of them: the sample solution needs 304, 496, 336, 288 and 336.""",
    hint="V must not get a gradient from the policy's loss: compute it without one. G reaches 500, and a new network says about 0. So let the network's output be "
         "multiplied by 100, and take ten steps of Adam for each batch. Fitted before it is used, the critic would know how lucky the actions of this very batch were.",
    accepts={"make_critic gives one value per state": critic_gives_one_value_per_state, "critic_loss is the masked mean": critic_loss_is_right,
             "the policy gets the gradient of Eq. 5": policy_gets_the_gradient_of_eq_5, "the critic learns, after it was used": critic_is_fitted_after_it_was_used,
             "seed 1 is solved": it_learns})

EXERCISES = [REWARDS_TO_GO, LEAVE_ONE_OUT, LOSS, *BUGS, OWN_MEAN, DISCOUNT, SPREAD, CRITIC]
