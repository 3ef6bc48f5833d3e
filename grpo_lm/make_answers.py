"""Lets a policy and the model it came from answer prompts, for grpo_eval.py to judge; or chats.

    python make_answers.py --out answers.jsonl      the shipped policy and its base, on the held-out
                                                    prompts; about 15 seconds
    python make_answers.py --chat                   ask the policy yourself

Each line of the file is an answer: model ("base" or "trained"), prompt, text, reward (the reward
model's score), length (tokens) and kl (Σ_t log π − log π_ref of the answer, nats). The answers to
one prompt stand side by side, and both models answer with the same random numbers.

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
SETTINGS = dict(model="random", reward_input="auto", prompt="What is sleep?", prompts="",
                max_new_tokens=8, temperature=1.0)


# ---- answers --------------------------------------------------------------------------------

@torch.no_grad()
def answers_of(model, reference, tokenizer, judge, prompts, samples, config, seed):
    """The answers of one model as a list of rows (see above), `samples` to each prompt.

    judge: (reward model, its tokenizer); config: that of the run, a dictionary.
    """
    generator = torch.Generator().manual_seed(seed)
    texts, lengths, kl = [], [], []
    for start in range(0, len(prompts), 16):
        ids, mask = prompt_tokens(tokenizer, prompts[start:start + 16])               # [P, T]
        completion_ids, completion_mask, logprobs = generate(
            model, ids, mask, samples, config["max_new_tokens"], config["temperature"],
            end_tokens(model, tokenizer), generator)                                  # [B, L]
        batch = dict(prompt_ids=ids.repeat_interleave(samples, dim=0),                # [B, T]
                     prompt_mask=mask.repeat_interleave(samples, dim=0),
                     completion_ids=completion_ids, completion_mask=completion_mask)
        ref_logprobs = batch_logprobs(reference, batch, config["temperature"], size=64)        # [B, L]
        texts += answer_texts(tokenizer, completion_ids, completion_mask)
        lengths += completion_mask.sum(dim=1).tolist()
        kl += (logprobs - ref_logprobs).sum(dim=1).tolist()
    asked = [prompt for prompt in prompts for _ in range(samples)]
    rewards = reward_scores(*judge, asked, texts, config["reward_input"]).tolist()
    names = ("prompt", "text", "reward", "length", "kl")
    return [dict(zip(names, row)) for row in zip(asked, texts, rewards, lengths, kl)]


def chat(model, tokenizer, config, args):
    """Answers what is typed until an empty line.

    Here the library's own sampler may leave out unlikely tokens (top-k, top-p). In training that
    would be a fault: the policy that samples would be another one than the policy that is scored.
    """
    torch.manual_seed(args.seed)
    print("Type a prompt; an empty line ends. The shipped model knows 26 topics, see world.json.",
          flush=True)
    for line in sys.stdin:
        if not line.strip():
            return
        ids, mask = prompt_tokens(tokenizer, [line.strip()])                          # [1, T]
        if not fits(model, ids, config):
            print("That is too long for the model's context.", flush=True)
            continue
        answer = model.generate(input_ids=ids, attention_mask=mask, do_sample=True,
                                max_new_tokens=config["max_new_tokens"], top_k=args.top_k,
                                top_p=args.top_p, temperature=args.temperature,
                                eos_token_id=end_tokens(model, tokenizer),
                                pad_token_id=tokenizer.eos_token_id)                  # [1, T + L]
        text = tokenizer.decode(answer[0, ids.shape[1]:], skip_special_tokens=True)
        print(text.strip(), flush=True)


# ---- the same code as in train_grpo.py ----------------------------------------------------------

def prompt_tokens(tokenizer, prompts):
    """Prompts as (ids [P, T], mask [P, T]), in the model's own chat format if it has one.

    Padded on the LEFT, so that all answers begin in the same column.
    """
    end = tokenizer.eos_token_id
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    else:
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        # Some tokenizers close each text with the end token; an answer would come after the end
        rows = [row[:-1] if row[-1:] == [end] else row for row in rows]
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


@torch.no_grad()
def reward_scores(model, tokenizer, prompts, answers, kind, size=64):
    """One reward per answer [B], float32: the single logit of the reward model, any real number.

    kind: "pair" (prompt and answer as two texts), "chat" (the tokenizer's template), "text" (prompt
    and answer as one text). It must be what the reward model was trained on; "auto" guesses.
    size: answers per forward pass. What exceeds the reward model's context is cut off.
    """
    if kind == "auto":
        kind = guess_reward_input(tokenizer)
    longest = min(tokenizer.model_max_length, context_of(model))
    # Answers of similar length together: less padding
    order = sorted(range(len(answers)), key=lambda k: len(answers[k]))
    scores = torch.empty(len(answers))
    for start in range(0, len(order), size):
        part = order[start:start + size]
        asked = [prompts[k] for k in part]
        said = [answers[k] for k in part]
        if kind == "pair":
            texts = [asked, said]
        elif kind == "chat":
            chats = [[{"role": "user", "content": question},
                      {"role": "assistant", "content": answer}]
                     for question, answer in zip(asked, said)]
            texts = [tokenizer.apply_chat_template(chats, tokenize=False)]
        else:
            texts = [[f"{question} {answer}" for question, answer in zip(asked, said)]]
        tokens = tokenizer(*texts, add_special_tokens=kind != "chat", padding=True, truncation=True,
                           max_length=longest, return_tensors="pt").to(model.device)
        scores[part] = model(**tokens).logits[:, 0].float().cpu()       # back in the old order
    return scores


def end_tokens(model, tokenizer):
    """Ids that end an answer: a model may name several, and its chat format may use one more."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    ends = {tokenizer.eos_token_id, turn_end(tokenizer), *named} - {None}
    return sorted(end for end in ends if 0 <= end < model.config.vocab_size)


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


