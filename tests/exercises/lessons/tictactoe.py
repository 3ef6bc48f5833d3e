"""Exercises of lesson 2, self-play on Tic-Tac-Toe. (Whoever solves them does not read here: the answers stand in it.)"""
import csv
import functools
import math
import random
import tempfile
from pathlib import Path

import torch
from common import Blank, Bug, Case, Extend, Measure, Predict

WINS = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]


# ---- the game once more, on tuples from the mover's side --------------------------------------------

def line_of(board, mark):
    return any(all(board[square] == mark for square in line) for line in WINS)


def result(board):
    """−1 if the last mover has a line, 0 if the board is full, None if the game goes on."""
    return -1 if line_of(board, -1) else 0 if 0 not in board else None


def free(board):
    return [square for square in range(9) if board[square] == 0]


def moved(board, square):
    return tuple(-mark for mark in (*board[:square], 1, *board[square + 1:]))


@functools.cache
def positions():
    """All positions in which the game goes on, in the order in which a search meets them."""
    found, waiting = {}, [(0,) * 9]
    while waiting:
        board = waiting.pop()
        if board not in found and result(board) is None:
            found[board] = None
            waiting += [moved(board, square) for square in free(board)]
    return list(found)


def inputs(boards):
    """What the networks see [n, 18]: own stones, then the other player's."""
    return torch.tensor([[float(mark == side) for side in (1, -1) for mark in board] for board in boards.tolist()])


# ---- legal_logits ------------------------------------------------------------------------------------

TWO_STONES = torch.tensor([[1, 0, 0, 0, -1, 0, 0, 0, 0]], dtype=torch.int8)
EXTREMES = torch.tensor([[0] * 9, [1, -1, 1, 1, -1, -1, -1, 1, 0]], dtype=torch.int8)
SEVERAL = torch.tensor([[1, 0, -1, 0, 0, 0, 0, 0, 0], [-1, 1, 0, 0, -1, 0, 1, 0, 0], [0, 0, 1, -1, 0, -1, 0, 1, 0]], dtype=torch.int8)


def an_actor(scale):
    torch.manual_seed(2)
    actor = torch.nn.Linear(18, 9)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter *= scale
    return actor


def policy(actor, boards):
    """Eq. 1 with plain numbers."""
    rows = []
    for board, logits in zip(boards.tolist(), actor(inputs(boards)).tolist()):
        highest = max(logits[square] for square in free(board))
        weights = [math.exp(logits[square] - highest) if board[square] == 0 else 0.0 for square in range(9)]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows)


def probabilities(function, actor, boards):
    return torch.softmax(function(actor, boards).double(), dim=-1)


def gradient_of_log(function, actor, boards):
    """The derivative of Σ log π(first free square) by the nine biases of the actor."""
    logprobs = torch.log_softmax(function(actor, boards), dim=-1)
    if not logprobs.requires_grad:
        return "no gradient comes back"
    chosen = sum(row[free(board)[0]] for row, board in zip(logprobs, boards.tolist()))
    return torch.autograd.grad(chosen, actor.bias)[0]


def right_gradient(actor, boards):
    """Σ over the boards of 1[k = a] − π(k)."""
    one = torch.zeros(len(boards), 9)
    for row, board in zip(one, boards.tolist()):
        row[free(board)[0]] = 1
    return (one - policy(actor, boards)).sum(0)


def softmaxed(actor, boards):
    weights = actor(inputs(boards)).exp() * (boards == 0)
    return weights / weights.sum(-1, keepdim=True)


LEGAL_LOGITS = Blank(
    name="legal_logits", minutes=10,
    asks="""The actor's logits, such that their softmax is the policy of Eq. 1.

    actor: network, from encode(boards) to 9 logits for each board, legal or not;
    boards [n, 9] from the mover's side: +1 own stone, −1 the other's, 0 free.
    Returns [n, 9] with gradient. A taken square gets the probability 0, exactly, whatever the actor says.""",
    hint="The actor does not know the rules, so its logits of the taken squares must be replaced. Which number x has exp(x) = 0? And which squares are taken: look at both players' stones.",
    cases=lambda module: [
        Case("two stones (what is compared is the softmax of your logits)", (an_actor(1), TWO_STONES), policy(an_actor(1), TWO_STONES), look=probabilities),
        Case("an empty board, and one with a single free square (again the softmax)", (an_actor(1), EXTREMES), policy(an_actor(1), EXTREMES), look=probabilities),
        Case("an actor with logits of several hundreds (again the softmax)", (an_actor(1000), SEVERAL), policy(an_actor(1000), SEVERAL), look=probabilities),
        Case("the derivative of log π(first free square), summed over the boards, by the actor's nine biases",
             (an_actor(1), SEVERAL), right_gradient(an_actor(1), SEVERAL), look=gradient_of_log)],
    wrong={"the squares with the other player's stones are still allowed.":
               lambda actor, boards: actor(inputs(boards)).masked_fill(boards == 1, -math.inf),
           "the free squares are forbidden, and the taken ones allowed.":
               lambda actor, boards: actor(inputs(boards)).masked_fill(boards == 0, -math.inf),
           "the logit of a taken square is set to 0. Which probability belongs to the logit 0?":
               lambda actor, boards: actor(inputs(boards)) * (boards == 0),
           "a taken square gets a low but ordinary logit. The other logits may be lower still.":
               lambda actor, boards: actor(inputs(boards)).masked_fill(boards != 0, -10.0),
           "you return probabilities. The softmax comes later, in the loss and in `sample`.": softmaxed,
           "the actor sees the board from the other player's side.":
               lambda actor, boards: actor(inputs(-boards)).masked_fill(boards != 0, -math.inf),
           "the probabilities are right, but the actor would learn nothing: its gradient is cut off.":
               lambda actor, boards: actor(inputs(boards)).masked_fill(boards != 0, -math.inf).detach()})


