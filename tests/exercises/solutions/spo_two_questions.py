"""Lesson 4, extend: two questions at once. What is not here stays as it is in the trainer."""
SMALL_PROMPT = "Guess a number from 1 to 10. Answer with the number only."
SMALL_TARGET = 4


@dataclass
class Question(Config):
    """One question with its own target. All else is as the flags say."""
    prompt: str = PROMPT


def prompt_tokens(tokenizer, prompt=PROMPT):
    """[1, T] a question in the model's own chat format, up to where its answer begins."""
    chat = [{"role": "user", "content": prompt}]
    row = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return torch.tensor([row])


@torch.no_grad()
def enumerate_answers(model, tokenizer, prompt=PROMPT):
    """log π [100] of the answers "1" … "100" to a question: once per question."""
    prompt_ids = prompt_tokens(tokenizer, prompt).to(model.device)
    answers, numbers = [], []                         # S spellings; of which number each is, 0-99
    for number, text in enumerate(NUMBERS):
        for ids in spellings(tokenizer, text):
            answers.append((*ids, end_token(tokenizer)))
            numbers.append(number)
    ids, mask = pad(answers, end_token(tokenizer))                      # [S, L]
    ids, mask, numbers = [x.to(model.device) for x in (ids, mask, torch.tensor(numbers))]
    parts = []
    for some in torch.arange(len(ids)).split(50):     # a large model's logits need much memory
        parts.append(completion_logprobs(model, prompt_ids, ids[some], mask[some]))
    logprobs = torch.cat(parts)                                         # [S]
    return torch.stack([logprobs[numbers == k].logsumexp(dim=0) for k in range(100)])


def own_answers(model, tokenizer, count, generator, prompt=PROMPT):
    """`count` answers of a model to a question."""
    prompt_ids = prompt_tokens(tokenizer, prompt).to(model.device)      # [1, T]
    return generate(model, prompt_ids, count, end_token(tokenizer), generator)


def behave(question, model, tokenizer, count, rng, generator, replay):
    """`count` answers (tuples of token ids) from the behaviour policy. replay: of this question."""
    if question.behaviour == "on-policy":
        return own_answers(model, tokenizer, count, generator, question.prompt)
    if question.behaviour == "uniform":
        return answer_tokens(tokenizer, some_invalid(uniform(count, rng), question, rng))
    if question.behaviour == "adversarial":
        texts = adversarial(count, question.target, rng)
        return answer_tokens(tokenizer, some_invalid(texts, question, rng))
    if not replay or rng.random() < 0.25:
        replay.extend(own_answers(model, tokenizer, count, generator, question.prompt))
    own = rng.binomial(count, 0.5)
    texts = some_invalid(uniform(count - own, rng), question, rng)
    old = [replay[k] for k in rng.integers(0, len(replay), own)]
    return answer_tokens(tokenizer, texts) + old


def sampled_rewards(question, model, tokenizer, generator, log):
    """Rewards [--q0-samples] of answers sampled from a model, float64."""
    answers = own_answers(model, tokenizer, question.q0_samples, generator, question.prompt)
    texts = [answer_text(tokenizer, answer) for answer in answers]
    rewards = [reward_of(text, question.target) for text in texts]
    show_samples(log, texts, rewards)
    return torch.tensor(rewards, dtype=torch.float64)


def collect(question, accelerator, model, reference, tokenizer, rng, generator, replay, known):
    """This process's answers to one question for one step. known: of this question."""
    share = question.batch_size // accelerator.num_processes
    answers = behave(question, model, tokenizer, share, rng, generator, replay)
    different = list(dict.fromkeys(answers))                            # D
    place = {answer: k for k, answer in enumerate(different)}
    texts = [answer_text(tokenizer, answer) for answer in different]
    completion_ids, completion_mask = pad(different, end_token(tokenizer))          # [D, L]
    batch = dict(prompt_ids=prompt_tokens(tokenizer, question.prompt),              # [1, T]
                 completion_ids=completion_ids, completion_mask=completion_mask,
                 rewards=torch.tensor([reward_of(text, question.target) for text in texts]),   # [D]
                 which=torch.tensor([place[answer] for answer in answers]))           # [B]
    batch = {name: values.to(model.device) for name, values in batch.items()}
    batch["ref_logprobs"] = ref_logprobs_of(reference, batch, different, known)
    if question.broken:
        batch = sabotage(batch, question, reference, tokenizer)         # BREAK
    return batch, [texts[place[answer]] for answer in answers]


