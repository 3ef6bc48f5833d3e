"""Draws the map of the lessons and the diagrams of the language-model lessons: who feeds whom.

    python docs/figures.py          writes docs/figures/map.png and <lesson>/figures/diagram.png
"""
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

REPO = Path(__file__).resolve().parents[1]
# Light tints of Okabe and Ito's palette. The word in a box says the same as its colour
COLOURS = {"trained": "#F6C9A8", "frozen": "#BBD9EE", "data": "#F3EBB5", "program": "#CDE8DA", "": "#FFFFFF"}


def canvas(width, height):
    """A figure whose axes are measured in inches."""
    figure = plt.figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes([0, 0, 1, 1])
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, title, text, kind=""):
    """A box with its lower left corner at (x, y)."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=.08", facecolor=COLOURS[kind], edgecolor="#333333"))
    middle = x + width / 2
    axes.text(middle, y + height - 0.13, title, ha="center", va="top", fontsize=10.5, weight="bold")
    axes.text(middle, y + height - 0.40, text, ha="center", va="top", fontsize=9.5, linespacing=1.25)


def arrow(axes, start, end, label="", dx=0.0, dy=0.1, bend=0.0):
    """An arrow from start to end, with a label beside its middle."""
    style = dict(arrowstyle="-|>", color="#333333", linewidth=1.4, shrinkA=0, shrinkB=0, connectionstyle=f"arc3,rad={bend}")
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
    axes.text((start[0] + end[0]) / 2 + dx, (start[1] + end[1]) / 2 + dy, label, ha="center", va="center", fontsize=9.5, style="italic",
              bbox=dict(facecolor="white", edgecolor="none", pad=1))


def draw_map():
    """The seven lessons, what each adds, and the bridge between games and language."""
    figure, axes = canvas(8, 4.6)
    width, height = 2.3, 1.1
    upper, lower = 3.0, 0.75
    lefts = (0.15, 2.85, 5.55)
    games = (("1 · REINFORCE", "CartPole\npolicy gradient, baseline,\nmasks"),
             ("2 · Actor-critic", "Tic-Tac-Toe\na critic as baseline, entropy,\nself-play, a proof"),
             ("3 · PPO", "LunarLander\nbootstrapping, GAE,\nratio and clip"))
    for left, (title, text) in zip(lefts, games):
        box(axes, left, upper, width, height, title, text, "frozen")
    for left in lefts[:2]:
        arrow(axes, (left + width, upper + height / 2), (left + width + 0.4, upper + height / 2))
    small = 1.8
    lefts = (0.15, 2.12, 4.09, 6.06)
    language = (("4 · SPO", "guess the number\na reference model,\nthe exact optimum"),
                ("5 · GRPO", "explanations\ngroup as baseline,\na reward model"),
                ("6 · RLHF", "preferences\nmaking reward models,\nRLOO, a collapse"),
                ("7 · Paths", "word problems\na checked reward,\npass@k"))
    for left, (title, text) in zip(lefts, language):
        box(axes, left, lower, small, height, title, text, "trained")
    for left in lefts[:3]:
        arrow(axes, (left + small, lower + height / 2), (left + small + 0.17, lower + height / 2))
    bridge = (6.7, 3.0), (6.7, 2.55), (1.05, 2.55), (1.05, 2.03)
    for start, end in zip(bridge[:2], bridge[1:3]):
        axes.plot(*zip(start, end), color="#333333", linewidth=1.4)
    arrow(axes, *bridge[2:])
    axes.text(4.0, 2.55, "From games to language: a token is an action", ha="center", va="center", fontsize=10, style="italic",
              bbox=dict(facecolor="white", edgecolor="none", pad=3))
    # What returns: lesson 1's baseline in 6, lesson 3's ratio and clip in 5
    axes.text(4.0, 0.40, "The baseline of lesson 1 returns in 5, 6 and 7: other answers, or earlier ones, in place of other episodes.\n"
              "The ratio and the clip of lesson 3 return in 5.", ha="center", va="center", fontsize=9.5)
    save(figure, REPO / "docs" / "figures" / "map.png")


def draw_spo():
    """Lesson 4: answers from anywhere, and the claim that the loss compares with the reward."""
    figure, axes = canvas(8, 4.25)
    box(axes, 0.1, 2.05, 1.5, 0.8, "answers", "from anywhere", "data")
    box(axes, 2.3, 3.05, 1.5, 0.8, "policy", "trained", "trained")
    box(axes, 2.3, 2.05, 1.5, 0.8, "reference", "frozen", "frozen")
    box(axes, 2.3, 1.05, 1.5, 0.8, "reward", "a formula", "program")
    box(axes, 4.5, 2.55, 1.5, 0.8, "claim $Q_T$", "program", "program")
    box(axes, 6.4, 2.05, 1.5, 0.8, "loss", "$Q_T$ against $r$", "program")
    box(axes, 4.5, 0.1, 1.5, 0.8, "optimum", "exact, to judge", "program")
    arrow(axes, (1.6, 2.55), (2.3, 3.35))
    arrow(axes, (1.6, 2.45), (2.3, 2.45))
    arrow(axes, (1.6, 2.35), (2.3, 1.5))
    arrow(axes, (3.8, 3.4), (4.5, 3.1), r"$\log\pi_\theta$", 0.05, 0.17)
    arrow(axes, (3.8, 2.5), (4.5, 2.8), r"$\log\pi_{ref}$", 0.12, -0.17)
    arrow(axes, (6.0, 2.9), (6.4, 2.65), "$Q_T$", 0.12, 0.15)
    arrow(axes, (3.8, 1.5), (6.4, 2.2), "$r$", 0, 0.17)
    axes.plot([7.15, 7.15, 3.05], [2.85, 4.1, 4.1], color="#333333", linewidth=1.4)
    arrow(axes, (3.05, 4.1), (3.05, 3.85))
    axes.text(5.3, 4.1, "gradient", ha="center", va="center", fontsize=9.5, style="italic", bbox=dict(facecolor="white", edgecolor="none", pad=1))
    arrow(axes, (2.3, 3.6), (0.85, 2.85), "its own old answers", -0.45, 0.12, bend=0.25)
    arrow(axes, (3.8, 2.2), (5.0, 0.9), r"$\pi_{ref}$", 0.28, -0.12)
    arrow(axes, (3.3, 1.05), (4.5, 0.45), "$r$", -0.1, -0.12)
    save(figure, REPO / "spo_dummy" / "figures" / "diagram.png")


def back(axes, start, end, height, label):
    """A line that leaves a box at its top, runs to the left at `height`, and enters another box from above."""
    axes.plot([start[0], start[0], end[0]], [start[1], height, height], color="#333333", linewidth=1.4)
    arrow(axes, (end[0], height), end)
    axes.text((start[0] + end[0]) / 2, height, label, ha="center", va="center", fontsize=9.5, style="italic",
              bbox=dict(facecolor="white", edgecolor="none", pad=1))


def draw_grpo():
    """Lesson 5: a group of answers, its rewards, and the two models that score each token."""
    figure, axes = canvas(8, 4.0)
    box(axes, 0.1, 1.6, 1.25, 0.8, "prompts", "data", "data")
    box(axes, 1.85, 2.65, 1.45, 0.8, "policy", "trained", "trained")
    box(axes, 1.85, 1.6, 1.45, 0.8, "8 answers", "to each prompt", "data")
    box(axes, 4.0, 1.6, 1.5, 0.8, "reward model", "frozen", "frozen")
    box(axes, 4.0, 0.35, 1.5, 0.8, "reference", "frozen", "frozen")
    box(axes, 6.3, 1.6, 1.6, 0.8, "advantages", "against the group", "program")
    box(axes, 6.3, 2.65, 1.6, 0.8, "loss", "ratio, clip, KL", "program")
    arrow(axes, (1.35, 2.2), (1.85, 2.8), "ask", -0.12, 0.12)
    arrow(axes, (2.58, 2.65), (2.58, 2.4), "sample", 0.42, 0)
    arrow(axes, (3.3, 2.0), (4.0, 2.0), "text", 0, 0.14)
    arrow(axes, (5.5, 2.0), (6.3, 2.0), "8 rewards", 0, 0.14)
    arrow(axes, (7.1, 2.4), (7.1, 2.65), "$A$", 0.18, 0)
    arrow(axes, (2.58, 1.6), (4.0, 0.75), "tokens", -0.1, -0.18)
    axes.plot([5.5, 6.05, 6.05], [0.75, 0.75, 2.85], color="#333333", linewidth=1.4)
    arrow(axes, (6.05, 2.85), (6.3, 2.85))
    axes.text(6.05, 1.25, r"$\log\pi_{ref}$", ha="center", va="center", fontsize=9.5, bbox=dict(facecolor="white", edgecolor="none", pad=1))
    arrow(axes, (3.3, 3.05), (6.3, 3.05), r"$\log\pi_\theta$", 0, 0.14)
    back(axes, (7.1, 3.45), (2.58, 3.45), 3.8, "gradient")
    axes.text(4.0, 0.12, "The gold score is outside: training never sees it.", ha="center", va="center", fontsize=9.5)
    save(figure, REPO / "grpo_lm" / "figures" / "diagram.png")


def draw_rlhf():
    """Lesson 6: part 1 makes the reward model, part 2 trains the policy on it."""
    figure, axes = canvas(8, 4.0)
    box(axes, 0.1, 0.55, 1.45, 0.8, "pairs", "of preferences", "data")
    box(axes, 0.1, 2.45, 1.45, 0.8, "prompts", "data", "data")
    box(axes, 2.2, 2.45, 1.45, 0.8, "policy", "trained", "trained")
    box(axes, 4.3, 1.5, 1.55, 0.8, "SFT model", "frozen", "frozen")
    box(axes, 4.3, 0.55, 1.55, 0.8, "reward model", "part 1 trains it", "frozen")
    box(axes, 6.4, 2.45, 1.5, 0.8, "advantage", "return less baseline", "program")
    arrow(axes, (1.55, 0.95), (4.3, 0.95), "part 1: Eq. 1 or 2", 0, -0.14)
    arrow(axes, (1.55, 2.85), (2.2, 2.85), "ask", 0, 0.14)
    arrow(axes, (3.65, 2.65), (4.3, 2.1))
    arrow(axes, (3.2, 2.45), (4.3, 1.2), "answers", -0.28, 0)
    arrow(axes, (3.65, 2.95), (6.4, 2.95), r"$\log\pi$", 0, 0.14)
    arrow(axes, (5.85, 2.0), (6.5, 2.45), r"$\log\pi_{\mathrm{ref}}$", 0.5, -0.12)
    arrow(axes, (5.85, 0.95), (7.4, 2.45), "$r$", 0.16, -0.1)
    axes.text(4.0, 0.2, "The gold score is outside: training never sees it.", ha="center", va="center", fontsize=9.5)
    back(axes, (7.15, 3.25), (2.92, 3.25), 3.65, "gradient (Eq. 7)")
    save(figure, REPO / "reinforce_rlhf" / "figures" / "diagram.png")


def draw_paths():
    """Lesson 7: a program checks the answers; no reward model and no reference model."""
    figure, axes = canvas(8, 3.9)
    box(axes, 0.1, 1.45, 1.3, 0.8, "problems", "data", "data")
    box(axes, 2.1, 2.55, 1.5, 0.8, "policy", "trained", "trained")
    box(axes, 2.1, 1.45, 1.5, 0.8, "answers", "sampled paths", "data")
    box(axes, 2.1, 0.2, 1.5, 0.8, "checker", "program", "program")
    box(axes, 4.4, 2.0, 1.5, 0.8, "$p$, $P$, entropy", "of each token", "program")
    box(axes, 6.4, 1.45, 1.5, 0.8, "loss", "Eq. 4 or 5", "program")
    arrow(axes, (1.4, 2.1), (2.1, 2.8), "ask", -0.12, 0.12)
    arrow(axes, (2.85, 2.55), (2.85, 2.25), "sample", 0.42, 0)
    arrow(axes, (2.85, 1.45), (2.85, 1.0), "the number after ####", 0.95, 0)
    arrow(axes, (1.0, 1.45), (2.1, 0.6), "right number", -0.5, -0.12)
    arrow(axes, (3.6, 2.95), (4.4, 2.55), "logits", 0.12, 0.16)
    arrow(axes, (3.6, 1.9), (4.4, 2.2), "tokens", 0.1, -0.16)
    arrow(axes, (5.9, 2.4), (6.5, 2.25), "", 0, 0)
    arrow(axes, (3.6, 0.6), (6.6, 1.45), "reward 0 or 1", 0.25, -0.2)
    back(axes, (7.4, 2.25), (2.85, 3.35), 3.65, "gradient")
    save(figure, REPO / "kl_bernoulli_gsm8k" / "figures" / "diagram.png")


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    draw_map()
    draw_spo()
    draw_grpo()
    draw_rlhf()
    draw_paths()


if __name__ == "__main__":
    main()