# ---- actor_critic_loss ---------------------------------------------------------------------------------

WORKED = ([[-math.inf] * 6 + [0.0, math.log(2), 0.0]], [6], [1.0], [0.2])     # the worked example of the README
FOUR = ([[0.5, -math.inf, 1.5, -0.3, 0.0, -math.inf, 0.7, -1.0, 0.2], [-math.inf, 2.0, -math.inf, -math.inf, 0.4, -0.6, -math.inf, 0.1, -math.inf],
         [0.1, 0.3, -0.2, 0.9, -0.8, 0.0, 0.6, 0.4, -0.5], [1.1] + [-math.inf] * 5 + [-0.4, -math.inf, 0.8]], [2, 5, 3, 0], [1.0, -1.0, 0.0, -1.0], [0.3, 0.6, -0.4, -0.2])
SINGLE = ([[-math.inf] * 4 + [-3.0] + [-math.inf] * 4, [-math.inf] * 7 + [0.2, 0.6]], [4, 7], [-1.0, 1.0], [0.5, -0.1])
SURE = ([[-math.inf] * 3 + [0.0, 200.0, -0.5] + [-math.inf] * 3, [0.0] * 9], [3, 8], [1.0, 0.0], [0.9, 0.0])


def tensors(logits, actions, outcomes, values):
    return torch.tensor(logits), torch.tensor(actions), torch.tensor(outcomes), torch.tensor(values)


def loss_by_hand(logits, actions, outcomes, values, c_v, c_e):
    """Eq. 3-6 and their derivatives with plain numbers."""
    M = len(actions)
    actor = critic = entropy = 0.0
    by_logits, by_values = torch.zeros(M, 9), torch.zeros(M)
    for m in range(M):
        legal = [k for k in range(9) if logits[m][k] > -math.inf]
        highest = max(logits[m])
        log_sum = highest + math.log(sum(math.exp(logits[m][k] - highest) for k in legal))
        log_pi = {k: logits[m][k] - log_sum for k in legal}
        advantage = outcomes[m] - values[m]
        H = -sum(math.exp(log_pi[k]) * log_pi[k] for k in legal)
        actor -= log_pi[actions[m]] * advantage / M
        critic += (values[m] - outcomes[m]) ** 2 / 2 / M
        entropy += H / M
        for k in legal:
            pi = math.exp(log_pi[k])
            by_logits[m, k] = (-advantage * ((k == actions[m]) - pi) + c_e * pi * (log_pi[k] + H)) / M
        by_values[m] = c_v * (values[m] - outcomes[m]) / M
    return {"loss": actor + c_v * critic - c_e * entropy, "terms": dict(actor_loss=actor, critic_loss=critic, entropy=entropy),
            "gradient by the logits": by_logits, "gradient by the values": by_values}


def loss_and_gradients(function, logits, actions, outcomes, values, c_v, c_e):
    logits, values = logits.requires_grad_(), values.requires_grad_()
    loss, terms = function(logits, actions, outcomes, values, c_v, c_e)
    gradients = ["no gradient comes back"] * 2
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, (logits, values), allow_unused=True, materialize_grads=True)
    return {"loss": loss, "terms": terms, "gradient by the logits": gradients[0], "gradient by the values": gradients[1]}


def loss_with_mistake(mistake):
    """The loss in tensors, with one mistake."""
    def function(logits, actions, outcomes, values, c_v, c_e):
        every = logits if mistake == "logits" else torch.log_softmax(logits, -1)
        logprobs = every.gather(1, actions[:, None])[:, 0]
        baseline = values if mistake == "gradient into V" else 0 if mistake == "no V" else values.detach()
        mean = torch.sum if mistake == "sum" else torch.mean
        actor = mean(logprobs * (outcomes - baseline)) * (1 if mistake == "sign" else -1)
        critic = mean((values - outcomes) ** 2) * (1 if mistake == "half" else 0.5)
        pi, finite = every.softmax(-1), every.masked_fill(logits == -math.inf, 0)
        parts = pi * (every if mistake == "nan" else finite)
        if mistake == "nan gradient":
            parts = torch.where(pi > 0, pi * every, torch.zeros(()))
        H = -(parts.mean(-1) if mistake == "squares" else parts.sum(-1))
        entropy = mean(H)
        if mistake == "weights":
            c_v, c_e = 1, 1
        loss = actor + c_v * critic + (c_e if mistake == "bonus" else -c_e) * entropy
        return loss, dict(actor_loss=actor.item(), critic_loss=critic.item(), entropy=entropy.item())
    return function


def loss_cases(module):
    inputs_of = (("the worked example of the README", WORKED, 0.5, 0.2), ("four decisions", FOUR, 0.7, 0.3), ("c_v = c_e = 0", FOUR, 0.0, 0.0),
                 ("a board with a single legal move", SINGLE, 0.5, 0.2), ("one move is nearly certain, another one was sampled", SURE, 0.5, 0.1))
    return [Case(words, (*tensors(*numbers), c_v, c_e), loss_by_hand(*numbers, c_v, c_e), look=loss_and_gradients) for words, numbers, c_v, c_e in inputs_of]


