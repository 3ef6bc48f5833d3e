"""Lesson 2, extend: connect four. What is not here stays as it is in the trainer.

TicTacToeEnv, minimax and the proof stay in the file for 3 × 3 boards; nothing calls them any more.
"""


HEIGHT = 6
WIDTH = 7


def lines_of_four():
    """All fours in a row: from each square to the right, down, and down along both diagonals."""
    lines = []
    for row in range(HEIGHT):
        for column in range(WIDTH):
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                # The last of the four must lie on the board, or the line would go on at its other edge
                if row + 3 * down < HEIGHT and 0 <= column + 3 * right < WIDTH:
                    first, step = WIDTH * row + column, WIDTH * down + right
                    lines.append([first + k * step for k in range(4)])
    return torch.tensor(lines)


LINES = lines_of_four()                                                 # [69, 4]


def has_line(boards):
    """Whether the +1 stones fill a line. boards [n, 42] -> [n] bool."""
    stones = boards[:, LINES].sum(dim=-1)                               # [n, 69] per line
    return (stones == 4).any(dim=-1)                                    # [n]


def make_agent(hidden):
    """Two networks on 84 inputs [n, 84]: "actor" -> logits [n, 7], "critic" -> value [n, 1]."""
    def network(outputs):
        return nn.Sequential(nn.Linear(2 * HEIGHT * WIDTH, hidden), nn.ReLU(),
                             nn.Linear(hidden, hidden), nn.ReLU(),
                             nn.Linear(hidden, outputs))
    return nn.ModuleDict(dict(actor=network(WIDTH), critic=network(1)))


def legal_logits(actor, boards):
    """[n, 7] logits with −inf on full columns: those with a stone in the top row (Eq. 1)."""
    return actor(encode(boards)).masked_fill(boards[:, :WIDTH] != 0, -math.inf)


SQUARES = torch.arange(HEIGHT * WIDTH).view(HEIGHT, WIDTH)
# Stones fall down, so a board cannot be turned: it has two views, as it is and mirrored. The first
# row of a view holds the squares 0-6, which are also the numbers of its columns
VIEWS = torch.stack([SQUARES.reshape(-1), SQUARES.flip(1).reshape(-1)])    # [2, 42]


@torch.no_grad()      # acting needs no gradient: update() computes log π with one
def choose_moves(actor, boards, views, blunders, generator):
    """One sampled move per board [n, 42]. Returns (seen [n, 42], actions [n], columns [n])."""
    n = len(boards)
    view = VIEWS[torch.randint(min(views, len(VIEWS)), (n,), generator=generator)]    # [n, 42]
    seen = boards.gather(1, view)                                       # [n, 42]
    logits = legal_logits(actor, seen)                                  # [n, 7]
    if blunders > 0:
        blunder = torch.rand(n, generator=generator) < blunders         # [n]
        uniform = torch.zeros_like(logits).masked_fill(logits == -math.inf, -math.inf)
        logits = torch.where(blunder[:, None], uniform, logits)         # [n, 7]
    actions = sample(logits, generator)                                 # [n]
    columns = view.gather(1, actions[:, None]).squeeze(1)               # [n]
    return seen, actions, columns


def make_moves(boards, games, columns):
    """Drops one stone in each of some games; boards [B, 42] changes in place.

    games [n] are their numbers, columns [n] the moves. Returns (won by this move, over), [n] each.
    """
    before, columns = boards[games], columns[:, None]                   # [n, 42], [n, 1]
    heights = (before.unflatten(1, (HEIGHT, WIDTH)) != 0).sum(dim=1)    # [n, 7] stones per column
    rows = HEIGHT - 1 - heights.gather(1, columns)                      # [n, 1] row 0 is the top
    moved = before.scatter(1, WIDTH * rows + columns, 1)                # [n, 42]
    won = has_line(moved)                                               # [n]
    full = (moved != 0).all(dim=-1)                                     # [n]
    boards[games] = -moved            # from now on the other player's side
    return won, won | full


def random_positions(games, generator):
    """The positions [P, 42] through which games with random moves pass, while they go on."""
    boards = torch.zeros(games, HEIGHT * WIDTH, dtype=torch.int8)
    alive = torch.arange(games)                                         # numbers of games
    found = []
    while len(alive):
        found.append(boards[alive])
        logits = torch.zeros(len(alive), WIDTH).masked_fill(boards[alive, :WIDTH] != 0, -math.inf)
        _, over = make_moves(boards, alive, sample(logits, generator))
        alive = alive[~over]
    return torch.cat(found)


def examine(agent, state):
    """Plays against random moves, 500 games on each side, and keeps the weights if they lose least
    so far. Returns figures. The generator of its own leaves training as it is."""
    starts = torch.zeros(1000, HEIGHT * WIDTH, dtype=torch.int8)
    batch = play_games(agent["actor"], agent["actor"], starts, Config(opponent_random=1.0),
                       torch.Generator().manual_seed(0))
    outcomes = torch.zeros(1000)
    outcomes[batch["games"]] = batch["outcomes"]      # one per game
    first, second = outcomes[:500], outcomes[500:]
    row = dict(first_won=(first == 1).sum().item(), second_won=(second == 1).sum().item(),
               first_lost=(first == -1).sum().item(), second_lost=(second == -1).sum().item())
    lost = row["first_lost"] + row["second_lost"]
    if state["best"] is None or lost <= state["best_faults"]:
        state["best"] = copy.deepcopy(agent.state_dict())
        state["best_faults"] = lost
    return row


def train(config, out, log=print, bar=False):
    """Trains for config.updates. Writes into the directory `out`. Returns figures for train.json.

    The weights kept as best.pt are those that lost least against random moves.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    agent = make_agent(config.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, fused=True)
    # Too many positions for a list and a proof: random games give the starts
    positions = random_positions(1000, generator)                       # [P, 42]
    pool = [copy.deepcopy(agent["actor"])]
    state = dict(update=0, best=None, best_faults=None, rows=[], clock=[])
    log(HEADINGS)
    try:
        state["rows"].append(dict(update=0) | examine(agent, state))    # untrained
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
                row |= examine(agent, state)
            state["update"] = number
            state["rows"].append(row)
            state["clock"].append(dict(update=number, seconds=learnt - start,
                                       proof_seconds=time.perf_counter() - learnt))
            if number % 100 == 0 or number == config.updates:
                log(table_line(row | state["clock"][-1], left=config.updates - number))
    finally:                          # after Ctrl-C or an error too: the best weights so far stay
        save_run(out, agent, state)
    return describe(state)


COLUMNS = (("update", "update", "d"), ("outcome", "outcome", ".3f"), ("entropy", "entropy", ".3f"),
           ("critic_loss", "critic", ".3f"), ("grad_norm", "gradient", ".2f"),
           ("first_won", "won 1st", "d"), ("second_won", "won 2nd", "d"),
           ("first_lost", "lost 1st", "d"), ("second_lost", "lost 2nd", "d"),
           ("seconds", "seconds", ".3f"), ("left", "left", "s"))


def start_judge(out, args):
    """The eval script knows only the 3 × 3 board."""
    print("won and lost: of 500 games against random moves, as first and as second player")