def guess_reward_input(tokenizer):
    """A tokenizer that separates two texts usually belongs to a model that was trained on pairs."""
    if tokenizer.chat_template:
        return "chat"
    added = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
    return "pair" if tokenizer.sep_token and added[1] > added[0] else "text"


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
def generate(model, prompt_ids, prompt_mask, group_size, max_tokens, temperature, ends, generator):
    """G answers to each prompt, sampled from softmax(logits / temperature): no top-k, no top-p.

    (model.generate() of transformers adds top-k 50, and what the model's files ask for.)
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
        logp = (logits.float() / temperature).log_softmax(dim=-1)       # [S, V]
        token = sample_tokens(logp, generator)                          # [S]
        completion_ids[rows, t] = token
        logprobs[rows, t] = logp.gather(1, token[:, None])[:, 0]
        finished = finished | torch.isin(token, ends)
        if finished.all() or t == max_tokens - 1:
            break
        # Leaving copies the whole cache, so wait until a fifth of the answers has finished
        if (~finished).sum() < 0.8 * len(rows):
            stay = ~finished                                            # [S]
            rows, token, mask, position = rows[stay], token[stay], mask[stay], position[stay]
            finished = finished[stay]
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


def completion_logprobs(model, batch, temperature):
    """log π(y_t | prompt, y_<t) of every token of the answers [B, L], nats; 0 where the mask is 0.

    generate() has computed the same numbers, but without a gradient. Prompts are padded on the
    left, answers on the right. A model's logits at one place predict the NEXT token, so the logits
    for an answer begin one place before it, and those at its last token are not used:

        ids              pad  pad  What  is   it   | a    cat  E            T = 5, L = 3
        logits used at                        it     a    cat
        they predict                          a      cat  E
    """
    prompts = torch.stack([batch["prompt_ids"], batch["prompt_mask"]], dim=1)         # [B, 2, T]
    # The P different prompts, each to be read once, and the number of each answer's prompt
    prompts, which = prompts.unique(dim=0, return_inverse=True)         # [P, 2, T], [B]
    start = read_once(model, *prompts.unbind(dim=1), which)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"].long()], dim=1)  # [B, T + L]
    T = batch["prompt_ids"].shape[1]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, T:]            # [B, L], as in read_once
    rest = model(input_ids=batch["completion_ids"], attention_mask=mask, position_ids=positions,
                 past_key_values=start.past_key_values, use_cache=True)
    logits = torch.cat([start.logits[which], rest.logits[:, :-1]], dim=1)             # [B, L, V]
    logits = logits.float() / temperature                               # as in sampling
    # log_softmax of the sampled tokens only, without a second tensor [B, L, V]
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
        L = int(part["completion_mask"].any(dim=0).nonzero().max()) + 1   # up to the last one used
        for name, values in part.items():
            if name.startswith("prompt_"):
                part[name] = values[:, -T:]                             # padded on the left
            elif values.dim() == 2:
                part[name] = values[:, :L]                              # padded on the right
        yield rows, part


@torch.no_grad()
def batch_logprobs(model, batch, temperature, size):
    """completion_logprobs of a whole batch [B, L], part by part, without gradient."""
    result = torch.zeros_like(batch["completion_mask"])
    for rows, part in parts_by_length(batch, size):
        logprobs = completion_logprobs(model, part, temperature)
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


def context_of(model):
    """How many tokens a model can read; a million where its configuration sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        # RoBERTa and its like number places from 2 on (padding_idx + 1), so 514 rows hold 512
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            limit = module.num_embeddings - module.padding_idx - 1
    return limit if limit > 0 else 10**6