LOSS = Blank(
    name="actor_critic_loss", minutes=25,
    asks="""The loss of actor and critic (Eq. 3 to 6).

    logits [M, 9] with gradient, −inf where a move is illegal; actions [M]: the squares that were sampled;
    outcomes [M]: z, one of −1, 0, +1; values [M]: V(s), with gradient; vf_coef, ent_coef: c_v and c_e.
    Returns (loss, terms): a scalar with gradient, and a dictionary of three numbers, actor_loss (Eq. 4),
    critic_loss (Eq. 5) and entropy (the mean of H, in nats).""",
    hint="One line for each equation. All means are over the M decisions. Which of the factors of Eq. 4 are constants? "
         "For the entropy you need p·log p at p = 0: set the logarithm to 0 there, before you multiply.",
    cases=loss_cases,
    wrong={"the sign of the actor's loss is wrong. An optimizer makes the loss smaller; what happens then to a move with A > 0?": loss_with_mistake("sign"),
           "Eq. 4 sends a gradient into the critic. The critic learns from Eq. 5 only.": loss_with_mistake("gradient into V"),
           "the advantage is the outcome itself. What was to be expected of this board?": loss_with_mistake("no V"),
           "the factor ½ of Eq. 5 is missing.": loss_with_mistake("half"),
           "you sum over the decisions. Eq. 4 to 6 have means.": loss_with_mistake("sum"),
           "entropy makes the loss larger. Is it a bonus then?": loss_with_mistake("bonus"),
           "the entropy is a mean over the nine squares. H is a sum over them; only the decisions are averaged.": loss_with_mistake("squares"),
           "p·log p of a taken square is in the sum. There it is 0·(−∞), which is not a number.": loss_with_mistake("nan"),
           "the loss is right, but its gradient is not a number: 0·(−∞) is still computed, and replaced too late (torch.where, nan_to_num).": loss_with_mistake("nan gradient"),
           "the logits are used as if they were log-probabilities. What turns the one into the other?": loss_with_mistake("logits"),
           "c_v and c_e are missing in Eq. 6.": loss_with_mistake("weights")})


# ---- minimax ---------------------------------------------------------------------------------------------

def best(board):
    """Eq. 7 by trying everything, without a memory."""
    over = result(board)
    return over if over is not None else max(-best(moved(board, square)) for square in free(board))


def following(board):
    """The position itself and all that can follow."""
    return {board} if result(board) is not None else {board}.union(*(following(moved(board, square)) for square in free(board)))


def value_and_size(function, board, values):
    value = function(board, values)
    return {"value": value, "positions in the dictionary": len(values)}


def minimax_with_mistake(mistake):
    def search(board, values):
        if board in values and mistake != "again":
            return values[board]
        value = result(board)
        if value is None:
            replies = [search(moved(board, square), values) for square in free(board)]
            value = {"sign": max(replies), "min": min(-reply for reply in replies), "mean": -sum(replies) / len(replies),
                     "first": -replies[0]}.get(mistake, max(-reply for reply in replies))
        elif mistake == "lost":
            value = -value
        if mistake != "forgets" and (mistake != "open only" or result(board) is None):
            values[board] = value
        return value
    return search


LAST_MOVER_HAS_WON = (-1, -1, -1, 1, 1, 0, 0, 1, 0)
FULL = (1, -1, 1, 1, -1, -1, -1, 1, 1)
THREE_LEFT = (1, -1, 1, 1, -1, -1, 0, 0, 0)               # the worked example of the README
FORK = (-1, 0, -1, 0, 1, 0, 1, 0, -1)                     # two squares complete a line of the other player; one must be found by the search
FIVE_LEFT = (1, 0, 0, 0, -1, 0, -1, 0, 1)
KNOWN = {moved(THREE_LEFT, 6): 0.5, moved(THREE_LEFT, 7): 0.25, moved(THREE_LEFT, 8): 0.75}


def minimax_cases(module):
    cases = [("the other player has just completed a line", LAST_MOVER_HAS_WON), ("a full board without a line", FULL),
             ("the worked example of the README", THREE_LEFT), ("the mover cannot stop both threats", FORK), ("five free squares", FIVE_LEFT)]
    found = [Case(words, (board, {}), {"value": best(board), "positions in the dictionary": len(following(board))}, look=value_and_size)
             for words, board in cases]
    return [*found, Case("the values of the three next positions are known already (invented ones)", (THREE_LEFT, KNOWN),
                         {"value": -0.25, "positions in the dictionary": 4}, look=value_and_size)]


