"""Actor-critic self-play on Tic-Tac-Toe: learn against your own past, then prove you never lose.

    python train_tictactoe.py           about three minutes; expect 0 losing lines (no play beats
                                        it) and, in all 4,520 positions, no move that is
                                        worse than minimax would make
    python train_tictactoe.py --help    every hyperparameter, with the symptom of a wrong value

The algorithm
    repeat
        sample an opponent from the pool of frozen earlier selves           choose
        play 1,024 games against it from random positions; the learner      play_games
            moves first in half of them; one in ten of the opponent's moves is random; the outcome
            z of a game goes to all its moves                            Eq. 2
        one Adam step on actor loss + critic loss − entropy bonus        Eq. 6     update
        every 50 updates: play out every game that can happen            Eq. 7     prove
        every 100 updates: add a frozen copy of the actor to the pool

The equations (README.md derives them)
    Eq. 1   π(a|s) = softmax of the logits of the legal moves     an illegal move: exactly 0
    Eq. 2   z_t = outcome for the learner: +1 won, 0 drawn, −1 lost     the return at γ = 1
    Eq. 3   A_t = z_t − V(s_t)                         better or worse than V(s_t) expected
    Eq. 4   L_actor = −mean log π(a_t|s_t)·A_t         A is data: no gradient into the critic here
    Eq. 5   L_critic = ½·mean (V(s_t) − z_t)²
    Eq. 6   L = L_actor + c_v·L_critic − c_e·mean entropy
    Eq. 7   v(s) = max over legal a of −v(s after a)   minimax: what is good for the next mover is
            v(s) = −1 if the last mover has three in a row,   bad for me
                    0 if the board is full

The actor is the policy. The critic, V, is a second network that guesses z from the board. It is the
baseline of lesson 1, now learnt for each board. On-policy: an update uses only moves that the
current actor itself has sampled, since Eq. 4 holds for these alone. The greedy agent plays its most
probable move. A losing line is a game that it loses. A position is reachable if it can occur while
it plays. An error is a move that is worse than minimax would make.

New since lesson 1 (CartPole): an environment of our own; a critic; two players; masked actions; a
proof instead of a win rate. Deliberately left out: search (looking ahead), replay (using old games
again), bootstrapping (the critic's guess in place of the rest of the game: nine moves are few),
--resume (a run takes three minutes).

Sources: Williams 1992; Sutton and Barto, Reinforcement Learning, 2nd ed., 5.3 (exploring starts)
and 13.4. The book calls this algorithm REINFORCE with a learnt baseline; its "actor-critic" also
bootstraps, as the next lesson does.
Shapes: B games; M decisions of the learner; n boards; 9 squares, numbered 0-8 row by row.
Every board is shown from the mover's side: +1 the mover's stones, −1 the other's, 0 empty.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2",
#                 "tqdm==4.70.1"]
# ///
import argparse
import copy
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from filelock import FileLock
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
BREAKS = ("latest-opponent-only", "no-exploring-opponent", "one-side-only", "off-policy-symmetry")


def hp(default, help, **rule):
    """A hyperparameter: default, text of --help, and range (low, high) or choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    seed: int = hp(1, "same seed, same run", low=0, high=2**31 - 1)
    updates: int = hp(4000, "gradient steps. Too low: errors are left", low=1)
    games: int = hp(1024, "B, games per update. Too low: errors are left in rare positions",
                    low=2, high=1_000_000)
    lr: float = hp(3e-3, "α, Adam's step size, falls to 0 during the run. Too low: errors are left",
                   low=1e-12)
    ent_coef: float = hp(0.2, "c_e, entropy bonus, falls to 0 during the run. Too low: a few "
                         "errors are left in rare positions", low=0)
    vf_coef: float = hp(0.5, "c_v, weight of the critic's loss. Adam ignores a constant factor; "
                        "it only shares out max_grad_norm between actor and critic", low=0)
    max_grad_norm: float = hp(0.5, "gradient norm above which the step is shortened", low=1e-12)
    opponent_random: float = hp(0.1, "share of the opponent's moves that are random. 0: no damage "
                                "here. 1: losing lines are left", low=0, high=1)
    exploring_starts: float = hp(1.0, "share of games that start from a random position, with any "
                                 "number of stones. 0: errors are left in rare positions",
                                 low=0, high=1)
    views: int = hp(8, "how many of the 8 rotations and reflections of a board the players see. "
                    "1: no damage here", low=1, high=8)
    pool: int = hp(20, "frozen earlier selves kept as opponents, the newest ones. 1: no damage "
                   "here", low=1)
    hidden: int = hp(256, "units in each of the two hidden layers. Too low: errors are left in "
                     "rare positions", low=1, high=65536)
    pool_every: int = hp(100, "updates between additions to the pool", low=1)
    eval_every: int = hp(50, "updates between proofs", low=1)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


