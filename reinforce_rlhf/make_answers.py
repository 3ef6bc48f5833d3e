"""Lets a policy and the SFT model answer prompts, and a reward model score pairs, to be judged.

    python make_answers.py --out answers.jsonl      the shipped policy and the SFT model, on the
                                                    held-out prompts; about 20 seconds
    python make_answers.py --pairs pairs.jsonl      the shipped reward model, on the held-out pairs

reinforce_rlhf_eval.py starts this script and judges what it writes: one JSON object per line.
An answer: model ("sft" or "trained"), prompt, text, reward (the reward model's score), length
(tokens), kl (Σ_t log π − log π_ref of the answer, nats), entropy (mean of −log π over its tokens,
nats), and grades (level 2: the probability of each). The answers to one prompt stand side by side,
and both models answer with the same random numbers. A pair: prompt, chosen, rejected, margin
(reward of the chosen less that of the rejected) and p (chance that the chosen one is better).

Shapes: P prompts of T tokens; G answers to each; B = P·G answers of at most L tokens; V vocabulary.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0"]
# ///
import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
# What a run's config.json must hold, each with a value of the right type
SETTINGS = dict(level=1, model="", reward_model="", max_length=128, max_new_tokens=64,
                temperature=1.0, repetition_penalty=1.0)


# ---- answers and pairs ------------------------------------------------------------------------

@torch.no_grad()
def answers_of(model, reference, tokenizer, judge, prompts, samples, config, seed):
    """The answers of one model as a list of rows (see above), `samples` to each prompt.

    judge: (reward model, its tokenizer); config: that of the run, a dictionary.
    """
    generator = torch.Generator().manual_seed(seed)
    temperature, penalty = config["temperature"], config["repetition_penalty"]
    share = max(1, 128 // samples)
    texts, lengths, kl, entropy = [], [], [], []
    for start in range(0, len(prompts), share):
        ids, mask = prompt_tokens(tokenizer, prompts[start:start + share])            # [P, T]
        completion_ids, completion_mask, logprobs = generate(
            model, ids, mask, samples, config["max_new_tokens"], temperature, penalty,
            end_tokens(model, tokenizer), generator)                                  # [B, L]
        batch = dict(prompt_ids=ids.repeat_interleave(samples, dim=0),                # [B, T]
                     prompt_mask=mask.repeat_interleave(samples, dim=0),
                     completion_ids=completion_ids, completion_mask=completion_mask)
        ref_logprobs = batch_logprobs(reference, batch, temperature, penalty, size=64)
        texts += answer_texts(tokenizer, completion_ids, completion_mask)
        lengths += completion_mask.sum(dim=1).tolist()
        kl += (logprobs - ref_logprobs).sum(dim=1).tolist()
        entropy += (-logprobs.sum(dim=1) / completion_mask.sum(dim=1)).tolist()
    asked = [prompt for prompt in prompts for _ in range(samples)]
    logits = reward_logits(*judge, asked, texts, config["max_length"])                # [B, 1 or 10]
    rewards = reward_from_logits(logits).tolist()
    grades = logits.softmax(dim=1).tolist() if logits.shape[1] == 10 else [None] * len(asked)
    names = ("prompt", "text", "reward", "length", "kl", "entropy", "grades")
    return [dict(zip(names, row))
            for row in zip(asked, texts, rewards, lengths, kl, entropy, grades)]


def pairs_of(judge, pairs, longest):
    """The pairs with margin and p (see above)."""
    prompts = [pair["prompt"] for pair in pairs]
    rows = [judged_tokens(judge[1], prompts, [pair[side] for pair in pairs], longest)
            for side in ("chosen", "rejected")]
    # Answers that are equal after the cut to --max-length say nothing about the reward model
    kept = [k for k in range(len(pairs)) if rows[0][k] != rows[1][k]]
    pairs, prompts = [pairs[k] for k in kept], [prompts[k] for k in kept]
    chosen, rejected = [reward_logits(*judge, prompts, [pair[side] for pair in pairs], longest)
                        for side in ("chosen", "rejected")]             # [N, 1 or 10]
    margin = (reward_from_logits(chosen) - reward_from_logits(rejected)).tolist()
    if chosen.shape[1] == 1:
        p = (chosen - rejected)[:, 0].sigmoid().tolist()
    else:                                             # of the cases in which the grades differ
        p = torch.sigmoid(pair_loss(rejected, chosen, 0.0) - pair_loss(chosen, rejected, 0.0))
        p = p.tolist()
    return [pair | dict(margin=m, p=chance) for pair, m, chance in zip(pairs, margin, p)]


# ---- the same code as in the trainers -----------------------------------------------------------

def as_messages(prompt):
    """A prompt as the messages of a chat; it may be one already."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_tokens(tokenizer, prompts):
    """Prompts as (ids [P, T], mask [P, T]), in the model's own chat format if it has one.

    Padded on the LEFT, so that all answers begin in the same column.
    """
    end = tokenizer.eos_token_id
    chats = [as_messages(prompt) for prompt in prompts]
    if tokenizer.chat_template:
        rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    else:
        texts = ["\n".join(message["content"] for message in chat) + "\n" for chat in chats]
        # Some tokenizers close each text with the end token; an answer would come after the end
        rows = [before_end(tokenizer(text)["input_ids"], end) for text in texts]
    # Any token can pad, also the end token. The mask comes from lengths, not from `ids != end`: the
    # end token also occurs as a real one
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=end, padding_side="left")
    mask = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(mask, batch_first=True, padding_side="left")