MINIMAX = Blank(
    name="minimax", minutes=15,
    asks="""The value of a position for the mover, if both play perfectly (Eq. 7).

    board: a tuple of 9 from the mover's side; values: a dictionary {position: value} of what is known already.
    outcome_if_over, legal_squares and after (above) know the rules.
    Returns −1, 0 or +1. Afterwards `values` also holds this position and all that can follow it.
    A position that is in `values` is not computed again: otherwise the empty board takes seconds instead of a moment.""",
    hint="The function calls itself, for every position that one move can reach. For whom is the number that it gets back? Write every result into `values` before you return it.",
    cases=minimax_cases,
    wrong={"you take the next mover's values as they are. What is good for that player is bad for you.": minimax_with_mistake("sign"),
           "the mover chooses the move that is worst for itself.": minimax_with_mistake("min"),
           "you average over the moves, as if the players chose at random.": minimax_with_mistake("mean"),
           "only the first legal move is tried.": minimax_with_mistake("first"),
           "a finished game has the wrong sign: the player to move has lost it.": minimax_with_mistake("lost"),
           "the values are right, but nothing is written into `values`.": minimax_with_mistake("forgets"),
           "finished games are missing in `values`. They are positions too.": minimax_with_mistake("open only"),
           "you compute a position again although `values` holds it.": minimax_with_mistake("again")})


# ---- make_moves --------------------------------------------------------------------------------------------

FOUR_GAMES = torch.tensor([[1, 1, 0, -1, -1, 0, 0, 0, 0], [0] * 9, [1, -1, 1, 1, -1, -1, -1, 1, 0], [1, -1, 1, -1, 1, -1, -1, 1, 0]], dtype=torch.int8)


def play_by_hand(boards, games, squares):
    """The move in each game, one after the other."""
    rows, won, over = [tuple(board) for board in boards.tolist()], [], []
    for game, square in zip(games.tolist(), squares.tolist()):
        rows[game] = moved(rows[game], square)
        won.append(line_of(rows[game], -1))
        over.append(result(rows[game]) is not None)
    return {"won": torch.tensor(won, dtype=torch.bool), "over": torch.tensor(over, dtype=torch.bool), "boards afterwards": torch.tensor(rows)}


def won_over_boards(function, boards, games, squares):
    won, over = function(boards, games, squares)
    return {"won": won, "over": over, "boards afterwards": boards}


def moves_with_mistake(mistake):
    def function(boards, games, squares):
        after = boards[games].scatter(1, squares[:, None], 1)
        full = (after != 0).all(-1)
        has = [[line_of(board, mark) for board in after.tolist()] for mark in (1, -1)]
        won = torch.tensor(has[mistake == "wrong side"], dtype=torch.bool)
        if mistake == "all turned":
            boards.neg_()
        if mistake != "copy":
            boards[games] = after if mistake == "not turned" else -after
        return won, won if mistake == "not full" else full if mistake == "only full" else won | full
    return function


MAKE_MOVES = Blank(
    name="make_moves", minutes=15,
    asks="""One move in each of some games. `boards` changes in place.

    boards [B, 9] int8, each from the side of the player who is to move in it: +1 own stone, −1 the other's, 0 free;
    games [n]: the numbers of the games in which a move is made, in any order; squares [n]: the moves, all legal.
    The games that are not named stay as they are.
    Returns (won, over), [n] bool each: whether the move completed a line, whether the game is over.
    has_line(boards) (above) says where the +1 stones fill a line.""",
    hint="Indexing with a tensor, boards[games], makes a copy; boards[games] = … writes into the tensor. There are two ways for a game to end. And from whose side must a board be seen afterwards?",
    cases=lambda module: [
        Case(words, (FOUR_GAMES, torch.tensor(games, dtype=torch.long), torch.tensor(squares, dtype=torch.long)),
             play_by_hand(FOUR_GAMES, torch.tensor(games), torch.tensor(squares)), look=won_over_boards)
        for words, games, squares in (("the first stone on an empty board", [1], [4]), ("three of four games, in another order", [2, 0, 1], [8, 2, 5]),
                                      ("the last free square completes a line", [3], [8]), ("no game at all", [], []))],
    wrong={"the next player takes the other's stones for its own. From whose side are the boards seen after the move?": moves_with_mistake("not turned"),
           "you look for a line after the board has been turned. The +1 stones are then the other player's.": moves_with_mistake("wrong side"),
           "`boards` stays as it was: the stone was put on a copy.": moves_with_mistake("copy"),
           "all boards are turned, also those in which nobody has moved.": moves_with_mistake("all turned"),
           "a full board does not end the game.": moves_with_mistake("not full"),
           "a line does not end the game.": moves_with_mistake("only full")})


# ---- silent bugs -------------------------------------------------------------------------------------------

class Fixed(torch.nn.Module):
    """A player that always takes the first possible move of a list."""

    def __init__(self, order):
        super().__init__()
        self.logits = torch.zeros(len(order))
        for rank, move in enumerate(order):
            self.logits[move] = 1000.0 * (len(order) - rank)

    def forward(self, boards):
        return self.logits.expand(len(boards), len(self.logits))


def outcomes_do_not_fit(module):
    """Plays games between two fixed players, and the same games in a plain loop."""
    rng = random.Random(0)
    learner, opponent = rng.sample(range(9), 9), rng.sample(range(9), 9)
    starts = rng.sample(positions(), 200)
    batch = module.play_games(Fixed(learner), Fixed(opponent), torch.tensor(starts, dtype=torch.int8), module.Config(opponent_random=0.0, views=1),
                              torch.Generator().manual_seed(0))
    came = {1: [], 0: [], -1: []}                             # what the learner's decisions got, by how their game really ended
    for game, outcome in zip(batch["games"].tolist(), batch["outcomes"].tolist()):
        board, mine = starts[game], game < 100
        while result(board) is None:
            board = moved(board, next(square for square in (learner if mine else opponent) if board[square] == 0))
            mine = not mine
        came[0 if result(board) == 0 else -1 if mine else 1].append(outcome)
    for z, words in ((-1, "lost"), (0, "drawn"), (1, "won")):
        mean = sum(came[z]) / len(came[z])
        if any(outcome != z for outcome in came[z]):
            return f"{len(came[z])} decisions belong to games that the learner has {words}. Their mean outcome is {mean:+.2f}; it must be {z:+d}."
    return ""