# ---- the game, one at a time ------------------------------------------------------------------

LINES = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8],      # rows            0 1 2
                      [0, 3, 6], [1, 4, 7], [2, 5, 8],      # columns         3 4 5
                      [0, 4, 8], [2, 4, 6]])                # diagonals       6 7 8


class TicTacToeEnv(gym.Env):
    """Tic-Tac-Toe as a Gymnasium environment. One step is one ply, the move of one player.

    It shows what an environment is. Training does not use it: play_games has the same rules for
    thousands of games at once, and minimax has them once more for its tuples. Tests compare all.

    Observation: [3, 3] int8 from the side of the player to move. Action: square 0-8. Reward, for
    the player who has just moved: +1 for completing a line, −1 for an illegal move (which ends the
    game), else 0. info["action_mask"]: [9] int8, 1 where legal.
    """
    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}

    def __init__(self, render_mode=None):
        self.observation_space = gym.spaces.Box(-1, 1, (3, 3), np.int8)
        self.action_space = gym.spaces.Discrete(9)
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.board = np.zeros(9, np.int8)             # always from the mover's side
        self.plies = 0
        return self.seen()

    def step(self, action):
        assert self.action_space.contains(int(action)), f"squares are 0-8; there is none {action}"
        if self.board[action] != 0:                   # illegal: the game is lost, the board stays
            obs, info = self.seen()
            return obs, -1.0, True, False, info
        self.board[action] = 1
        won = has_line(torch.from_numpy(self.board)[None]).item()
        full = bool((self.board != 0).all())
        self.board = -self.board                      # the other player's turn, and their view
        self.plies += 1
        obs, info = self.seen()
        return obs, float(won), won or full, False, info

    def seen(self):
        """(observation, info) for the player to move."""
        legal = (self.board == 0).astype(np.int8)
        return self.board.reshape(3, 3).copy(), {"action_mask": legal}

    def render(self):
        marks = self.board if self.plies % 2 == 0 else -self.board    # +1: the first player's X
        return drawing(marks, self.render_mode)


def has_line(boards):
    """Whether the +1 stones fill a line. boards [n, 9] -> [n] bool."""
    stones = boards[:, LINES].sum(dim=-1)                               # [n, 8] per line
    return (stones == 3).any(dim=-1)                                    # [n]


def outcome_if_over(board):
    """−1 if the player who moved last has a line (the mover has lost), 0 if the board is full, None
    if the game goes on. board: tuple of 9 from the mover's side."""
    if any(board[a] + board[b] + board[c] == -3 for a, b, c in LINES.tolist()):
        return -1
    return 0 if all(board) else None


def legal_squares(board):
    return [square for square in range(9) if board[square] == 0]


def after(board, square):
    """The board after the mover has taken a square, seen by the next mover. Tuples of 9."""
    moved = board[:square] + (1,) + board[square + 1:]
    return tuple(-mark for mark in moved)


# ---- the networks -----------------------------------------------------------------------------

def make_agent(hidden):
    """Two networks on 18 inputs [n, 18]: "actor" -> logits [n, 9], "critic" -> value [n, 1]."""
    def network(outputs):
        return nn.Sequential(nn.Linear(18, hidden), nn.ReLU(),
                             nn.Linear(hidden, hidden), nn.ReLU(),
                             nn.Linear(hidden, outputs))
    return nn.ModuleDict(dict(actor=network(9), critic=network(1)))


