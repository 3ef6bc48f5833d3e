"""You against the Tic-Tac-Toe agent, in the terminal or with the mouse.

    python play_tictactoe.py            in the terminal; who begins is decided by lot
    python play_tictactoe.py --first    you begin (--second: the agent does)
    python play_tictactoe.py --gui      in a window: every square shows the agent's probability, and
                                        a bar shows what its critic thinks of the position

Shapes: n boards of 9 squares. A board is shown from the mover's side: +1 the mover's stones, −1 the
other's, 0 empty.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
import argparse
import math
import os
import random
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
REMEDY = "train one with train_tictactoe.py, or omit --weights for the shipped agent"


# ---- the same code as in train_tictactoe.py and tictactoe_eval.py -----------------------------

LINES = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8],      # rows            0 1 2
                      [0, 3, 6], [1, 4, 7], [2, 5, 8],      # columns         3 4 5
                      [0, 4, 8], [2, 4, 6]])                # diagonals       6 7 8


def outcome_if_over(board):
    """−1 if the player who moved last has a line (the mover has lost), 0 if the board is full, None
    if the game goes on. board: tuple of 9 from the mover's side."""
    if any(board[a] + board[b] + board[c] == -3 for a, b, c in LINES.tolist()):
        return -1
    return 0 if all(board) else None


def after(board, square):
    """The board after the mover has taken a square, seen by the next mover. Tuples of 9."""
    moved = board[:square] + (1,) + board[square + 1:]
    return tuple(-mark for mark in moved)


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


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def newest_run(needed):
    """The newest directory in runs/ with a file of that name; runs of --smoke do not count."""
    found = [path for path in HERE.glob(f"runs/*/{needed}") if "_smoke" not in path.parent.name]
    if not found:
        fail(f"latest: no run in {HERE / 'runs'} has a {needed} yet")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def load_agent(weights):
    """The agent in a file, in a run directory, in the newest run ("latest"), or an untrained one
    ("random").

    Weights are read with weights_only=True: a file that carries code is refused, not run.
    """
    if weights == "random":
        torch.manual_seed(0)
        return make_agent(256)
    path = newest_run("best.pt") if weights == "latest" else Path(weights)
    try:
        path = path / "best.pt" if path.is_dir() else path
        if not path.exists():
            fail(f"there are no weights at {path}; {REMEDY}")
        # A pipe would never end; and torch.load does not look at the checksums in the file
        assert path.is_file() and zipfile.ZipFile(path).testzip() is None
        with warnings.catch_warnings(action="ignore"):        # a refused file is reported below
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        agent = make_agent(hidden=state["actor.0.weight"].shape[0])
        agent.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("a weight is not a number")
    except Exception:                 # torch raises many kinds; the remedy is one
        fail(f"{path} was not opened: it is damaged, of another network, or holds something else "
             f"than tensors; {REMEDY}")
    return agent


# ---- the game ---------------------------------------------------------------------------------

@torch.no_grad()
def opinion(agent, board):
    """(9 probabilities, value): what the agent thinks of a board [9] from the mover's side."""
    boards = torch.tensor([board], dtype=torch.int8)                    # [1, 9]
    probabilities = legal_logits(agent["actor"], boards).softmax(dim=-1)[0].tolist()
    return probabilities, agent["critic"](encode(boards)).item()


