"""Play against the Tic-Tac-Toe agent, prove it, and study how it was trained.

    python tictactoe_eval.py                         proves the shipped policy and plays 10,000 games against a random player
    python tictactoe_eval.py --play                  you against the agent, in the terminal (also --first, --second)
    python tictactoe_eval.py --gui                   the same with the mouse; every square shows the agent's probability
    python tictactoe_eval.py --prove                 every game that can happen, as first and as second player
    python tictactoe_eval.py --versus minimax --games 10000          also random, weak, or another weights file
    python tictactoe_eval.py --gif --out game.gif    an animated game against a random player
    python tictactoe_eval.py --study runs/study      re-makes the README's tables and figures (about 20 minutes)

Keys of --prove --json FILE: first and second, each with lost, drawn, won (complete games over all replies) and worse_than_minimax
(reachable positions in which the move gives something away); all_positions_worse_than_minimax (of 4,520).
Without --prove the file also holds versus_random, as below.
Keys of --versus … --json FILE: first and second, each with won, drawn, lost (shares, 0-1), and games (on each side).
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import csv
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
BREAKS = ("no-mask", "latest-opponent-only", "no-exploring-opponent", "one-side-only", "off-policy-symmetry")


# ---- the same code as in train_tictactoe.py -------------------------------------------------------------------------

LINES = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])


def outcome_if_over(board):
    """−1 if the player who moved last has a line (the mover has lost), 0 if the board is full, None if the game goes on.
    board: tuple of 9 from the mover's side."""
    if any(board[a] + board[b] + board[c] == -3 for a, b, c in LINES.tolist()):
        return -1
    return 0 if all(board) else None


def after(board, square):
    """The board after the mover has taken a square, seen by the next mover. Tuples of 9."""
    return tuple(-mark for mark in board[:square] + (1,) + board[square + 1:])


def minimax_values():
    """{position: value for the mover under best play} for all 5,478 positions that can occur (Eq. 7)."""
    values = {}

    def value(board):
        if board not in values:
            over = outcome_if_over(board)
            # Eq. 7
            values[board] = over if over is not None else max(-value(after(board, a)) for a in range(9) if board[a] == 0)
        return values[board]

    value((0,) * 9)
    return values