def encode(boards):
    """[n, 9] of −1, 0, +1 -> [n, 18] of 0 and 1: where are my stones, where are the other's?"""
    return torch.cat([boards == 1, boards == -1], dim=-1).float()


def legal_logits(actor, boards):
    """[n, 9] logits with −inf on taken squares, so that softmax gives them exactly 0 (Eq. 1)."""
    return actor(encode(boards)).masked_fill(boards != 0, -math.inf)


# ---- the mathematics: tensors in, tensors out -------------------------------------------------

def actor_critic_loss(logits, actions, outcomes, values, vf_coef, ent_coef):
    """Actor-critic with whole-game outcomes (Eq. 3-6). Returns (loss, what to watch).

    logits [M, 9], −inf where illegal, with gradient; actions [M]; outcomes z [M] in {−1, 0, +1};
    values [M] with gradient. All means are over the M decisions.
    Example: two legal moves of probability ½, one row, z = 1, V = 0: L_actor = log 2, and descent
    raises the logit of the chosen move by ½ per unit of step size.
    """
    all_logprobs = torch.log_softmax(logits, dim=-1)                    # [M, 9]
    logprobs = all_logprobs.gather(1, actions[:, None]).squeeze(1)      # [M]
    # Eq. 3  V detached: else the critic could lower the actor's loss by wrong guesses
    advantages = outcomes - values.detach()                             # [M]
    # Eq. 4  minus sign because the optimizer descends
    actor_loss = -(logprobs * advantages).mean()
    # Eq. 5
    critic_loss = 0.5 * (values - outcomes).square().mean()
    # p·log p at p = 0 would be 0·(−inf), which is not a number: there the logarithm is set to 0
    finite = all_logprobs.masked_fill(logits == -math.inf, 0)           # [M, 9]
    entropy = -(all_logprobs.exp() * finite).sum(dim=-1).mean()         # nats
    # Eq. 6
    loss = actor_loss + vf_coef * critic_loss - ent_coef * entropy
    return loss, dict(actor_loss=actor_loss.item(), critic_loss=critic_loss.item(),
                      entropy=entropy.item())


def sample(logits, generator):
    """One action per row from softmax(logits). [n, 9] -> [n]

    As in lesson 1: argmax(logits + Gumbel noise) is a sample from softmax(logits).
    """
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()    # [n, 9]
    return (logits + noise).argmax(dim=-1)


# ---- playing thousands of games at once -------------------------------------------------------

# The eight ways to look at a board: four rotations, each also mirrored (picture in choose_moves).
# VIEWS [8, 9]: square i of view k is square VIEWS[k, i] of the board; view 0 is the board as it is.
ROTATIONS = [torch.rot90(torch.arange(9).view(3, 3), turns) for turns in range(4)]
VIEWS = torch.stack([view.reshape(9) for turned in ROTATIONS for view in (turned, turned.T)])


def play_games(actor, opponent, starts, config, generator):
    """Plays one game from each start, all side by side, ply by ply.

    starts [B, 9] int8 from the mover's side, not over. Returns what the learner decided, M times in
    all: a dictionary of boards [M, 9] and actions [M], both in the random view that it saw
    (choose_moves), games [M] (the number of the game), outcomes [M] (how that game ended for it).

        who is to move     ply 0      ply 1      ply 2
        games 0 … B/2−1    learner    opponent   learner
        games B/2 … B−1    opponent   learner    opponent

    Ply 0 is the first move after the start. A game that is over waits for the others.
    """
    B = len(starts)
    boards = starts.clone()                                             # [B, 9]
    alive = torch.ones(B, dtype=torch.bool)                             # [B]
    outcomes = torch.zeros(B)                                           # [B] for the learner
    learners_turn = torch.arange(B) < B // 2                            # [B]
    decisions = []
    while alive.any():
        # The learner moves where it is to move, and each of its decisions is kept
        mine = (alive & learners_turn).nonzero().squeeze(1)             # [n] numbers of games
        seen, actions, squares = choose_moves(actor, boards[mine], config.views, 0.0, generator)
        decisions.append(dict(boards=seen, actions=actions, games=mine))
        # The opponent moves in the other games. It blunders now and then, and it learns nothing
        theirs = (alive & ~learners_turn).nonzero().squeeze(1)          # [n] numbers of games
        _, _, replies = choose_moves(opponent, boards[theirs], config.views,
                                     config.opponent_random, generator)
        won, over = make_moves(boards, mine, squares)                   # [n], [n]
        outcomes[mine] += won.float()
        alive[mine] = ~over
        lost, over = make_moves(boards, theirs, replies)                # [n], [n]
        outcomes[theirs] -= lost.float()
        alive[theirs] = ~over
        learners_turn = ~learners_turn
    batch = {name: torch.cat([decision[name] for decision in decisions])
             for name in ("boards", "actions", "games")}                # [M, 9], [M], [M]
    # Eq. 2  the outcome belongs to every decision of its game, the early ones too
    batch["outcomes"] = outcomes[batch["games"]]                        # [M]
    return batch