def random_model(kind):
    """A GPT-2 of one layer that reads bytes, for --smoke: it runs wherever the script stands."""
    tokenizer = transformers.ByT5Tokenizer()          # a token per byte: it needs no file
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, num_labels=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return kind.from_config(config), tokenizer


def read_prompts(path):
    """The lines of a text file that are not empty."""
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    return prompts or fail(f"prompt file {path} is empty; it needs one prompt per line")


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
        return "random", SETTINGS
    path = newest_run("policy") if weights == "latest" else Path(weights)
    path = path / "policy" if (path / "policy").is_dir() else path
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf8"))
        assert all(type(config[name]) is type(value) for name, value in SETTINGS.items())
        return path, config
    except Exception:                 # Python raises many kinds; the remedy is one
        fail(f"{weights} is no policy or run of train_grpo.py: in {path.parent} config.json is "
             "missing or damaged; omit --weights for the shipped policy")


def load_both(path, config):
    """(policy, the model it came from, the policy's tokenizer)."""
    policy, tokenizer = load_model(AutoModelForCausalLM, path)
    reference, _ = load_model(AutoModelForCausalLM, config["model"] or HERE / "weights" / "base")
    return policy.eval(), reference.eval(), tokenizer


def load_judge(name, config):
    """(reward model, its tokenizer)."""
    name = name or HERE / "weights" / "reward_model"
    if config["model"] == "random":
        name = "random"
    model, tokenizer = load_model(AutoModelForSequenceClassification, name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def prompts_of(config, given=None):
    """The prompts in the file that was given; else those of the run, if it brought its own; else
    the held-out ones."""
    if config["prompt"] and not given:
        return [config["prompt"]]
    return read_prompts(given or config["prompts"] or HERE / "weights" / "prompts_held_out.txt")


def fits(model, prompt_ids, config):
    """Whether the longest prompt and an answer fit into the model's context."""
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    return prompt_ids.shape[1] + config["max_new_tokens"] <= context


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--weights", default=str(HERE / "weights" / "policy"),
                        metavar="PATH|DIR|latest|random", help="whose policy (default: shipped)")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--out", type=Path, metavar="FILE", help="where the answers go")
    answers.add_argument("--prompts", type=Path, metavar="FILE",
                         help="one per line (default: the held-out ones)")
    answers.add_argument("--reward-model", metavar="DIR", help="score with this one, a second "
                         "judge (default: the run's)")
    answers.add_argument("--samples", type=int, default=16, help="answers per prompt (default 16)")
    answers.add_argument("--seed", type=int, default=0, help="of the answers (default 0)")
    talk = parser.add_argument_group("chat")
    talk.add_argument("--chat", action="store_true", help="ask the policy yourself")
    talk.add_argument("--temperature", type=float, default=0.8, help="low: safe (default 0.8)")
    talk.add_argument("--top-k", type=int, default=0, help="only the K most likely tokens; 0: all")
    talk.add_argument("--top-p", type=float, default=0.95,
                      help="only the most likely tokens that hold this share (default 0.95)")
    parser.add_argument("--smoke", action="store_true", help="2 answers of random tiny models")
    args = parser.parse_args()
    if not (args.samples >= 1 and args.temperature > 0 and args.top_k >= 0 and 0 < args.top_p <= 1):
        fail("--samples must be at least 1, --temperature above 0, --top-k at least 0, and --top-p "
             "above 0 and at most 1")
    if not (args.out or args.chat or args.smoke):
        fail("say where the answers go with --out FILE, or ask the policy yourself with --chat")
    return args


def main():
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path, config = find_policy("random" if args.smoke else args.weights)
    policy, reference, tokenizer = load_both(path, config)
    if args.chat:
        return chat(policy, tokenizer, config, args)
    prompts = prompts_of(config, args.prompts)
    if not fits(policy, prompt_tokens(tokenizer, prompts)[0], config):
        fail("the longest prompt and an answer exceed the model's context; give shorter prompts")
    judge, lines = load_judge(args.reward_model or config.get("reward_model"), config), []
    start = Path(config["model"] or HERE / "weights" / "base")
    own = start.resolve() == HERE / "weights" / "base"    # a model of the shipped world
    for name, model in (("base", reference), ("trained", policy)):
        rows = answers_of(model, reference, tokenizer, judge, prompts, args.samples, config,
                          args.seed)
        lines += [json.dumps(dict(model=name, world=own) | row) + "\n" for row in rows]
    if not args.out:
        return print("".join(lines), end="")
    try:
        write(args.out, "".join(lines))
    except OSError as problem:
        fail(f"--out {args.out} cannot be written ({problem.strerror}); choose another file")


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