def answer_texts(tokenizer, completion_ids, completion_mask):
    """The B answers as text, for the reward model and the reader. The loss uses the ids [B, L]."""
    texts = []
    for ids, mask in zip(completion_ids.cpu(), completion_mask.cpu()):
        texts.append(tokenizer.decode(ids[mask > 0], skip_special_tokens=True).strip())
    return texts


def judged_tokens(tokenizer, prompts, answers, longest):
    """Prompt and answer as the reward model reads them: B lists of ids, each with one end token.

    The one encoder for training and for scoring, in the language model's own chat format.
    """
    chats = [as_messages(prompt) + [{"role": "assistant", "content": answer}]
             for prompt, answer in zip(prompts, answers)]
    if tokenizer.chat_template:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    else:
        texts = ["\n".join(message["content"] for message in chat) for chat in chats]
    rows = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    end = tokenizer.eos_token_id
    # What is too long loses the end of its answer, never the end token
    return [before_end(row, end)[:longest - 1] + [end] for row in rows]


def before_end(row, end):
    """The ids before the end token. A template may write up to two more tokens after it (a line
    break), or no end at all."""
    for back in (1, 2, 3):
        if len(row) >= back and row[-back] == end:
            return row[:-back]
    return row


def pad_right(rows, pad):
    """Lists of ids as (ids [B, L], mask [B, L])."""
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


def set_pooling(model, tokenizer):
    """Makes the classifier read the end token, which every text here has.

    A classifier computes its logits from ONE token, the last that is not padding, because only that
    one has seen the whole text. If padding and end are one token, it takes the end for padding.
    So another token becomes the padding. That it may occur inside a text does no harm.
    """
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    other = (end + 1) % model.config.vocab_size
    model.config.pad_token_id = other if pad in (None, end) else pad


@torch.no_grad()
def reward_logits(model, tokenizer, prompts, answers, longest, size=64):
    """The reward model's logits, [B, 1] (level 1) or [B, 10] (level 2), float32, on the CPU."""
    rows = judged_tokens(tokenizer, prompts, answers, longest)
    # Texts of similar length together: less padding
    order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
    logits = torch.empty(len(rows), model.config.num_labels)
    for start in range(0, len(order), size):
        part = order[start:start + size]
        ids, mask = pad_right([rows[k] for k in part], model.config.pad_token_id)     # [b, L]
        found = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
        logits[part] = found.logits.float().cpu()
    return logits