@torch.no_grad()      # acting needs no gradient: update() computes log π with one
def choose_moves(actor, boards, views, blunders, generator):
    """One sampled move per board [n, 9]. Returns (seen [n, 9], actions [n], squares [n]).

    A player sees its board in a random view, decides there, and the square is mapped back. With
    VIEWS[2], for example, where X is the mover and the player decides for its action 7:

        the board     squares of    what the       its action,     the square that it takes:
                      the view      player sees    7 in its view   VIEWS[2, 7] = 3
         X O .         2 5 8         . . .          . . .           X O .
         . . .         1 4 7         O . .          O . .           X . .
         . . .         0 3 6         X . .          X X .           . . .

    The action is a sample of π(·|what the player sees), so what we store is on-policy. Over many
    games every position is practised in all views. blunders: share of uniformly random moves.
    """
    n = len(boards)
    view = VIEWS[torch.randint(views, (n,), generator=generator)]       # [n, 9]
    seen = boards.gather(1, view)                                       # [n, 9]
    logits = legal_logits(actor, seen)                                  # [n, 9]
    if blunders > 0:
        blunder = torch.rand(n, generator=generator) < blunders         # [n]
        uniform = torch.zeros(n, 9).masked_fill(seen != 0, -math.inf)   # [n, 9] any legal move
        logits = torch.where(blunder[:, None], uniform, logits)         # [n, 9]
    actions = sample(logits, generator)                                 # [n]
    squares = view.gather(1, actions[:, None]).squeeze(1)               # [n]
    return seen, actions, squares


def make_moves(boards, games, squares):
    """Makes one move in each of some games; boards [B, 9] changes in place.

    games [n] are their numbers, squares [n] the moves. Returns (won by this move, over), [n] each.
    """
    moved = boards[games].scatter(1, squares[:, None], 1)               # [n, 9]
    won = has_line(moved)                                               # [n]
    full = (moved != 0).all(dim=-1)                                     # [n]
    boards[games] = -moved            # from now on the other player's side
    return won, won | full


# ---- one update -------------------------------------------------------------------------------

def choose(config, pool, positions, generator):
    """(the opponent, where the games start [B, 9]) of one update.

    Exploring starts: the policy gradient learns only where it goes, and good players never go to
    most positions. So games start from random ones. The number of stones is chosen first, 0 to 8,
    each as often: positions with few stones are rare (334 of the 4,520 have fewer than four).
    """
    opponent = pool[torch.randint(len(pool), (1,), generator=generator).item()]
    stones = (positions != 0).sum(dim=1)                                # [4520] from 0 to 8
    weights = 1 / stones.bincount()[stones]           # [4520] each number of stones equally often
    exploring = torch.rand(config.games, generator=generator) < config.exploring_starts    # [B]
    chosen = torch.multinomial(weights, config.games, replacement=True, generator=generator)
    starts = torch.where(exploring[:, None], positions[chosen], 0)      # [B, 9] 0: the empty board
    return opponent, starts