class Game:
    """A game between a person and the agent: the plies played so far, and who is who."""

    def __init__(self, agent, person_first):
        self.agent = agent
        self.person_first = person_first
        self.plies = []

    def board(self):
        """Tuple of 9 from the mover's side."""
        board = (0,) * 9
        for square in self.plies:
            board = after(board, square)
        return board

    def marks(self):
        """9 characters: X the first player, O the second, . empty."""
        mover, other = ("X", "O") if len(self.plies) % 2 == 0 else ("O", "X")
        names = {1: mover, -1: other, 0: "."}
        return [names[mark] for mark in self.board()]

    def persons_turn(self):
        return (len(self.plies) % 2 == 0) == self.person_first

    def over(self):
        """None while the game goes on, else "you win", "you lose" or "a draw"."""
        outcome = outcome_if_over(self.board())
        if outcome is None:
            return None
        if outcome == 0:
            return "a draw"
        return "you lose" if self.persons_turn() else "you win"       # who is to move has lost

    def play(self, square):
        """The person's move. False if the square is taken."""
        free = self.board()[square] == 0
        if free:
            self.plies.append(square)
        return free

    def reply(self):
        """The agent's move if it is its turn: the square it takes, else None."""
        if self.over() is None and not self.persons_turn():
            probabilities, _ = opinion(self.agent, self.board())
            self.plies.append(int(np.argmax(probabilities)))
            return self.plies[-1]

    def take_back(self):
        """Back to the person's last decision. False if there is none."""
        mine = [ply for ply in range(len(self.plies)) if (ply % 2 == 0) == self.person_first]
        if mine:
            self.plies = self.plies[:mine[-1]]
        return bool(mine)


# ---- in the terminal --------------------------------------------------------------------------

def board_text(game):
    """The board with the numbers of the free squares."""
    cells = [mark if mark != "." else str(number) for number, mark in enumerate(game.marks(), 1)]
    return "\n---+---+---\n".join(" " + " | ".join(cells[row:row + 3]) for row in (0, 3, 6))


def opinion_text(game):
    """The agent's probabilities for the player to move, and the critic's value."""
    probabilities, value = opinion(game.agent, game.board())
    cells = [f"{probability:4.0%}" if mark == "." else f"  {mark} "
             for probability, mark in zip(probabilities, game.marks())]
    grid = "\n".join(" ".join(cells[row:row + 3]) for row in (0, 3, 6))
    value = max(-1, min(1, value))
    return (f"In your place the agent would play with these probabilities:\n{grid}\n"
            f"Its critic values your position at {value:+.2f} (+1 you win, -1 you lose).")


def begin(agent, person_first):
    """A new game, with the agent's first move if it begins."""
    print("You are " + ("X and begin." if person_first else "O; the agent begins.")
          + " Keys: 1-9 a square, u take back, ? the agent's opinion, q quit.")
    game = Game(agent, person_first)
    announce(game.reply())
    return game


def announce(square):
    if square is not None:
        print(f"The agent takes {square + 1}.")


def read_key():
    """What the person types; "q" where there is nobody (any more)."""
    try:
        return input("your move> ").strip().lower()
    except (EOFError, KeyboardInterrupt, RuntimeError):     # RuntimeError: no standard input at all
        print()
        return "q"
    except UnicodeDecodeError:
        return "?!"


def play_terminal(agent, person_first):
    """Games in the terminal. Every input is answered with a friendly line."""
    game = begin(agent, person_first)
    while True:
        print("\n" + board_text(game))
        if game.over():
            print(f"\nThe game is over: {game.over()}. Enter for another one with sides changed, "
                  "u to take back, q to quit.")
        key = read_key()
        if key == "q":
            print("Good-bye.")
            return
        if key == "u":
            print("Taken back." if game.take_back() else "There is nothing to take back.")
        elif game.over():
            if key == "":
                game = begin(agent, not game.person_first)
        elif key == "?":
            print(opinion_text(game))
        elif key not in tuple("123456789"):
            print("Please type a digit from 1 to 9, u, ? or q.")
        elif game.play(int(key) - 1):
            announce(game.reply())
        else:
            print(f"Square {key} is taken. Choose a free one.")


# ---- in a window ------------------------------------------------------------------------------