def train_epoch(questions, accelerator, policy, reference, tokenizer, ref_logprobs, optimizer, q0s,
                replays, epoch, log, bar):
    """One epoch. questions, ref_logprobs, q0s and replays: lists with one entry per question.

    Returns the row of metrics.csv: that of PROMPT, and tv_10 and q0_10 of SMALL_PROMPT.
    """
    model, config = accelerator.unwrap_model(policy), questions[0]
    rng = np.random.default_rng([config.seed, epoch, accelerator.process_index])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    if config.q0 != "learned":                        # Eq. 4 is about one question: one Q0 for each
        for question, ref, q0 in zip(questions, ref_logprobs, q0s):
            before = q0.item()
            with accelerator.autocast():
                q0.data.fill_(estimate_q0(question, model, reference, tokenizer, ref, generator,
                                          log))
            show_q0(log, epoch, q0.item(), before)

    steps = config.samples // config.batch_size
    known = [{} for _ in questions]                   # an answer is not equally likely to both
    history = []                                      # loss and mean reward of each step
    progress = tqdm(range(steps), disable=not bar, unit="step", leave=False)
    for step in progress:
        done = ((epoch - 1) * steps + step) / (config.epochs * steps)   # share of the run, 0-1
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"] * lr_factor(config.lr_schedule, done)
        k = step % len(questions)                     # the questions take turns
        with accelerator.autocast():
            batch, texts = collect(questions[k], accelerator, model, reference, tokenizer, rng,
                                   generator, replays[k], known[k])
        loss, q_terminal = update(config, accelerator, policy, optimizer, q0s[k], batch)
        rewards = batch["rewards"][batch["which"]]                      # [B]
        history.append([loss, rewards.mean().item()])
        show_step(log, progress, epoch, step, texts, rewards, q0s[k].item(), q_terminal, loss)

    with accelerator.autocast():
        judged = [evaluate(enumerate_answers(model, tokenizer, question.prompt), ref,
                           question.target, question.beta)
                  for question, ref in zip(questions, ref_logprobs)]
    means = torch.tensor(history, device=accelerator.device).mean(dim=0)              # [2]
    loss, reward = accelerator.reduce(means, "mean").tolist()           # reward of what was taken
    row = dict(epoch=epoch, loss=loss, reward=reward, q0_used=q0s[0].item()) | judged[0]
    return row | dict(tv_10=judged[1]["tv"], q0_10=q0s[1].item())


def train(config, out, accelerator, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Writes into the directory `out`.

    Returns (policy, tokenizer, figures for train.json).
    """
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config)
    reference = copy.deepcopy(policy).requires_grad_(False).eval().to(accelerator.device)
    flags = asdict(config)
    questions = [Question(**flags),
                 Question(**flags | dict(prompt=SMALL_PROMPT, target=SMALL_TARGET))]
    q0s = [torch.nn.Parameter(torch.zeros((), device=accelerator.device),
                              requires_grad=config.q0 == "learned") for _ in questions]
    optimizer = torch.optim.Adam([dict(params=policy.parameters(), highest_lr=config.lr),
                                  dict(params=q0s, highest_lr=0.01)], betas=(0.9, 0.95))
    state = load_checkpoint(out, policy, optimizer, accelerator.num_processes)
    for q0, start in zip(q0s, state.get("q0s", [state["q0"]] * len(questions))):
        q0.data.fill_(start)
    replays = state["replays"][accelerator.process_index] or [[] for _ in questions]
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model = accelerator.unwrap_model(policy)
    with accelerator.autocast():
        ref_logprobs = [enumerate_answers(reference, tokenizer, question.prompt)
                        for question in questions]                      # [100] each
    log(HEADINGS)
    for epoch in range(state["epoch"] + 1, config.epochs + 1):
        if config.patience and epochs_without_gain(state["rows"]) >= config.patience:
            log(f"stopped early: no better distance for {config.patience} epochs")
            break
        start = time.perf_counter()
        row = train_epoch(questions, accelerator, policy, reference, tokenizer, ref_logprobs,
                          optimizer, q0s, replays, epoch, log, bar)
        state |= dict(epoch=epoch, q0s=[q0.item() for q0 in q0s], replays=gather_object([replays]))
        state["rows"].append(row)
        state["clock"].append(dict(epoch=epoch, seconds=time.perf_counter() - start))
        log(table_line(row | state["clock"][-1], left=config.epochs - epoch))
        log(f"    TV to π*: {row['tv']:.4f} up to 100, {row['tv_10']:.4f} up to 10")
        show_predictions(log, config, model, tokenizer, state["rows"])
        if accelerator.is_main_process:
            save_checkpoint(out, model, optimizer, state)
    steps = state["epoch"] * (config.samples // config.batch_size)
    seconds = sum(row["seconds"] for row in state["clock"])
    return model, tokenizer, dict(epochs=state["epoch"], answers=steps * config.batch_size,
                                  train_seconds=seconds)