def update(agent, optimizer, batch, config, share_left, generator):
    """One gradient step on the decisions of one batch of games. Returns what to watch.

    share_left, the share of the run that is still to come, falls from 1 to 0: large steps and much
    trying first, small and sure steps at the end.
    """
    if config.broken:                                                   # only with --break
        batch = sabotage(batch, config, generator)                      # BREAK
    optimizer.param_groups[0]["lr"] = config.lr * share_left
    boards, outcomes = batch["boards"], batch["outcomes"]
    logits = legal_logits(agent["actor"], boards)                       # [M, 9]
    values = agent["critic"](encode(boards)).squeeze(-1)                # [M]
    loss, terms = actor_critic_loss(logits, batch["actions"], outcomes, values, config.vf_coef,
                                    config.ent_coef * share_left)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
    if not torch.isfinite(grad_norm):                 # before it can touch the weights
        raise FloatingPointError("the gradient is not finite; start again with a lower --lr")
    optimizer.step()
    # The mean outcome is no measure of success: a weak opponent makes it high
    return dict(outcome=outcomes.mean().item(), moves=len(outcomes), **terms,
                grad_norm=grad_norm.item())


# ---- the proof --------------------------------------------------------------------------------

def minimax(board, values):
    """Value of a position for the mover under best play (Eq. 7). Fills the dictionary `values`."""
    if board not in values:
        value = outcome_if_over(board)
        if value is None:
            # Eq. 7  a good position for the next mover is a bad one for me: the sign changes
            value = max(-minimax(after(board, square), values) for square in legal_squares(board))
        values[board] = value
    return values[board]


def minimax_values():
    """{position: value} for all 5,478 positions that can occur."""
    values = {}
    minimax((0,) * 9, values)
    return values


def open_positions(values):
    """The 4,520 positions in which the game goes on."""
    return [board for board in values if outcome_if_over(board) is None]


@torch.no_grad()
def greedy_table(actor, values):
    """{position: the actor's most probable square} for all 4,520 positions."""
    positions = open_positions(values)
    boards = torch.tensor(positions, dtype=torch.int8)                  # [4520, 9]
    squares = legal_logits(actor, boards).argmax(dim=-1)                # [4520]
    return dict(zip(positions, squares.tolist()))


def play_out(board, my_turn, table, counts, visited):
    """Plays out every game from a board: one move for the agent, every reply for the opponent."""
    over = outcome_if_over(board)
    if over == 0:
        counts["drawn"] += 1
    elif over == -1:                                  # the player to move has lost
        counts["lost" if my_turn else "won"] += 1
    elif my_turn:
        visited.add(board)
        play_out(after(board, table[board]), False, table, counts, visited)
    else:
        for square in legal_squares(board):
            play_out(after(board, square), True, table, counts, visited)


def prove(actor, values):
    """Follows the greedy policy through every reply, as first and as second player.

    values: minimax_values(). Returns {"first": …, "second": …, "all_positions_worse_than_minimax":
    n}. Each side has the number of complete games `lost`, `drawn`, `won`, and `worse_than_minimax`:
    positions that can occur while it plays its own moves, and in which its move is a mistake. The
    number n counts the mistakes in all 4,520 positions.
    """
    table = greedy_table(actor, values)
    worse = {board for board, square in table.items()
             if -values[after(board, square)] < values[board]}
    proof = {}
    for side in ("first", "second"):
        counts = dict(lost=0, drawn=0, won=0)
        visited = set()
        play_out((0,) * 9, side == "first", table, counts, visited)
        proof[side] = counts | dict(worse_than_minimax=len(visited & worse))
    return proof | dict(all_positions_worse_than_minimax=len(worse))


# ---- the training loop ------------------------------------------------------------------------