class Window:
    """The clickable board: squares coloured by the agent's probability for the player to move, and
    a bar for the critic's value beside it."""

    def __init__(self, agent, person_first):
        from matplotlib import pyplot as plt
        plt.rcParams["toolbar"] = "None"              # no zooming instead of playing
        self.agent = agent
        self.person_first = person_first
        self.figure, (self.axes, self.bar) = plt.subplots(1, 2, figsize=(6.4, 5),
                                                          width_ratios=[8, 1], layout="constrained")
        self.figure.canvas.mpl_connect("button_press_event", self.click)
        self.figure.canvas.mpl_connect("key_press_event", self.key)
        self.new_game()

    def new_game(self):
        self.game = Game(self.agent, self.person_first)
        self.game.reply()
        self.draw()

    def draw(self):
        self.axes.clear()
        self.bar.clear()
        self.draw_board()
        self.draw_value()
        self.figure.canvas.draw_idle()

    def draw_board(self):
        over = self.game.over()
        probabilities, _ = opinion(self.agent, self.game.board())
        shown = np.zeros((3, 3)) if over else np.array(probabilities).reshape(3, 3)
        self.axes.imshow(shown, cmap="Blues", vmin=0, vmax=1.3)
        for square, mark in enumerate(self.game.marks()):
            row, column = divmod(square, 3)
            if mark != ".":
                colour = "C0" if mark == "X" else "C1"
                self.axes.text(column, row, mark, ha="center", va="center", fontsize=44,
                               color=colour)
            elif not over:
                self.axes.text(column, row, f"{probabilities[square]:.0%}", ha="center",
                               va="center", fontsize=12, color="black")
        for at in (0.5, 1.5):
            self.axes.axhline(at, color="black")
            self.axes.axvline(at, color="black")
        you = "X" if self.person_first else "O"
        title = f"You are {you}: click a square (u takes back). Colours: what the agent would do."
        if over:
            title = f"The game is over: {over}. Click for another, u takes back."
        self.axes.set(xticks=[], yticks=[])
        self.axes.set_title(title, fontsize=9)

    def draw_value(self):
        _, value = opinion(self.agent, self.game.board())
        value = 0 if self.game.over() else value
        self.bar.bar([0], [value], color="C0" if value > 0 else "C1")
        self.bar.axhline(0, color="black", linewidth=0.8)
        self.bar.set(ylim=(-1.05, 1.05), xticks=[], title="critic")
        self.bar.yaxis.tick_right()

    def click(self, event):
        if event.button != 1 or event.dblclick:
            return
        if self.game.over():
            self.person_first = not self.person_first
            self.new_game()
        elif event.inaxes is self.axes and event.xdata is not None:
            column, row = round(event.xdata), round(event.ydata)
            if 0 <= column <= 2 and 0 <= row <= 2:
                self.take(3 * row + column)

    def take(self, square):
        free = self.game.play(square)
        self.game.reply()
        self.draw()
        if not free:
            self.axes.set_title(f"Square {square + 1} is taken. Choose a free one.", fontsize=9)

    def key(self, event):
        if event.key == "u" and self.game.take_back():
            self.draw()


def play_window(agent, person_first):
    """Opens the window; an error where there is no display."""
    try:
        from matplotlib import pyplot as plt
        backend = plt.get_backend().lower()
    except (ImportError, ValueError):
        backend = "agg"
    if backend in ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template"):
        fail("--gui needs a display and a window toolkit (python -m tkinter shows whether there is "
             "one); without --gui you can play in any terminal")
    window = Window(agent, person_first)    # kept in a variable: matplotlib holds callbacks weakly
    plt.show()


# ---- command line -----------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--weights", default=str(HERE / "weights"),
                        metavar="PATH|DIR|latest|random",
                        help="against which agent (default: the shipped one)")
    parser.add_argument("--gui", action="store_true", help="in a window instead of the terminal")
    parser.add_argument("--first", action="store_true", help="you begin (default: by lot)")
    parser.add_argument("--second", action="store_true", help="the agent begins")
    parser.add_argument("--smoke", action="store_true", help="shows the first board and stops")
    args = parser.parse_args()
    if args.first and args.second:
        fail("--first and --second exclude each other")
    return args


def main():
    args = parse_args()
    torch.set_num_threads(1)
    agent = load_agent("random" if args.smoke else args.weights)
    by_lot = not (args.first or args.second)
    person_first = random.random() < 0.5 if by_lot else args.first
    if args.smoke:
        print(board_text(begin(agent, person_first)))
    elif args.gui:
        play_window(agent, person_first)
    else:
        play_terminal(agent, person_first)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")          # a Windows pipe may not know every character
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except BrokenPipeError:                           # the reader of our output (head) is gone
        os._exit(1)
    except (OSError, MemoryError, UnicodeError) as problem:   # a file, the disk, memory
        fail(str(problem) or "out of memory")