def update_differs(module):
    """One update, compared with the loss written for one decision after the other."""
    torch.manual_seed(0)
    agent, rng = module.make_agent(8), random.Random(1)
    boards = rng.sample(positions(), 40)
    actions = [rng.choice(free(board)) for board in boards]
    seen = inputs(torch.tensor(boards))
    guesses = agent["critic"](seen).flatten().tolist()
    middle = sorted(guesses)[25]
    outcomes = [1.0 if guess > middle else float(rng.choice((0, -1))) for guess in guesses]
    with torch.no_grad():                                     # a critic that knows something
        last = agent["critic"][-1]
        last.weight *= 10
        last.bias.copy_(10 * (last.bias - middle))
    batch = dict(boards=torch.tensor(boards, dtype=torch.int8), actions=torch.tensor(actions), outcomes=torch.tensor(outcomes), games=torch.arange(40))
    config = module.Config(lr=0.0, max_grad_norm=1e9, ent_coef=0.3)
    came = module.update(agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, config, 0.5, torch.Generator())
    loss = critic = 0.0
    for logits, (value,), board, action, z in zip(agent["actor"](seen), agent["critic"](seen), boards, actions, outcomes):
        log_pi = torch.log_softmax(logits[free(board)], -1)
        loss = loss - (log_pi[free(board).index(action)] * (z - value.detach()) - 0.15 * (log_pi.exp() * log_pi).sum()) / 40
        critic = critic + 0.5 * (value - z) ** 2 / 40
    if not math.isclose(came["critic_loss"], critic.item(), rel_tol=1e-4):
        return f"in one update the critic's loss is {came['critic_loss']:.3f}. ½·(V(s) − z)², computed decision by decision, has the mean {critic.item():.3f}."
    right = torch.autograd.grad(loss + config.vf_coef * critic, list(agent.parameters()))
    for (name, mine), theirs in zip(agent.named_parameters(), right):
        if not torch.allclose(mine.grad, theirs, rtol=1e-3, atol=1e-5):
            return f"the gradient of the {name.split('.')[0]} is not that of Eq. 6, computed decision by decision."
    return ""


def kept_weights_are_not_the_best(module):
    """A tiny run with large steps: it gets better and worse."""
    config = module.Config(seed=2, updates=16, games=32, hidden=16, eval_every=1, lr=0.05)
    with tempfile.TemporaryDirectory() as place:
        module.train(config, Path(place), log=lambda *words: None)
        agent = module.make_agent(config.hidden)
        agent.load_state_dict(torch.load(Path(place) / "best.pt", weights_only=True))
        with (Path(place) / "metrics.csv").open(encoding="utf-8") as file:
            lost = [int(row["first_lost"]) + int(row["second_lost"]) for row in csv.DictReader(file)]
    proof = module.prove(agent["actor"], module.minimax_values())
    found = proof["first"]["lost"] + proof["second"]["lost"]
    return "" if found == min(lost) else f"in a tiny run the best proof found {min(lost)} losing lines. The weights in best.pt have {found}."


BUGS = [
    Bug(number=1, minutes=15,
        symptom="""The column `outcome` looks much better than it should, and the agent is worse: after 300 updates it is 0.776
instead of 0.326, but 13 losing lines are left instead of 0. Compare (about half a minute each):

  python runs/exercises/tictactoe/bug_1.py --updates 300
  python tictactoe_actorcritic/train_tictactoe.py --updates 300""",
        hint="Late in training the learner meets players as good as itself. Which outcomes must then occur beside wins and draws? Look for them in a batch. Who makes the last move of such a game?",
        old="""        lost, over = make_moves(boards, theirs, replies)                # [n], [n]
        outcomes[theirs] -= lost.float()
""",
        new="""        _, over = make_moves(boards, theirs, replies)                   # [n], [n]
""",
        reveal="""A game that the opponent wins ends with the opponent's move. Its outcome was never noted, so it stayed at 0: to the learner a
loss was as good as a draw. It attacks, and does not learn to defend.""",
        notices=outcomes_do_not_fit),
    Bug(number=2, minutes=20,
        symptom="""The agent learns, but slowly, and the critic hardly learns at all. After 100 updates the column `critic` is at 0.245 instead
of 0.132, and 99 losing lines are left instead of 33. Compare (some seconds each):

  python runs/exercises/tictactoe/bug_2.py --updates 100
  python tictactoe_actorcritic/train_tictactoe.py --updates 100""",
        hint="Print the shapes of all tensors that meet in actor_critic_loss. [M, 1] minus [M] is no error in PyTorch. What is its shape?",
        old="""    logits = legal_logits(agent["actor"], boards)                       # [M, 9]
    values = agent["critic"](encode(boards)).squeeze(-1)                # [M]
""",
        new="""    logits = legal_logits(agent["actor"], boards)                       # [M, 9]
    values = agent["critic"](encode(boards))                            # [M]
""",
        reveal="""values has the shape [M, 1], outcomes [M]. PyTorch broadcasts both to [M, M]: every value is compared with every outcome.
The best that the critic can do is then one number for all boards, the mean outcome.""",
        notices=update_differs),
    Bug(number=3, minutes=20,
        symptom="""Training is the same as it should be: both commands write the same metrics.csv, number for number. But the verdict in the
last lines says 244 losing lines instead of 201. Compare (some seconds each):

  python runs/exercises/tictactoe/bug_3.py --updates 100 --games 64 --eval-every 5 --seed 2
  python tictactoe_actorcritic/train_tictactoe.py --updates 100 --games 64 --eval-every 5 --seed 2""",
        hint="In metrics.csv add first_lost and second_lost. In which update is the sum 201, and in which 244? What is in best.pt then, and when did it get there?",
        old="""        state["best"] = copy.deepcopy(agent.state_dict())
        state["best_faults"] = faults(proof)
""",
        new="""        state["best"] = agent.state_dict()
        state["best_faults"] = faults(proof)
""",
        reveal="""state_dict() returns the weights themselves, not a copy. Each later update changes what was kept as the best. In the end best.pt
holds the last weights.""",
        notices=kept_weights_are_not_the_best)]