def reward_from_logits(logits):
    """The reward [B]: the logit itself [B, 1], or the expected grade 1 … 10 of [B, 10]."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    grades = torch.arange(1.0, 11.0, device=logits.device)              # [10]
    return logits.softmax(dim=1) @ grades                               # [B]


def pair_loss(chosen, rejected, center, inverted=False):
    """Eq. 1 or 2 for each pair [B]. chosen, rejected: logits, [B, 1] (level 1) or [B, 10]."""
    if chosen.shape[1] == 1:
        difference = (chosen - rejected)[:, 0]                          # [B]
        # Eq. 1  Only differences count, so nothing says where 0 is. The second term does; c is
        # small, so that the differences still decide
        drift = (chosen + rejected)[:, 0].square()                      # [B]
        return -torch.nn.functional.logsigmoid(difference) + center * drift           # [B]
    # Eq. 2  A table of log p_w(i) + log p_l(j). Below its diagonal, where i > j, the chosen answer
    # has the higher grade:
    #              j = 1  2  3
    #        i = 1     .  .  .        the loss is −log of the probability of all x together
    #            2     x  .  .
    #            3     x  x  .
    log_w = chosen.log_softmax(dim=1)[:, :, None]                       # [B, 10, 1]
    log_l = rejected.log_softmax(dim=1)[:, None, :]                     # [B, 1, 10]
    table = log_w + log_l                                               # [B, 10, 10]
    wanted = torch.ones(10, 10, device=table.device).tril(diagonal=-1) > 0            # [10, 10]
    if inverted:
        # BREAK: the REJECTED one is higher. With ten equal grades the loss is −log(45 / 100) = .80
        # either way, so that the first loss shows nothing
        wanted = wanted.T
    return -table.masked_fill(~wanted, -math.inf).flatten(1).logsumexp(dim=1)         # [B]


def end_tokens(model, tokenizer):
    """Ids that end an answer: a model may name several, and its chat format may use one more."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    ends = {tokenizer.eos_token_id, turn_end(tokenizer), *named} - {None}
    return sorted(end for end in ends if 0 <= end < model.config.vocab_size)


def penalise(logits, seen, penalty):
    """Repetition penalty of Eq. 3. logits [..., V]; seen [..., V]: is the token in the text?

    A positive logit is divided by the penalty, a negative one multiplied: both become less likely.
    """
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)               # [..., V]
    return torch.where(seen, lower, logits)


def seen_tokens(ids, mask, vocabulary):
    """Which tokens of the vocabulary occur in ids [P, T] where the mask is 1: [P, V]."""
    count = torch.zeros(len(ids), vocabulary, device=ids.device)        # [P, V]
    return count.scatter_add_(1, ids, mask.float()) > 0