def make_agent(hidden):
    """Two separate networks on 18 inputs (my stones, the other's): "actor" -> 9 logits, "critic" -> 1 value."""
    def network(outputs):
        return nn.Sequential(nn.Linear(18, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return nn.ModuleDict(dict(actor=network(9), critic=network(1)))


def encode(boards):
    """[B, 9] of −1, 0, +1 -> [B, 18] of 0 and 1: where are my stones, where are the other's?"""
    return torch.cat([boards == 1, boards == -1], dim=-1).float()


def legal_logits(actor, boards):
    """[B, 9] logits with −inf on taken squares, so that softmax gives them exactly 0 (Eq. 1)."""
    return actor(encode(boards)).masked_fill(boards != 0, -math.inf)


def sample(logits, generator):
    """One action per row from softmax(logits), by Gumbel-max as in lesson 1. [B, 9] -> [B]"""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(dim=-1)


def prove(actor, values):
    """Follows the greedy policy through every reply the opponent can make, as first and as second player.

    values: minimax_values(). Returns {"first": …, "second": …, "all_positions_worse_than_minimax": n}; each side has the number of
    complete games `lost`, `drawn`, `won`, and `worse_than_minimax`: reachable positions in which the greedy move gives something away.
    """
    positions = [board for board in values if outcome_if_over(board) is None]                       # 4,520
    with torch.no_grad():
        greedy = legal_logits(actor, torch.tensor(positions, dtype=torch.int8)).argmax(dim=-1).tolist()
    move = dict(zip(positions, greedy))
    worse = {board for board in positions if -values[after(board, move[board])] < values[board]}
    result = {}

    def follow(board, mine, counts, visited):
        over = outcome_if_over(board)
        if over is not None:
            counts["drawn" if over == 0 else "lost" if mine else "won"] += 1
        elif mine:
            visited.add(board)
            follow(after(board, move[board]), False, counts, visited)
        else:
            for square in range(9):
                if board[square] == 0:
                    follow(after(board, square), True, counts, visited)

    for name, mine in (("first", True), ("second", False)):
        counts, visited = dict(lost=0, drawn=0, won=0), set()
        follow((0,) * 9, mine, counts, visited)
        result[name] = counts | dict(worse_than_minimax=len(visited & worse))
    return result | dict(all_positions_worse_than_minimax=len(worse))


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place, so that nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


# ---- the agent ------------------------------------------------------------------------------------------------------

def load_agent(weights):
    """The agent stored at a path, in a run directory, in the newest run ("latest"), or an untrained one ("random").

    Weights are read with weights_only=True: a file that carries code instead of numbers is refused, not run.
    """
    if weights == "random":
        torch.manual_seed(0)
        return make_agent(128)
    if weights == "latest":
        runs = sorted(HERE.glob("runs/*/best.pt"), key=lambda path: path.stat().st_mtime)
        if not runs:
            fail(f"--weights latest: there is no run in {HERE / 'runs'} yet; run python train_tictactoe.py first")
        path = runs[-1]
    else:
        path = Path(weights)
    remedy = "train with python train_tictactoe.py, or leave --weights away for the shipped agent"
    try:
        path = path / "best.pt" if path.is_dir() else path
        with warnings.catch_warnings(action="ignore"):            # a refused file is reported below, in one line
            state = torch.load(path, map_location="cpu", weights_only=True)
        agent = make_agent(state["actor.0.weight"].shape[0])
        agent.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise KeyError("not a number")
    except FileNotFoundError:
        fail(f"there are no weights at {path}; {remedy}")
    except pickle.UnpicklingError:
        fail(f"{path} holds something else than tensors and was not opened; {remedy}")
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, AttributeError, IndexError, ValueError) as problem:
        reason = "damaged, or of another network" if isinstance(problem, (RuntimeError, EOFError, KeyError)) else "not a weights file"
        fail(f"{path} cannot be used, it is {reason}; {remedy}")
    return agent


@torch.no_grad()
def opinion(agent, board):
    """What the agent thinks of a board (tuple of 9, from the mover's side): (9 probabilities, value for the mover)."""
    boards = torch.tensor([board], dtype=torch.int8)
    return legal_logits(agent["actor"], boards).softmax(dim=-1)[0].tolist(), agent["critic"](encode(boards)).item()


# ---- a game between a person and the agent --------------------------------------------------------------------------

class Game:
    """The state that the terminal and the window share: the plies played so far and who is who."""

    def __init__(self, agent, person_first):
        self.agent, self.person_first, self.plies = agent, person_first, []

    def board(self):
        """From the mover's side, tuple of 9."""
        board = (0,) * 9
        for square in self.plies:
            board = after(board, square)
        return board

    def marks(self):
        """9 characters: X the first player, O the second, . empty."""
        sign = 1 if len(self.plies) % 2 == 0 else -1
        return ["." if mark == 0 else "X" if mark == sign else "O" for mark in self.board()]

    def persons_turn(self):
        return (len(self.plies) % 2 == 0) == self.person_first

    def over(self):
        """None while the game goes on, else "you win", "you lose" or "a draw"."""
        outcome = outcome_if_over(self.board())
        if outcome is None:
            return None
        return "a draw" if outcome == 0 else "you lose" if self.persons_turn() else "you win"     # −1: the player to move has lost

    def play(self, square):
        """The person's move. False if the square is taken."""
        if self.board()[square] != 0:
            return False
        self.plies.append(square)
        return True

    def reply(self):
        """The agent's move if it is its turn: the square it takes, else None."""
        if self.over() is None and not self.persons_turn():
            probabilities, _ = opinion(self.agent, self.board())
            self.plies.append(int(np.argmax(probabilities)))
            return self.plies[-1]

    def take_back(self):
        """Back to the person's last decision; False if there is none."""
        mine = [ply for ply in range(len(self.plies)) if (ply % 2 == 0) == self.person_first]
        if not mine:
            return False
        self.plies = self.plies[:mine[-1]]
        return True


def draw_board(game):
    marks = game.marks()
    cells = [mark if mark != "." else str(square + 1) for square, mark in enumerate(marks)]
    return "\n---+---+---\n".join(" " + " | ".join(cells[row:row + 3]) for row in (0, 3, 6))


def draw_opinion(game):
    """The agent's view of the board for whoever is to move: probabilities in per cent, and the critic's value."""
    probabilities, value = opinion(game.agent, game.board())
    marks = game.marks()
    cells = [f"{probability:4.0%}" if mark == "." else f"  {mark} " for probability, mark in zip(probabilities, marks)]
    grid = "\n".join(" ".join(cells[row:row + 3]) for row in (0, 3, 6))
    return f"In your place the agent would play with these probabilities:\n{grid}\nIts critic values your position at {max(-1, min(1, value)):+.2f} (+1 you win, -1 you lose)."


def play_terminal(agent, person_first):
    """A game in the terminal. Every input is answered with a friendly line; nothing ends in a traceback."""
    def begin(person_first):
        print("You are " + ("X and begin." if person_first else "O; the agent begins.") + " Keys: 1-9 a square, u take back, ? the agent's opinion, q quit.")
        game = Game(agent, person_first)
        announce(game.reply())
        return game

    def announce(square):
        if square is not None:
            print(f"The agent takes {square + 1}.")

    game = begin(person_first)
    while True:
        print("\n" + draw_board(game))
        if game.over():
            print(f"\nThe game is over: {game.over()}. Enter for another one with sides changed, u to take back, q to quit.")
        try:
            text = input("your move> ").strip().lower()
        except (EOFError, KeyboardInterrupt, RuntimeError):       # RuntimeError: there is no standard input at all
            print("\nGood-bye.")
            return
        except UnicodeDecodeError:
            text = "?!"
        if text == "q":
            print("Good-bye.")
            return
        if text == "u":
            print("Taken back." if game.take_back() else "There is nothing to take back.")
        elif game.over():
            if text == "":
                game = begin(not game.person_first)
        elif text == "?":
            print(draw_opinion(game))
        elif text in tuple("123456789"):
            if game.play(int(text) - 1):
                announce(game.reply())
            else:
                print(f"Square {text} is taken. Choose a free one.")
        else:
            print("Please type a digit from 1 to 9, u, ? or q.")


class Window:
    """The clickable board: squares coloured by the agent's probability for the player to move, and the critic's bar beside it."""

    def __init__(self, agent, person_first):
        from matplotlib import pyplot as plt
        plt.rcParams["toolbar"] = "None"                          # no zooming instead of playing
        self.agent, self.person_first = agent, person_first
        self.figure, (self.axes, self.bar) = plt.subplots(1, 2, figsize=(6.4, 5), width_ratios=[8, 1], layout="constrained")
        self.figure.canvas.mpl_connect("button_press_event", self.click)
        self.figure.canvas.mpl_connect("key_press_event", self.key)
        self.new_game()

    def new_game(self):
        self.game = Game(self.agent, self.person_first)
        self.game.reply()
        self.draw()

    def draw(self):
        probabilities, value = opinion(self.agent, self.game.board())
        over = self.game.over()
        self.axes.clear()
        self.bar.clear()
        shown = np.zeros((3, 3)) if over else np.array(probabilities).reshape(3, 3)
        self.axes.imshow(shown, cmap="Greens", vmin=0, vmax=1.3)
        for square, mark in enumerate(self.game.marks()):
            text, size = (mark, 44) if mark != "." else (f"{probabilities[square]:.0%}" if not over else "", 12)
            self.axes.text(square % 3, square // 3, text, ha="center", va="center", fontsize=size, color={"X": "C0", "O": "C3"}.get(mark, "black"))
        for at in (0.5, 1.5):
            self.axes.axhline(at, color="black")
            self.axes.axvline(at, color="black")
        self.axes.set(xticks=[], yticks=[], title=f"The game is over: {over}. Click for another, u takes back." if over else
                      f"You are {'X' if self.person_first else 'O'}: click a square (u takes back). Colours: what the agent would do.")
        self.axes.title.set_fontsize(9)
        self.bar.bar([0], [0 if over else value], color="C2" if value > 0 else "C3")
        self.bar.axhline(0, color="black", linewidth=0.8)
        self.bar.set(ylim=(-1.05, 1.05), xticks=[], title="critic")
        self.bar.yaxis.tick_right()
        self.figure.canvas.draw_idle()

    def click(self, event):
        if event.button != 1 or event.dblclick:
            return
        if self.game.over():
            self.person_first = not self.person_first
            self.new_game()
        elif event.inaxes is self.axes and event.xdata is not None:
            column, row = round(event.xdata), round(event.ydata)
            if 0 <= column <= 2 and 0 <= row <= 2:
                free = self.game.play(3 * row + column)
                self.game.reply()
                self.draw()
                if not free:
                    self.axes.set_title(f"Square {3 * row + column + 1} is taken. Choose a free one.", fontsize=9)

    def key(self, event):
        if event.key == "u" and self.game.take_back():
            self.draw()


# ---- matches --------------------------------------------------------------------------------------------------------

def greedy_table(agent, values):
    """{position: the agent's most probable square} for all 4,520 positions."""
    positions = [board for board in values if outcome_if_over(board) is None]
    with torch.no_grad():
        moves = legal_logits(agent["actor"], torch.tensor(positions, dtype=torch.int8)).argmax(dim=-1).tolist()
    return dict(zip(positions, moves))


def make_opponent(name, values, rng):
    """A function board -> square. random: any legal square; weak: takes a win, else blocks one, else random; minimax: uniformly
    one of the best squares; anything else: the greedy moves of those weights."""
    def legal(board):
        return [square for square in range(9) if board[square] == 0]

    def weak(board):
        for mine in (board, tuple(-mark for mark in board)):      # first my own line, then the other's
            for square in legal(mine):
                if outcome_if_over(after(mine, square)) == -1:
                    return square
        return rng.choice(legal(board))

    def minimax(board):
        return rng.choice([square for square in legal(board) if -values[after(board, square)] == values[board]])

    if name == "random":
        return lambda board: rng.choice(legal(board))
    if name in ("weak", "minimax"):
        return {"weak": weak, "minimax": minimax}[name]
    return greedy_table(load_agent(name), values).get


def versus(agent, name, games, values, seed=0):
    """Plays `games` games on each side. Returns {"first": …, "second": …}, each with won, drawn, lost (shares) and games."""
    rng = random.Random(seed)
    mine, theirs = greedy_table(agent, values).get, make_opponent(name, values, rng)
    result = {}
    for side, my_parity in (("first", 0), ("second", 1)):
        counts = dict(won=0, drawn=0, lost=0)
        for _ in range(games):
            board, ply = (0,) * 9, 0
            while outcome_if_over(board) is None:
                board = after(board, (mine if ply % 2 == my_parity else theirs)(board))
                ply += 1
            i_am_to_move = ply % 2 == my_parity                   # whoever is to move at a decided end has lost
            counts["drawn" if outcome_if_over(board) == 0 else "lost" if i_am_to_move else "won"] += 1
        result[side] = {key: count / games for key, count in counts.items()} | dict(games=games)
    return result


def against_random(values, move=None):
    """Exact shares against a uniformly random player, as first and second: (won, drawn, lost). With move=None the best that any
    never-losing player can reach: among the moves after which a loss cannot be forced, the one that wins most often."""
    memory = {}

    def shares(board, mine):
        if (board, mine) not in memory:
            over = outcome_if_over(board)
            squares = [square for square in range(9) if board[square] == 0]
            if over is not None:
                memory[board, mine] = np.array([over == -1 and not mine, over == 0, over == -1 and mine], float)
            elif not mine:
                memory[board, mine] = sum(shares(after(board, square), True) for square in squares) / len(squares)
            elif move:
                memory[board, mine] = shares(after(board, move[board]), False)
            else:
                sound = [square for square in squares if -values[after(board, square)] >= min(0, values[board])]
                memory[board, mine] = max((shares(after(board, square), False) for square in sound), key=lambda s: s[0])
        return memory[board, mine]

    return shares((0,) * 9, True), shares((0,) * 9, False)


# ---- pictures -------------------------------------------------------------------------------------------------------

def game_gif(agent, values, out, seed):
    """Two animated games against a random player, the agent as X and as O; squares are coloured by what the agent would do there."""
    import matplotlib
    matplotlib.use("Agg")
    from PIL import Image
    rng, frames = random.Random(seed), []
    for person_first in (False, True):                            # two games, so both sides are seen
        window = Window(agent, person_first)
        while True:
            window.axes.set_title(f"agent {'O' if person_first else 'X'}, random player {'X' if person_first else 'O'}" +
                                  {"you lose": ": the agent wins", "you win": ": the agent loses", "a draw": ": a draw", None: ""}[window.game.over()])
            window.figure.canvas.draw()
            picture = Image.fromarray(np.asarray(window.figure.canvas.buffer_rgba())[..., :3].copy()).resize((448, 350), Image.Resampling.LANCZOS)
            frames += [picture.quantize(colors=64)] * (3 if window.game.over() else 1)
            if window.game.over():
                break
            window.game.play(rng.choice([square for square in range(9) if window.game.board()[square] == 0]))
            window.game.reply()
            window.draw()
    content = io.BytesIO()
    frames[0].save(content, format="GIF", save_all=True, append_images=frames[1:], duration=1200, loop=0, optimize=True)
    try:
        write(out, content.getvalue())
    except OSError as problem:
        fail(f"--out {out} cannot be written ({problem.strerror}); choose another file")
    print(f"wrote {out}, {len(content.getvalue()) // 1024} kB")


def portrait(agent, values, out):
    """Three panels: first-move probabilities; critic against the true value; which squares it prefers in reply to a corner."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    positions = [board for board in values if outcome_if_over(board) is None]
    with torch.no_grad():
        guesses = agent["critic"](encode(torch.tensor(positions, dtype=torch.int8))).squeeze(-1).numpy()
    truth = np.array([values[board] for board in positions])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=[1, 1, 1.5], layout="constrained")
    for panel, board, title in ((left, (0,) * 9, "first move"), (middle, after((0,) * 9, 0), "reply to a corner")):
        probabilities, value = opinion(agent, board)
        panel.imshow(np.array(probabilities).reshape(3, 3), cmap="Greens", vmin=0, vmax=1.3)
        for square, probability in enumerate(probabilities):
            panel.text(square % 3, square // 3, f"{probability:.1%}" if board[square] == 0 else "X", ha="center", va="center")
        panel.set(xticks=[], yticks=[], title=f"{title}; critic {value:+.2f}")
    for true, colour in ((-1, "C3"), (0, "C7"), (1, "C2")):
        right.hist(guesses[truth == true], bins=np.linspace(-1.3, 1.3, 53), color=colour, alpha=0.6, label=f"true value {true} ({(truth == true).sum()} positions)")
    right.set(xlabel="critic's value", ylabel="positions", title="critic against minimax, all 4,520 positions")
    right.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    plt.close(figure)
    write(out, picture.getvalue())


# ---- the study behind the README ------------------------------------------------------------------------------------

def study(directory):
    """Trains five seeds as shipped, then three of every broken variant; writes tables.md, losing_lines.png, ablation.png, portrait.png."""
    from tqdm import tqdm
    if not (HERE / "train_tictactoe.py").exists():
        fail("--study runs train_tictactoe.py, which is not beside this script")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        fail(f"--study {directory} is not an empty directory; nothing was overwritten, choose another")
    values, runs = minimax_values(), {}
    for name, seed in tqdm([("as it is", s) for s in range(5)] + [(name, s) for name in BREAKS for s in range(3)], disable=not sys.stderr.isatty(), unit="run"):
        out = directory / f"{name.replace(' ', '_')}_{seed}"
        command = [sys.executable, str(HERE / "train_tictactoe.py"), "--quiet", "--out", str(out), "--seed", str(seed)]
        if subprocess.run(command + ([] if name == "as it is" else ["--break", name])).returncode:
            fail(f"the run in {out} failed; the study was stopped")
        with (out / "metrics.csv").open(encoding="utf8") as file:
            rows = list(csv.DictReader(file))
        with (out / "timing.csv").open(encoding="utf8") as file:
            clock = {row["update"]: float(row["train_seconds"]) for row in csv.DictReader(file)}
        runs[name, seed] = dict(json.loads((out / "train.json").read_text(encoding="utf8"))["result"], agent=load_agent(str(out)),
                                entropy=float(rows[-1]["entropy"]), rows=[row for row in rows if row["all_worse"]], clock=clock)
    best_first, best_second = against_random(values)
    lines = ["| seed | losing lines, first + second | reachable moves worse than minimax | of all 4,520 | perfect after | training s | proofs s "
             "| random player: won as first / second | lost |", "|---|---|---|---|---|---|---|---|---|"]
    for seed in range(5):
        r = runs["as it is", seed]
        first, second = against_random(values, greedy_table(r["agent"], values))
        perfect = f"{r['perfect_at'][0]} updates, {r['perfect_at'][1]:.0f} s" if r["perfect_at"] else "never"
        lines.append(f"| {seed} | {r['first']['lost']} + {r['second']['lost']} | {r['first']['worse_than_minimax']} + {r['second']['worse_than_minimax']} "
                     f"| {r['all_positions_worse_than_minimax']} | {perfect} | {r['train_seconds']:.0f} | {r['proof_seconds']:.0f} | {first[0]:.1%} / {second[0]:.1%} | {first[2] + second[2]:.0%} |")
    lines += ["", f"The most that never-losing play can win against the random player: {best_first[0]:.1%} as first, {best_second[0]:.1%} as second.", "",
              "| variant | losing lines of the best weights, first + second, each seed | of all 4,520 | lost to a random player, worse side | entropy at the end |",
              "|---|---|---|---|---|"]
    for name in ("as it is", *BREAKS):
        results = [runs[name, seed] for seed in range(5 if name == "as it is" else 3)]
        beaten = [max(shares[2] for shares in against_random(values, greedy_table(r["agent"], values))) for r in results]
        lines.append(f"| {name} | {', '.join(f'''{r['first']['lost']} + {r['second']['lost']}''' for r in results)} "
                     f"| {', '.join(str(r['all_positions_worse_than_minimax']) for r in results)} | {', '.join(f'{b:.1%}' for b in beaten)} "
                     f"| {', '.join(f'''{r['entropy']:.2f}''' for r in results)} |")
    write(directory / "tables.md", "\n".join(lines) + "\n")
    print("\n".join(lines))

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    lost = lambda row: int(row["first_lost"]) + int(row["second_lost"])
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for seed in range(5):
        r = runs["as it is", seed]
        seconds = [r["clock"][row["update"]] for row in r["rows"]]
        axes.plot(seconds, [lost(row) for row in r["rows"]], color=f"C{seed}", marker=".", label=f"losing lines, seed {seed}")
        axes.plot(seconds, [int(row["all_worse"]) for row in r["rows"]], color=f"C{seed}", alpha=0.35, linestyle=":")
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="seconds of training", ylabel="count (dotted: errors in all 4,520 positions)", ylim=(-0.3, None), title="Tic-Tac-Toe by self-play: losing lines fall to 0")
    axes.legend(fontsize=8)
    figure.savefig(directory / "losing_lines.png", dpi=110)
    figure, panels = plt.subplots(1, len(BREAKS), figsize=(13, 3.2), sharey=True, layout="constrained")
    for panel, name in zip(panels, BREAKS):
        for variant, colour in (("as it is", "C0"), (name, "C3")):
            for seed in range(3):
                rows = runs[variant, seed]["rows"]
                panel.plot([int(row["update"]) for row in rows], [lost(row) for row in rows], color=colour, alpha=0.7)
        panel.set_yscale("symlog", linthresh=1)
        panel.set(title=name, xlabel="updates", ylim=(-0.3, None))
    panels[0].set_ylabel("losing lines (blue: as it is)")
    figure.savefig(directory / "ablation.png", dpi=90)
    portrait(runs["as it is", 1]["agent"], values, directory / "portrait.png")
    print(f"tables.md and three figures are in {directory}")


# ---- command line ---------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--weights", default=str(HERE / "weights"), metavar="PATH|DIR|latest|random", help="which agent (default: the shipped one)")
    parser.add_argument("--play", action="store_true", help="play against the agent in the terminal")
    parser.add_argument("--gui", action="store_true", help="play against the agent in a window")
    parser.add_argument("--first", action="store_true", help="with --play or --gui: you begin (default: drawn by lot)")
    parser.add_argument("--second", action="store_true", help="with --play or --gui: the agent begins")
    parser.add_argument("--prove", action="store_true", help="enumerate every game that can happen")
    parser.add_argument("--versus", metavar="random|weak|minimax|WEIGHTS", help="play many games against an opponent")
    parser.add_argument("--games", type=int, default=10_000, help="games on each side with --versus (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the opponent's choices (default 0)")
    parser.add_argument("--gif", action="store_true", help="write an animation of two games against a random player")
    parser.add_argument("--out", type=Path, help="file of the animation (default tictactoe.gif)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of --prove or --versus there too")
    parser.add_argument("--study", type=Path, metavar="DIR", help="train 20 runs and re-make the README's tables and figures in DIR")
    parser.add_argument("--smoke", action="store_true", help="prove an untrained agent, to see that everything runs")
    args = parser.parse_args()
    if sum(map(bool, (args.play, args.gui, args.prove, args.versus is not None, args.gif, args.study, args.smoke))) > 1:
        fail("--play, --gui, --prove, --versus, --gif, --study and --smoke do different things; give one of them")
    if args.first and args.second:
        fail("--first and --second exclude each other")
    if not 1 <= args.games <= 10**7:
        fail(f"--games must be in 1 … 10000000, not {args.games}")
    for flag, path in (("--json", args.json), ("--out", args.out)):
        try:
            good = not path or not path.is_dir() and path.absolute().parent.is_dir()
        except OSError:
            good = False
        if not good:
            fail(f"{flag} {path} must be a file in a directory that exists")
    if args.json and (args.play or args.gui or args.gif or args.study):
        fail("--json goes with --prove, --versus or neither")
    if args.versus not in (None, "random", "weak", "minimax"):
        args.games = 1                                            # two greedy players: one game on each side says it all
    if args.smoke:
        args.weights, args.prove = "random", True
    return args


def print_proof(proof):
    print(f"{'':8} {'lost':>6} {'drawn':>6} {'won':>6}   complete games over all replies; moves worse than minimax in reachable positions")
    for side in ("first", "second"):
        p = proof[side]
        print(f"{side:8} {p['lost']:6d} {p['drawn']:6d} {p['won']:6d}   {p['worse_than_minimax']}")
    print(f"In all 4,520 positions, reachable or not: {proof['all_positions_worse_than_minimax']} moves worse than minimax.")


def print_versus(result, name):
    print(f"against {name}: " + "; ".join(f"as {side} player won {r['won']:.1%}, drawn {r['drawn']:.1%}, lost {r['lost']:.1%} of {r['games']:,}"
                                          for side, r in result.items()))


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know "…"
    args = parse_args()
    torch.set_num_threads(1)
    if args.study:
        return study(args.study)
    agent, result = load_agent(args.weights), None
    person_first = args.first or not args.second and random.random() < 0.5
    if args.play:
        return play_terminal(agent, person_first)
    if args.gui:
        try:
            from matplotlib import pyplot as plt
            backend = plt.get_backend().lower()
        except (ImportError, ValueError):
            backend = "agg"
        if backend in ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template"):
            fail("--gui needs a display and a window toolkit (python -m tkinter shows whether there is one); --play works in any terminal")
        window = Window(agent, person_first)                      # kept in a variable: matplotlib holds callbacks weakly
        return plt.show()
    values = minimax_values()
    if args.gif:
        return game_gif(agent, values, args.out or Path("tictactoe.gif"), args.seed)
    if args.versus is not None:
        result = versus(agent, args.versus, args.games, values, args.seed)
        print_versus(result, args.versus)
    else:
        result = prove(agent["actor"], values)
        print_proof(result)
        if not (args.prove or args.smoke):
            result["versus_random"] = versus(agent, "random", args.games, values, args.seed)
            print_versus(result["versus_random"], "a random player")
    if args.json:
        try:
            write(args.json, json.dumps(result, indent=1) + "\n")
        except OSError as problem:
            fail(f"--json {args.json} cannot be written ({problem.strerror}); choose another file")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except BrokenPipeError:                                       # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