# ---- predict, measure -----------------------------------------------------------------------------------------

RANDOM_OPPONENT = Predict(
    name="random_opponent", minutes=15,
    question="""With --opponent-random 1 the opponent's moves are all random: the learner never meets an earlier self. It plays a million games against
random moves, from positions of all kinds. What does the proof find after 600 updates (seeds 0, 1 and 2)? With the default, one random move in ten, it finds no losing line
after 600 updates.""",
    choices={"a": "No losing line either: random moves lead everywhere, so the learner meets every reply.",
             "b": "No losing line as first player, up to a few dozen as second player.",
             "c": "Hundreds of losing lines on each side: from a player without a plan there is nothing to learn."},
    command="python tictactoe_actorcritic/train_tictactoe.py --opponent-random 1 --updates 600 --seed 0",
    answer="b",
    explanation="""The best weights of seeds 0, 1 and 2 have 0 + 4, 0 + 13 and 0 + 7 losing lines (first + second player). With the default opponents they have none, also
after 600 updates. The learner did meet the replies that beat it, but seldom. A trap that a random player falls into in most games is worth more than the rare loss.
STUDY.md ("The most that can be won against a random player") computes it exactly: the player with the highest mean outcome against random moves accepts 7 losing lines as second player.
`python tictactoe_actorcritic/tictactoe_eval.py --weights latest` shows what it costs: these three agents lose 0.4, 1.8 and 1.1 % of their games as second player against the very
opponent of their training. Who only meets weak opponents learns to beat weak opponents.""",
    hint="Eq. 4 raises the mean outcome against the opponents of training. Compare two moves: a safe one, and one that wins against five of six replies and loses against the sixth.")

UNTRAINED_ENTROPY = Measure(
    name="untrained_entropy", minutes=10,
    question="""An untrained actor gives all legal moves nearly the same probability. Play 20,000 games with it, with a seed of your own (5 or above),
and bring back the `entropy` of update 1, in nats. Before you run it: n equally likely moves have the entropy log n. On the empty board that is log 9 = 2.20, on a
board with one free square 0. Where between them do you expect the mean over all decisions, and to how many equally likely moves does it belong?""",
    command="python tictactoe_actorcritic/train_tictactoe.py --updates 1 --games 20000 --seed 5",
    values=(1.260, 1.259, 1.259, 1.254, 1.265),
    explanation="""exp(1.26) = 3.5: on average the actor chooses as if between three or four moves. The games start with 0 to 8 stones, each number as often,
so many boards are nearly full. With --exploring-starts 0 all games start from the empty board, and the same command (seed 5) gives 1.594, that is 4.9 moves. At the end of
a default run the entropy is about 0.4: where several moves are equally good, the actor does not choose one of them.""",
    hint="It is the column `entropy` in the line of update 1. The logarithm is the natural one. The number of games must be 20,000.")


# ---- extend: connect four ---------------------------------------------------------------------------------------

def fours():
    """The 69 lines of the 6 × 7 board, each as a set of squares."""
    squares = {(row, column) for row in range(6) for column in range(7)}
    lines = [[(row + k * down, column + k * right) for k in range(4)] for row, column in squares for down, right in ((0, 1), (1, 0), (1, 1), (1, -1))]
    return {frozenset(7 * row + column for row, column in line) for line in lines if squares.issuperset(line)}


FOURS = fours()


def has_four(board, mark):
    return any(all(board[square] == mark for square in line) for line in FOURS)


def ending(board):
    """As result() above, for 42 squares."""
    return -1 if has_four(board, -1) else 0 if 0 not in board else None


def dropped(board, column):
    """The board after a stone has fallen into a column, seen by the next mover."""
    lowest = max(square for square in range(column, 42, 7) if board[square] == 0)
    return tuple(-mark for mark in (*board[:lowest], 1, *board[lowest + 1:]))


def open_columns(board):
    return [column for column in range(7) if board[column] == 0]


def random_game(rng):
    """The positions of one game with random moves, while it goes on."""
    board, found = (0,) * 42, []
    while ending(board) is None:
        found.append(board)
        board = dropped(board, rng.choice(open_columns(board)))
    return found