def train(config, out, log=print, bar=False):
    """Trains for config.updates. Writes into the directory `out`. Returns figures for train.json.

    The weights kept as best.pt are those with the best proof. A proof takes some hundredths of a
    second, as an update does.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    agent = make_agent(config.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, fused=True)
    # Minimax serves the proof and the choice of the best weights. Training uses only the list of
    # positions, for its random starts, never their values
    values = minimax_values()
    positions = torch.tensor(open_positions(values), dtype=torch.int8)  # [4520, 9]
    pool = [copy.deepcopy(agent["actor"])]
    state = dict(update=0, best=None, best_faults=None, rows=[], clock=[])
    log(HEADINGS)
    try:
        state["rows"].append(dict(update=0) | examine(agent, values, state))    # untrained
        state["clock"].append(dict(update=0, seconds=0.0, proof_seconds=0.0))
        log(table_line(state["rows"][0]))
        for number in tqdm(range(1, config.updates + 1), disable=not bar, unit="update"):
            start = time.perf_counter()
            share_left = 1 - (number - 1) / config.updates
            opponent, starts = choose(config, pool, positions, generator)
            batch = play_games(agent["actor"], opponent, starts, config, generator)
            terms = update(agent, optimizer, batch, config, share_left, generator)
            row = dict(update=number) | terms
            if number % config.pool_every == 0:
                pool.append(copy.deepcopy(agent["actor"]))
                pool = pool[-config.pool:]
            learnt = time.perf_counter()
            if number % config.eval_every == 0 or number == config.updates:
                row |= examine(agent, values, state)
            state["update"] = number
            state["rows"].append(row)
            state["clock"].append(dict(update=number, seconds=learnt - start,
                                       proof_seconds=time.perf_counter() - learnt))
            if number % 100 == 0 or number == config.updates:
                log(table_line(row | state["clock"][-1], left=config.updates - number))
    finally:                          # after Ctrl-C or an error too: the best weights so far stay
        save_run(out, agent, state)
    return describe(state)


def examine(agent, values, state):
    """Proves the agent and keeps its weights if they are the best so far. Returns figures."""
    proof = prove(agent["actor"], values)
    if state["best"] is None or faults(proof) <= state["best_faults"]:
        # The later one of equals: it has seen more games
        state["best"] = copy.deepcopy(agent.state_dict())
        state["best_faults"] = faults(proof)
    row = {f"{side}_{key}": count for side in ("first", "second")
           for key, count in proof[side].items()}
    return row | dict(all_worse=proof["all_positions_worse_than_minimax"])


def faults(proof):
    """(lost lines, errors that can occur, errors anywhere); the best weights have least, the first
    number deciding, then the second, then the third."""
    first, second = proof["first"], proof["second"]
    return (first["lost"] + second["lost"],
            first["worse_than_minimax"] + second["worse_than_minimax"],
            proof["all_positions_worse_than_minimax"])


# ==== The first reading ends here: what follows turns the algorithm into a program (files, checks,
# ==== command line). You do not need it to understand the algorithm. =============================

# ---- what --break does ------------------------------------------------------------------------

def sabotage(batch, config, generator):
    """What --break does to a batch. Two breaks change settings too (broken_config)."""
    if config.broken == "one-side-only":              # nothing is learnt from moving second
        kept = batch["games"] < config.games // 2                       # [M]
        batch = {name: values[kept] for name, values in batch.items()}
    if config.broken == "off-policy-symmetry":        # π never chose this move in this view
        view = VIEWS[torch.randint(8, batch["actions"].shape, generator=generator)]    # [M, 9]
        # Board and move are turned after the game: log π is then that of a move never sampled there
        turned = view == batch["actions"][:, None]                      # [M, 9]: where it is now
        batch = batch | dict(boards=batch["boards"].gather(1, view),
                             actions=turned.int().argmax(dim=-1))
    return batch


def broken_config(config):
    """What --break does to the settings."""
    if config.broken == "latest-opponent-only":       # yesterday's answers are forgotten
        return replace(config, pool=1)
    if config.broken == "no-exploring-opponent":      # neither blunders nor random starts
        return replace(config, opponent_random=0.0, exploring_starts=0.0)
    if config.broken == "one-side-only":              # a random start may be the second player's
        return replace(config, exploring_starts=0.0)
    if config.broken == "off-policy-symmetry":        # games are played in one view
        return replace(config, views=1)
    return config


# ---- what the console and the files show ------------------------------------------------------

# (key in the row, heading, format); a row may lack a key
COLUMNS = (("update", "update", "d"), ("outcome", "outcome", ".3f"), ("entropy", "entropy", ".3f"),
           ("critic_loss", "critic", ".3f"), ("grad_norm", "gradient", ".2f"),
           ("first_lost", "lost 1st", "d"), ("second_lost", "lost 2nd", "d"),
           ("first_worse_than_minimax", "bad 1st", "d"),
           ("second_worse_than_minimax", "bad 2nd", "d"), ("all_worse", "of 4,520", "d"),
           ("seconds", "seconds", ".3f"), ("left", "left", "s"))
HEADINGS = " ".join(f"{heading:>8}" for _, heading, _ in COLUMNS)


def table_line(row=None, left=None):
    """One line of the console's table: a row, and the time that is left."""
    if left is not None:
        row = row | dict(left=f"{left * row['seconds']:.0f} s")
    cells = [format(row[key], form) if key in row else "-" for key, _, form in COLUMNS]
    return " ".join(f"{cell:>8}" for cell in cells)