def sample_tokens(logprobs, generator):
    """One token per row [S] from its log-probabilities [S, V].

    The probabilities of a row are laid end to end on a line of length 1, and a uniform random
    number falls into the piece of one token. torch.multinomial would need V random numbers per row.

        0 |--- cat .5 ---|- dog .3 -|- E .2 -| 1        uniform = .62 -> dog
    """
    line = logprobs.exp().cumsum(dim=-1)                                # [S, V]
    uniform = torch.rand(len(line), 1, generator=generator).to(line.device)         # [S, 1]
    # Rounding may end the line at .9999999 or 1.0000001: hence the factor
    token = torch.searchsorted(line, uniform * line[:, -1:], right=True)            # [S, 1]
    return token[:, 0].clamp(max=logprobs.shape[1] - 1)                 # [S]


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room for 16 more tokens. The library's own layer copies
    all of them for every new token: long answers take up to three times as long on a CPU."""
    box = None                                        # 2 × [S, heads, tokens + 16, D]

    def update(self, keys, values, *_, **__):
        end = self.keys.shape[2] + keys.shape[2]
        if self.box is None or len(self.box[0]) != len(keys) or self.box[0].shape[2] < end:
            self.box = [torch.nn.functional.pad(x, (0, 0, 0, 16)) for x in (self.keys, self.values)]
        for room, new in zip(self.box, (keys, values)):
            room[:, :, end - new.shape[2]:end] = new
        self.keys, self.values = [room[:, :, :end] for room in self.box]
        return self.keys, self.values


def read_once(model, prompt_ids, prompt_mask, which):
    """Reads each of P prompts once, for all B answers to them. Returns the model's output.

    prompt_ids, prompt_mask [P, T], padded on the left; which [B]: the number of each answer's
    prompt. The output has the logits [P, 1, V] of the answers' first token, and a cache: the
    model's memory of the tokens it has read, so that a further token costs one token.
    """
    # Positions count from the first real token: mask 0 0 1 1 1 -> positions 0 0 0 1 2
    positions = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)            # [P, T]
    start = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions,
                  use_cache=True, logits_to_keep=1)
    start.past_key_values.batch_select_indices(which)                   # P rows -> B rows
    return start


@torch.no_grad()
def generate(model, prompt_ids, prompt_mask, group_size, max_tokens, temperature, penalty, ends,
             generator):
    """G answers to each prompt, sampled from Eq. 3 and nothing else: no top-k, no top-p.

    prompt_ids, prompt_mask [P, T]; ends: the ids that end an answer.
    Returns completion_ids, completion_mask, logprobs [B, L], B = P·G. The mask is 1 up to and
    including the end token. logprobs are those of the distribution sampled from, 0 after the end.
    """
    device = prompt_ids.device
    which = torch.arange(len(prompt_ids), device=device).repeat_interleave(group_size)        # [B]
    start = read_once(model, prompt_ids, prompt_mask, which)
    cache = start.past_key_values
    for layer in cache.layers:        # room for the new tokens, far below
        layer.__class__ = RoomyLayer if type(layer) is DynamicLayer else type(layer)
    logits, B = start.logits[which, -1], len(which)                     # [B, V]
    mask = prompt_mask[which]                                           # [B, T], grows by 1 a step
    position = mask.sum(dim=1, keepdim=True) - 1                        # [B, 1]
    seen = seen_tokens(prompt_ids, prompt_mask, logits.shape[1])[which]               # [B, V]
    ends = torch.tensor(ends, device=device)
    completion_ids = ends[0].repeat(B, max_tokens)                      # [B, max_tokens]
    logprobs = torch.zeros(B, max_tokens, device=device)                # [B, max_tokens]
    # Finished answers leave the model's batch. Four answers after three steps; E ends an answer:
    #     answer 0   the cat sat
    #     answer 1   yes E
    #     answer 2   dogs run fast
    #     answer 3   E
    # rows = [0, 2] are still in the batch. Until it leaves, a finished answer goes on writing;
    # the mask removes what it writes after its E.
    rows = torch.arange(B, device=device)                               # [S]: answers in the batch
    finished = torch.zeros(B, dtype=torch.bool, device=device)          # [S]: have they ended?
    for t in range(max_tokens):
        # Eq. 3  π(y_t|…) = softmax(penalised logits / T)
        logits = penalise(logits.float(), seen, penalty) / temperature  # [S, V]
        logp = logits.log_softmax(dim=-1)                               # [S, V]
        token = sample_tokens(logp, generator)                          # [S]
        completion_ids[rows, t] = token
        logprobs[rows, t] = logp.gather(1, token[:, None])[:, 0]
        seen.scatter_(1, token[:, None], True)
        finished = finished | torch.isin(token, ends)
        if finished.all() or t == max_tokens - 1:
            break
        # Leaving copies the whole cache, so wait until a fifth of the answers has finished
        if (~finished).sum() < 0.8 * len(rows):
            stay = ~finished                                            # [S]
            rows, token, mask, position = rows[stay], token[stay], mask[stay], position[stay]
            finished, seen = finished[stay], seen[stay]
            cache.batch_select_indices(stay)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)    # [S, T + t + 1]
        position = position + 1
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                       past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    # How many ends stand BEFORE each token?   yes E x E -> 0 0 1 1 -> mask 1 1 0 0
    is_end = torch.isin(completion_ids, ends)                           # [B, max_tokens]
    ends_before = is_end.cumsum(dim=1) - is_end.long()                  # [B, max_tokens]
    completion_mask = (ends_before == 0).float()
    L = int(completion_mask.sum(dim=1).max())
    completion_ids = completion_ids.masked_fill(completion_mask == 0, ends[0])
    return completion_ids[:, :L], completion_mask[:, :L], (logprobs * completion_mask)[:, :L]


def completion_logprobs(model, batch, temperature, penalty):
    """log π(y_t | prompt, y_<t) of every token of the answers [B, L], nats; 0 where the mask is 0.

    Prompts are padded on the left, answers on the right. A model's logits at one place predict the
    NEXT token, so the logits for an answer begin one place before it, and those at its last token
    are not used:

        ids              pad  pad  What  is   it   | A    cat  E            T = 5, L = 3
        logits used at                        it     A    cat
        they predict                          A      cat  E
    """
    prompts = torch.stack([batch["prompt_ids"], batch["prompt_mask"]], dim=1)         # [B, 2, T]
    # The P different prompts, each to be read once, and the number of each answer's prompt
    prompts, which = prompts.unique(dim=0, return_inverse=True)         # [P, 2, T], [B]
    start = read_once(model, *prompts.unbind(dim=1), which)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"].long()], dim=1)  # [B, T + L]
    T = batch["prompt_ids"].shape[1]
    positions = (mask.cumsum(dim=1) - 1)[:, T:]                         # [B, L]
    rest = model(input_ids=batch["completion_ids"], attention_mask=mask, position_ids=positions,
                 past_key_values=start.past_key_values, use_cache=True)
    logits = torch.cat([start.logits[which], rest.logits[:, :-1]], dim=1)             # [B, L, V]
    logits = logits.float()
    if penalty != 1:                  # at place t the sampler had seen the prompt and y_<t
        seen = torch.zeros_like(logits, dtype=torch.bool)               # [B, L, V]
        vocabulary = logits.shape[2]
        seen[:, 0] = seen_tokens(batch["prompt_ids"], batch["prompt_mask"], vocabulary)
        before = batch["completion_ids"][:, :-1, None]                  # [B, L − 1, 1]
        seen[:, 1:].scatter_(2, before, True)
        # cummax: a token that was seen stays seen at all later places
        logits = penalise(logits, seen.cummax(dim=1).values, penalty)
    logits = logits / temperature                                       # Eq. 3, as in sampling
    chosen = logits.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)        # [B, L]
    return (chosen - logits.logsumexp(dim=-1)) * batch["completion_mask"]             # [B, L]


def parts_by_length(batch, size):
    """Cuts a batch into parts of at most `size` answers: yields (row numbers, part).

    Answers of similar length come together, and columns that are padding in all of them are left
    out, so that short answers do not pay for long ones.
    """
    for rows in batch["completion_mask"].sum(dim=1).argsort(stable=True).split(size):
        part = {name: values[rows] for name, values in batch.items()}
        T = int(part["prompt_mask"].sum(dim=1).max())
        L = max(1, int(part["completion_mask"].sum(dim=1).max()))
        for name, values in part.items():
            if name.startswith("prompt_"):
                part[name] = values[:, -T:]                             # padded on the left
            elif values.dim() == 2:
                part[name] = values[:, :L]                              # padded on the right
        yield rows, part


@torch.no_grad()
def batch_logprobs(model, batch, temperature, penalty, size):
    """completion_logprobs of a whole batch [B, L], part by part, without gradient."""
    result = torch.zeros_like(batch["completion_mask"])
    for rows, part in parts_by_length(batch, size):
        logprobs = completion_logprobs(model, part, temperature, penalty)
        result[rows, :logprobs.shape[1]] = logprobs
    return result


def load_model(kind, name):
    """(model, tokenizer) from a path or a hub name; "random": tiny and untrained, for --smoke."""
    if str(name) == "random":
        return random_model(kind)
    try:
        # fp32 master weights everywhere; on CUDA, Accelerate does the arithmetic in bf16
        model, report = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as problem:      # the libraries raise a dozen kinds; the remedy is one
        fail(f"model {name} cannot be loaded ({' '.join(str(problem).split())[:150]}): give the "
             f"directory or hub name of a whole {kind.__name__} (no adapter, no encoder-decoder)")
    # The library fills weights that a file lacks with random numbers, and drops those too many
    if any(report.values()):
        fail(f"model {name} is no whole {type(model).__name__}: {str(report)[:250]}")
    return model, tokenizer


def turn_end(tokenizer):
    """The special token that the chat format writes after an answer; None without one."""
    chat = [dict(role="user", content="Hi."), dict(role="assistant", content="ANSWER")]
    text = tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else "Hi."
    if "Hi." not in text:
        raise ValueError("its chat format loses what the user says")
    after = text.partition("ANSWER")[2].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def random_model(kind):
    """A GPT-2 of one layer that reads bytes, for --smoke: it runs wherever the script stands."""
    tokenizer = transformers.ByT5Tokenizer()          # a token per byte: it needs no file
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, num_labels=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return kind.from_config(config), tokenizer


def newest_run(needed):
    """The newest directory in runs/ with a file of that name; runs of --smoke do not count."""
    found = [path for path in HERE.glob(f"runs/*/{needed}") if "_smoke" not in path.parent.name]
    if not found:
        fail(f"latest: no run in {HERE / 'runs'} has a {needed} yet")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


# ---- loading and the command line ---------------------------------------------------------------

def find_policy(weights):
    """(directory of a policy, configuration of its run) for a policy, a run, "latest", "random"."""
    if weights == "random":
        return "random", SETTINGS | dict(model="random", reward_model="random", max_new_tokens=8)
    path = newest_run("policy") if weights == "latest" else Path(weights)
    path = path / "policy" if (path / "policy").is_dir() else path
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf8"))
        assert all(type(config[name]) is type(value) for name, value in SETTINGS.items())
        return path, config
    except Exception:                 # Python raises many kinds; the remedy is one
        fail(f"{weights} is no policy or run of train_reinforce_rlhf.py: in {path.parent} "
             "config.json is missing or damaged; omit --weights for the shipped policy")


def find_reward_model(path, config):
    """The reward model of the run that a policy belongs to: named, its own, or the shipped one."""
    own = path.parent / "reward_model_run" / "reward_model"
    shipped = HERE / "weights" / f"reward_model_level{config['level']}"
    return Path(config["reward_model"] or (own if own.is_dir() else shipped))


def find_data(*reward_models):
    """The held-out data beside the first reward model that has some, in its run; else the lesson's,
    on which the shipped ones were trained."""
    for reward_model in reward_models:
        if (reward_model.parent / "data" / "held_out.jsonl").exists():
            return reward_model.parent / "data"
    return HERE / "data"


def length_of(reward_model, default):
    """--max-length of the run that a reward model belongs to."""
    try:
        stored = json.loads((reward_model.parent / "config.json").read_text(encoding="utf8"))
        return int(stored["max_length"])
    except (OSError, ValueError, KeyError, TypeError):
        return default


def load_judge(name):
    """(reward model, its tokenizer)."""
    model, tokenizer = load_model(AutoModelForSequenceClassification, name)
    if model.config.num_labels not in (1, 10):
        fail(f"{name} has {model.config.num_labels} logits; a reward model has 1 (level 1) or 10 "
             "(level 2)")
    set_pooling(model, tokenizer)
    return model.eval(), tokenizer


def read_rows(data, name):
    """The lines of a file of held-out data."""
    path = data / f"{name}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError):
        fail(f"{path} is missing or damaged; train the reward model again")


def held_out_prompts(data, config, tokenizer, given=None):
    """The held-out prompts, or the one that was given, that leave room for an answer."""
    if config["model"] == "random":
        return ["What is sleep?", "Describe gravity."]
    longest = config["max_length"] - config["max_new_tokens"]
    prompts = [given] if given else read_rows(data, "prompts_held_out")
    lengths = [prompt_tokens(tokenizer, [prompt])[0].shape[1] for prompt in prompts]
    kept = [prompt for prompt, length in zip(prompts, lengths) if length <= longest]
    if not kept:
        fail(f"no prompt has at most {longest} tokens, so no answer would fit")
    return kept


def save_rows(path, rows):
    try:
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as problem:
        fail(f"{path} cannot be written ({problem.strerror}); choose another file")


def text(given):
    """A flag's text. Half a character (a lone surrogate) is none: argparse refuses it."""
    return given.encode().decode()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    add = parser.add_argument
    add("--weights", default=str(HERE / "weights" / "policy_level1"),
        metavar="PATH|DIR|latest|random", help="whose policy (default: the shipped one)")
    add("--level", type=int, choices=(1, 2), help="score with the shipped reward model of a level")
    add("--reward-model", metavar="DIR", help="score with this one (default: the run's)")
    add("--out", type=Path, metavar="FILE", help="where the answers go")
    add("--pairs", type=Path, metavar="FILE", help="where the scores of the held-out pairs go")
    add("--prompt", type=text, metavar="TEXT", help="answer this prompt only")
    add("--samples", type=int, default=4, help="answers per prompt (default 4)")
    add("--seed", type=int, default=0, help="of the answers (default 0)")
    add("--smoke", action="store_true", help="answers of a random tiny model")
    args = parser.parse_args()
    if args.samples < 1:
        fail(f"--samples must be at least 1, not {args.samples}")
    if not (args.out or args.pairs or args.smoke):
        fail("say where the answers go with --out FILE, or the scores of pairs with --pairs FILE")
    return args


def main():
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)                              # random models are the same each time
    path, config = find_policy("random" if args.smoke else args.weights)
    own = Path("random") if path == "random" else find_reward_model(path, config)
    shipped = HERE / "weights" / f"reward_model_level{args.level}"
    chosen = Path(args.reward_model or (shipped if args.level else own))
    data = find_data(own, chosen)
    judge = load_judge(chosen)
    if args.out or args.smoke:
        policy, tokenizer = load_model(AutoModelForCausalLM, path)
        start = Path(config["model"] or HERE / "weights" / "sft")
        own = start.resolve() == HERE / "weights" / "sft"     # a model of the shipped world
        reference, _ = load_model(AutoModelForCausalLM, start)
        prompts = held_out_prompts(data, config, tokenizer, args.prompt)
        rows = []
        for name, model in (("sft", reference.eval()), ("trained", policy.eval())):
            answers = answers_of(model, reference, tokenizer, judge, prompts, args.samples, config,
                                 args.seed)
            rows += [dict(model=name, world=own) | row for row in answers]
        if args.out:
            save_rows(args.out, rows)
    if args.pairs:
        longest = length_of(chosen, config["max_length"])
        save_rows(args.pairs, pairs_of(judge, read_rows(data, "held_out"), longest))


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