def middle_positions(seed, count):
    rng = random.Random(seed)
    return [rng.choice(random_game(rng)) for _ in range(count)]


def drawing(board):
    return "\n  ".join(["", *(" ".join(".XO"[mark] for mark in board[7 * row:7 * row + 7]) for row in range(6))])


def has_line_finds_fours(module):
    lines = [sorted(line) for line in FOURS]
    rng = random.Random(3)
    boards, right = [], []
    for line in lines:                                        # a whole line, and the same with one stone less, among other stones
        for stones in (line, rng.sample(line, 3)):
            board = [rng.choice((0, 0, -1)) for _ in range(42)]
            for square in stones:
                board[square] = 1
            boards.append(board)
            right.append(len(stones) == 4)
    for squares in ((5, 6, 7, 8), (13, 14, 15, 16), (4, 12, 20, 28), (3, 9, 15, 21), (35, 36, 37), (18, 25, 32)):    # over the edge, or too short
        boards.append([int(square in squares) for square in range(42)])
        right.append(has_four(boards[-1], 1))
    came = module.has_line(torch.tensor(boards, dtype=torch.int8)).tolist()
    for board, mine, theirs in zip(boards, came, right):
        assert mine == theirs, f"has_line says {mine}, but X has {'a' if theirs else 'no'} four here:{drawing(board)}"