def describe(state):
    """Figures of a run: when it was perfect for the first time, and how long everything took."""
    errors = ("first_lost", "second_lost", "first_worse_than_minimax", "second_worse_than_minimax")
    perfect = [row["update"] for row in state["rows"]
               if "all_worse" in row and not any(row[key] for key in errors)]
    perfect_at = perfect[0] if perfect else None
    until = perfect_at or 0
    clock = state["clock"]
    return dict(updates=state["update"], perfect_at=perfect_at,
                perfect_seconds=sum(row["seconds"] for row in clock if row["update"] <= until),
                train_seconds=sum(row["seconds"] for row in clock),
                proof_seconds=sum(row["proof_seconds"] for row in clock))


if "TicTacToe-v0" not in gym.registry:                # for gym.make("TicTacToe-v0")
    gym.register("TicTacToe-v0", entry_point=TicTacToeEnv)


def drawing(marks, mode):
    """A board [9], +1 for X and −1 for O, as text ("ansi") or as a picture [300, 300, 3]."""
    if mode == "ansi":
        rows = marks.reshape(3, 3).tolist()
        return "\n".join(" ".join(".XO"[mark] for mark in row) for row in rows)
    if mode != "rgb_array":
        return None
    y, x = np.mgrid[-50:50, -50:50]                                     # [100, 100] of one square
    border = (abs(x) > 48) | (abs(y) > 48)
    cross = (abs(abs(x) - abs(y)) < 6) & (abs(x) < 32)
    circle = abs(np.hypot(x, y) - 30) < 4
    picture = np.full((300, 300, 3), 255, np.uint8)
    for square, mark in enumerate(marks.tolist()):
        row, column = divmod(square, 3)
        part = picture[100 * row:100 * row + 100, 100 * column:100 * column + 100]
        part[border] = 0
        if mark == 1:
            part[cross] = (31, 119, 180)
        if mark == -1:
            part[circle] = (214, 39, 40)
    return picture


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def write_table(path, rows):
    """Rows as CSV, six significant digits; a row may lack columns that others have."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append([f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells])
    write(path, "".join(",".join(line) + "\n" for line in lines))


def save(path, weights):
    """A dictionary of tensors as a file."""
    content = io.BytesIO()
    torch.save(weights, content)
    write(path, content.getvalue())


def save_run(out, agent, state):
    """Weights and tables of the updates that are complete."""
    if state["rows"]:
        save(out / "best.pt", state["best"])
        save(out / "last.pt", agent.state_dict())
        write_table(out / "metrics.csv", state["rows"])
        write_table(out / "timing.csv", state["clock"])


# ---- the command line -------------------------------------------------------------------------

def flag_of(f):
    return f.metadata.get("flag", "--" + f.name.replace("_", "-"))


def check(config):
    """Ends with an error where a value is of the wrong type or out of its range."""
    for f in fields(Config):
        value, rule = getattr(config, f.name), f.metadata
        if type(value) is not f.type and not (f.type is float and type(value) is int):
            fail(f"{flag_of(f)} must be of type {f.type.__name__}, not {value!r}")
        if value not in rule.get("choices", (value,)):
            fail(f"{flag_of(f)} must be one of {', '.join(map(str, rule['choices']))}, not {value}")
        low, high = rule.get("low", -10**9), rule.get("high", 10**9)
        if f.type is not str and not low <= value <= high:
            fail(f"{flag_of(f)} must be from {low:,} to {high:,}, not {value}")


def parse_args():
    """(flags of Config that were given, all other arguments)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    algorithm = parser.add_argument_group("algorithm", argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        algorithm.add_argument(flag_of(f), dest=f.name, type=f.type, help=text,
                               metavar=f.type.__name__.upper())
    parser.add_argument("--out", type=Path,
                       help="the run's directory (default: runs/<time>_seed<k>)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto",
                       help="the CPU: for so small a network a GPU only adds waiting")
    parser.add_argument("--smoke", action="store_true", help="2 tiny updates: does it run?")
    parser.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    given = {f.name: vars(args)[f.name] for f in fields(Config) if f.name in vars(args)}
    return given, args


def new_run(given, args):
    """The configuration of a new run: defaults, then --smoke, and the flags."""
    smoke = dict(updates=2, games=16, eval_every=1) if args.smoke else {}
    config = Config(**(smoke | given))
    check(config)
    return config


def open_directory(out, config):
    """Makes the run's directory with its config.json; an error if it holds results already.

    Returns a lock, which keeps other runs out until this process ends, however it ends.
    """
    found = out.exists() and {path.name for path in out.iterdir()} - {"config.json", ".in_use"}
    if found:
        fail(f"--out {out} is not empty: choose another name")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".in_use").acquire(timeout=0)
    write(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    return lock


def start_judge(out, args):
    """Starts the eval script on the run: it writes eval.json and curve.png, prints the verdict."""
    script = HERE / "tictactoe_eval.py"
    if not script.exists():
        return print(f"{script.name} is not beside this script, so nothing judges the run")
    command = [sys.executable, str(script), "--run", str(out)] + ["--quiet"] * args.quiet
    raise SystemExit(subprocess.run(command).returncode)


def interrupted(out):
    """Says after Ctrl-C what is there; exit status 130."""
    words = [sys.executable, str(HERE / "tictactoe_eval.py"), "--weights", str(out)]
    print("\ninterrupted: " + (f"judge the best weights so far with {shlex.join(words)}"
                               if (out / "best.pt").exists() else "before the first update"),
          file=sys.stderr)
    raise SystemExit(130)


def main():
    given, args = parse_args()
    config = new_run(given, args)
    torch.set_num_threads(1)          # a network this small is faster on one core than on two
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}" + "_smoke" * args.smoke
    out = args.out or HERE / "runs" / name
    # The lock is held until this process ends
    args.lock = open_directory(out, config)

    log = (lambda text: None) if args.quiet else tqdm.write
    versions = f"torch {torch.__version__}, gymnasium {gym.__version__}, numpy {np.__version__}"
    log(f"self-play · {versions} · cpu · seed {config.seed}")
    log("expect with the default settings: about three minutes, and no losing line after a third"
        + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        result = train(broken_config(config), out, log,
                       bar=sys.stderr.isatty() and not args.quiet)
    except KeyboardInterrupt:
        interrupted(out)
    about = dict(command=shlex.join(["python", Path(__file__).name, *sys.argv[1:]]),
                 seed=config.seed, versions=versions, result=result)
    write(out / "train.json", json.dumps(about, indent=1) + "\n")
    log(f"weights and tables are in {out}")
    if not args.smoke:
        start_judge(out, args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")          # a Windows pipe may not know every character
    try:
        main()
    except BrokenPipeError:                           # the reader of our output (head) is gone
        os._exit(1)
    except Exception as problem:
        # One line for what the machine refuses (a file, the disk, memory; PyTorch and safetensors
        # have their own words for it) and for a gradient that is not finite. All else is a mistake
        # of ours: its traceback is wanted
        refused = isinstance(problem, (OSError, MemoryError, UnicodeError, FloatingPointError))
        if not refused and not re.search("enforce|I/O error|of memory|Parent dir", str(problem)):
            raise
        fail(str(problem) or "out of memory")