def stones_fall(module):
    rng = random.Random(5)
    boards = middle_positions(5, 60)
    almost = (0, 1, -1, 1, -1, 1, -1) + (-1, 1, -1, 1, -1, 1, 1) * 2 + (1, -1, 1, -1, 1, -1, -1) * 2 + (-1, 1, -1, 1, -1, 1, 1)
    nearly = (0,) * 35 + (1, 1, 1, 0, -1, -1, -1)             # column 3 wins
    boards += [almost, nearly]
    games = rng.sample(range(62), 50)
    games = [*(game for game in games if game < 60), 61, 60]
    columns = [3 if game == 61 else rng.choice(open_columns(boards[game])) for game in games]
    tensor = torch.tensor(boards, dtype=torch.int8)
    won, over = module.make_moves(tensor, torch.tensor(games), torch.tensor(columns))
    for place, (game, column) in enumerate(zip(games, columns)):
        right, came = dropped(boards[game], column), tuple(tensor[game].tolist())
        words = f"A stone falls into column {column} of this board:{drawing(boards[game])}\n"
        assert came != tuple(-mark for mark in right), words + "Afterwards the next player must see its own stones as +1. Whose stones are +1 now?"
        assert came == right, words + f"Expected, seen by the next player:{drawing(right)}\nCame:{drawing(came)}"
        assert won[place].item() == has_four(right, -1), words + f"won is {won[place].item()}, expected {has_four(right, -1)}."
        assert over[place].item() == (ending(right) is not None), words + f"over is {over[place].item()}, expected {ending(right) is not None}."
    for game in set(range(62)) - set(games):
        assert tuple(tensor[game].tolist()) == boards[game], "A board that was not named in `games` has changed."
    won, over = module.make_moves(tensor, torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert len(won) == len(over) == 0, "Without a game, won and over must be empty."


def full_columns_are_illegal(module):
    torch.manual_seed(0)
    agent = module.make_agent(8)
    boards = torch.tensor(middle_positions(7, 200), dtype=torch.int8)
    logits = module.legal_logits(agent["actor"], boards)
    assert logits.shape == (200, 7), f"legal_logits of 200 boards has the shape {list(logits.shape)}, expected [200, 7]."
    probabilities, top = logits.softmax(-1), boards[:, :7] != 0
    assert top.any() and (probabilities[top] == 0).all(), f"A full column has the probability {probabilities[top].max():.4f}, expected 0."
    assert (probabilities[~top] > 0).all(), "A column with a free square has the probability 0."
    values = agent["critic"](module.encode(boards))
    assert values.shape == (200, 1), f"The critic's values of 200 boards have the shape {list(values.shape)}, expected [200, 1]."


def players_see_two_views(module):
    boards = middle_positions(11, 300)
    generator = torch.Generator().manual_seed(0)
    seen, actions, columns = module.choose_moves(Fixed([0, 1, 2, 3, 4, 5, 6]), torch.tensor(boards, dtype=torch.int8), 2, 0.0, generator)
    mirrored = 0
    for board, view, action, column in zip(boards, map(tuple, seen.tolist()), actions.tolist(), columns.tolist()):
        mirror = tuple(board[7 * row + 6 - k] for row in range(6) for k in range(7))
        assert view in (board, mirror), f"A player sees\n{drawing(view)}\nwhich is neither this board nor its mirror image:{drawing(board)}"
        fits = {action} if view == board else {6 - action}
        assert column in (fits if board != mirror else {action, 6 - action}), f"Action {action} in the {'board itself' if view == board else 'mirror image'} became column {column}."
        first = next(k for k in range(7) if view[k] == 0)
        assert action == first, f"The player wants the first open column that it sees, {first}, and its action is {action}."
        mirrored += view == mirror != board
    assert 75 < mirrored < 225, f"Of 300 boards {mirrored} were seen in the mirror; about half are expected."
    _, _, columns = module.choose_moves(Fixed([0, 1, 2, 3, 4, 5, 6]), torch.tensor(boards, dtype=torch.int8), 2, 1.0, generator)
    assert all(board[column] == 0 for board, column in zip(boards, columns.tolist())), "A random move goes into a full column."
    assert len(set(columns.tolist())) == 7, "Random moves never go into some of the columns."


def games_follow_the_rules(module):
    rng = random.Random(13)
    learner, opponent = rng.sample(range(7), 7), rng.sample(range(7), 7)
    starts = [(0,) * 42, *middle_positions(13, 98), (0,) * 42]
    batch = module.play_games(Fixed(learner), Fixed(opponent), torch.tensor(starts, dtype=torch.int8), module.Config(opponent_random=0.0, views=1),
                              torch.Generator().manual_seed(0))
    expected = []
    for game, board in enumerate(starts):
        mine, decisions = game < 50, []
        while ending(board) is None:
            column = next(column for column in (learner if mine else opponent) if board[column] == 0)
            decisions += [(game, board, column)] * mine
            board, mine = dropped(board, column), not mine
        z = 0 if ending(board) == 0 else -1 if mine else 1
        expected += [(*decision, z) for decision in decisions]
    came = [(game, tuple(board), action, outcome) for game, board, action, outcome in
            zip(*(batch[name].tolist() for name in ("games", "boards", "actions", "outcomes")))]
    assert len(came) == len(expected), f"In 100 games between two fixed players the learner has {len(came)} decisions, expected {len(expected)}."
    differ = len(set(expected) - set(came))
    assert not differ, f"{differ} of {len(expected)} decisions of 100 games differ from a plain loop, in the board, the column, or the outcome."


def wins_against_random_moves(module, actor, first, games=400):
    """The share of games that the actor wins when it samples its moves. (An untrained argmax wins most of them too: it builds towers.)"""
    rng, generator, boards, won, ply = random.Random(17), torch.Generator().manual_seed(0), [(0,) * 42] * games, 0, 0
    while boards:
        if (ply % 2 == 0) == first:
            with torch.no_grad():
                probabilities = module.legal_logits(actor, torch.tensor(boards, dtype=torch.int8)).softmax(-1)
            columns = torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()
        else:
            columns = [rng.choice(open_columns(board)) for board in boards]
        after = [dropped(board, column) for board, column in zip(boards, columns)]
        won += sum(ending(board) == -1 for board in after) * ((ply % 2 == 0) == first)
        boards, ply = [board for board in after if ending(board) is None], ply + 1
    return won / games


def it_learns(module):
    config = module.Config(seed=1, updates=60, games=256, hidden=64, eval_every=60, lr=0.02, ent_coef=0.01)
    with tempfile.TemporaryDirectory() as place:
        module.train(config, Path(place), log=lambda *words: None)
        agent = module.make_agent(config.hidden)
        agent.load_state_dict(torch.load(Path(place) / "last.pt", weights_only=True))
    for first, words, least in ((True, "first", 0.75), (False, "second", 0.65)):      # untrained: about 53 and 44 %
        share = wins_against_random_moves(module, agent["actor"], first)
        assert share >= least, f"After 60 updates of 256 games it wins {share:.0%} of 400 games against random moves as {words} player; at least {least:.0%} are expected."


CONNECT_FOUR = Extend(
    name="connect_four", minutes=90,
    asks="""Let the same algorithm learn connect four: 6 rows, 7 columns, four in a row win. A move is a column, 0 to 6, and the stone falls to the
lowest free square of it. The squares are numbered 0 to 41, row by row from the top. Change

  LINES, has_line              the fours in a row; has_line(boards): [n, 42] to [n]
  make_agent(hidden)           84 inputs; the actor has 7 logits, the critic 1 value
  legal_logits(actor, boards)  [n, 42] to [n, 7]; a full column has the probability 0
  VIEWS, choose_moves          a board has two views, as it is and mirrored. Returns (seen, actions, columns):
                               [n, 42], the column in the view [n], the column of the board [n]
  make_moves(boards, games, columns)
  train(config, out, log)      the agent after the last update is in last.pt, as now

play_games, actor_critic_loss and update stay as they are. There are too many positions for a list, and so for minimax and the proof: collect starts from games with
random moves, and judge the agent by games against random moves. You need neither TicTacToeEnv nor tictactoe_eval.py. Begin with LINES, and check after each step. After some minutes,

  python runs/exercises/tictactoe/connect_four.py --updates 300

should be on the way to 470 and 446 won games of 500 against random moves, as first and as second player: that is what a solution reached with seed 1.""",
    hint="Look for every 9 and 3 in the first reading, and ask what it counts. "
         "The squares 0 to 6 are the top row: the number of a column is the number of its "
         "top square. So a column is full if that square is taken, and the view's first row says which column of the board an action means. How many stones are in a column? That tells where the next one comes to rest. "
         "Config.views is 8 by default. `examine` can use play_games with "
         "opponent_random=1, and needs a generator of its own. start_judge calls an eval script that knows only 3 × 3.",
    accepts={"has_line finds the fours and nothing else": has_line_finds_fours, "legal_logits has one logit for each column": full_columns_are_illegal,
             "a stone falls, and the players take turns": stones_fall, "a player sees the board or its mirror image": players_see_two_views,
             "play_games plays by the rules": games_follow_the_rules, "a short training learns": it_learns})

EXERCISES = [LEGAL_LOGITS, LOSS, MINIMAX, MAKE_MOVES, *BUGS, RANDOM_OPPONENT, UNTRAINED_ENTROPY, CONNECT_FOUR]
