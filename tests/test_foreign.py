"""Models that one did not make oneself: each is right, or refused in one line. Tiny random models of many architectures, in all lessons."""
import functools
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from conftest import assert_one_line_error, call, load

grpo = load("grpo_lm/train_grpo.py")
rlhf = load("reinforce_rlhf/train_reinforce_rlhf.py")
gsm8k = load("kl_bernoulli_gsm8k/train_kl_bernoulli.py")
spo = load("spo_dummy/train_spo.py")
pairs = load("reinforce_rlhf/train_reward_model.py")

COMMON = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
              max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False)
OLD = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256)                       # the names of the first years
BART = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=1, is_decoder=True, is_encoder_decoder=False)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DEEPSEEK = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
                moe_intermediate_size=16, first_k_dense_replace=1, num_key_value_heads=4)
WINDOW = dict(sliding_window=8, query_pre_attn_scalar=8)
RIGHT = {
    "gpt2": OLD, "gpt_bigcode": OLD, "gptj": OLD | dict(rotary_dim=8), "codegen": OLD | dict(rotary_dim=8, n_ctx=256),
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=8, num_heads=4), "gpt_neox": {}, "llama": {}, "mistral": {},
    "mixtral": dict(num_local_experts=2), "qwen2": {}, "qwen2_moe": EXPERTS | dict(shared_expert_intermediate_size=16), "qwen3": {}, "qwen3_moe": EXPERTS,
    "gemma": {}, "gemma2": WINDOW | dict(final_logit_softcapping=0.5), "gemma3_text": WINDOW, "phi": {}, "phi3": {}, "bloom": dict(n_layer=2, n_head=4),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32), "mpt": dict(d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=256),
    "cohere": dict(logit_scale=0.0625), "cohere2": dict(logit_scale=0.0625, sliding_window=8),
    "granite": dict(logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3), "granitemoe": dict(num_local_experts=2),
    "olmo": {}, "olmo2": {}, "olmo3": {}, "olmoe": dict(num_experts=4, num_experts_per_tok=2), "starcoder2": {}, "stablelm": {}, "persimmon": {}, "biogpt": {},
    "xglm": dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=48), "nemotron": {}, "glm": {}, "glm4": {}, "helium": {}, "exaone4": {}, "smollm3": {},
    "ernie4_5": {}, "deepseek_v2": DEEPSEEK | dict(n_group=None, topk_group=None, topk_method="greedy"), "deepseek_v3": DEEPSEEK | dict(n_group=2, topk_group=1),
    "arcee": {}, "apertus": {}, "diffllama": {}, "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=8), "hunyuan_v1_dense": {},
    "jetmoe": {}, "seed_oss": {}, "vaultgemma": WINDOW, "phimoe": dict(num_local_experts=2), "bitnet": {},
    "bert": dict(is_decoder=True), "electra": dict(is_decoder=True, embedding_size=32), "ctrl": OLD | dict(dff=48)}
# No ordinary cache, no heed of position ids, or an offset in them: refused
WRONG = {
    "openai-gpt": OLD, "bart": BART, "mbart": BART, "roberta": dict(is_decoder=True), "xlm-roberta": dict(is_decoder=True), "mamba": dict(state_size=4),
    "mamba2": dict(state_size=4, num_heads=8, head_dim=8, n_groups=1), "falcon_mamba": dict(state_size=4), "jamba": {}, "recurrent_gemma": {}, "lfm2": {},
    "megatron-bert": dict(is_decoder=True), "roformer": dict(is_decoder=True), "minimax": {}, "rwkv": dict(attention_hidden_size=32, context_length=256), "bert-encoder": {}, "trocr": {}}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tiny(name, kind=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    settings = COMMON | (RIGHT | WRONG).get(name, {}) | more
    model = kind.from_config(AutoConfig.for_model(name.removesuffix("-encoder"), **settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)    # the usual .02 would hide mistakes
    return model


def byte_tokenizer(adds_end=True, **more):
    """A token per byte, <pad> 0, <end> 1; adds the end token to every text, as some do."""
    words = {word: number for number, word in enumerate(["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bare = Tokenizer(models.BPE(words, []))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    if adds_end:
        bare.post_processor = processors.TemplateProcessing(single="$A <end>", pair="$A <end> $B <end>", special_tokens=[("<end>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = more.get("template", TEMPLATE)
    return tokenizer


def refusal(check, *args, capsys):
    """The one line with which `check` refuses; None if it is content."""
    try:
        check(*args)
    except SystemExit as end:
        assert end.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "Traceback" not in lines[0]
        return lines[0]
    return None


@torch.no_grad()
def plain_logprobs(model, prompt, answer):
    """log π of the tokens of an answer by a forward pass without padding, cache, mask or positions."""
    logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, :-1].float()
    return logits.log_softmax(dim=-1).gather(1, torch.cat([prompt, answer])[1:, None])[-len(answer):, 0]


PROMPTS = ["a", "abcdefghijklmnopqrst", "what is it?"]


def compare(model, ids, mask, answers, answer_mask, *found):
    for row in range(len(answers)):
        n = int(answer_mask[row].sum())
        plain = plain_logprobs(model, ids[row // 2, mask[row // 2] > 0], answers[row, :n])
        for logprobs in found:
            assert torch.allclose(logprobs[row, :n], plain, atol=1e-5, rtol=1e-5), (logprobs[row, :n] - plain).abs().max()


def batch_of(ids, mask, answers, answer_mask):
    return dict(prompt_ids=ids.repeat_interleave(2, dim=0), prompt_mask=mask.repeat_interleave(2, dim=0), completion_ids=answers, completion_mask=answer_mask)


@torch.no_grad()
def check_grpo(model, tokenizer):
    ids, mask = grpo.prompt_tokens(tokenizer, PROMPTS)
    answers, answer_mask, sampled = grpo.generate(model, ids, mask, 2, 12, 1.0, grpo.end_tokens(model, tokenizer), torch.Generator().manual_seed(1))
    compare(model, ids, mask, answers, answer_mask, sampled, grpo.completion_logprobs(model, batch_of(ids, mask, answers, answer_mask), 1.0))


@torch.no_grad()
def check_rlhf(model, tokenizer):
    ids, mask = rlhf.prompt_tokens(tokenizer, PROMPTS)
    answers, answer_mask, sampled = rlhf.generate(model, ids, mask, 2, 12, 1.0, 1.0, rlhf.end_tokens(model, tokenizer), torch.Generator().manual_seed(1))
    compare(model, ids, mask, answers, answer_mask, sampled, rlhf.completion_logprobs(model, batch_of(ids, mask, answers, answer_mask), 1.0, 1.0))


@torch.no_grad()
def check_gsm8k(model, tokenizer):
    ids, mask = gsm8k.prompt_tokens(tokenizer, PROMPTS)
    answers, answer_mask, sampled = gsm8k.generate(model, ids, mask, 2, 12, 1.0, gsm8k.end_tokens(model, tokenizer), torch.Generator().manual_seed(1))
    head = gsm8k.last_layer(model)
    logits = head(gsm8k.answer_states(model, head, batch_of(ids, mask, answers, answer_mask)))
    trained = logits.float().log_softmax(dim=-1).gather(-1, answers[..., None])[..., 0]
    compare(model, ids, mask, answers, answer_mask, sampled, trained)


@torch.no_grad()
def check_spo(model, tokenizer):
    prompt, answers = spo.prompt_tokens(tokenizer), spo.answer_tokens(tokenizer, ["4", "42", "100"])
    found = spo.completion_logprobs(model, prompt, *spo.pad(answers, spo.end_token(tokenizer)))
    for answer, logprob in zip(answers, found):
        assert torch.allclose(plain_logprobs(model, prompt[0], torch.tensor(answer)).sum(), logprob, atol=1e-4, rtol=1e-5)
    total = spo.enumerate_answers(model, tokenizer).exp().sum()
    assert 0 < total <= 1


def swept(names, *quick):
    """The names as test parameters: some for every run of the tests, the others among the long ones."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.long) for name in names]


LESSONS = {"grpo": (grpo, check_grpo), "rlhf": (rlhf, check_rlhf), "gsm8k": (gsm8k, check_gsm8k), "spo": (spo, check_spo)}


@pytest.mark.parametrize("name", swept(RIGHT, "gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2"))
def test_a_usual_decoder_is_right_in_all_lessons(name, capsys):
    model = tiny(name)
    for lesson, oracle in LESSONS.values():
        tokenizer = byte_tokenizer()
        assert refusal(lesson.check_policy, model, tokenizer, name, capsys=capsys) is None
        oracle(model, tokenizer)


@pytest.mark.parametrize("name", swept(WRONG, *list(WRONG)[:3]))
def test_an_unusual_one_is_refused_in_one_line_or_right(name, capsys):
    model = tiny(name)
    for lesson, oracle in LESSONS.values():
        tokenizer = byte_tokenizer()
        if refusal(lesson.check_policy, model, tokenizer, name, capsys=capsys) is None:
            oracle(model, tokenizer)


# ---- reward models --------------------------------------------------------------------------------

JUDGES = ["gpt2", "gpt_bigcode", "gptj", "gpt_neo", "gpt_neox", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "opt", "bloom",
          "stablelm", "starcoder2", "persimmon", "biogpt", "bert", "roberta", "xlm-roberta", "electra", "camembert", "distilbert", "albert", "deberta", "deberta-v2",
          "xlnet", "mpnet", "modernbert", "openai-gpt", "ctrl", "nemotron", "helium"]
MORE = {"xlnet": dict(d_model=32, n_layer=2, n_head=4, d_inner=48, d_head=8), "distilbert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48), "albert": dict(embedding_size=32), "deberta-v2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "electra": dict(embedding_size=32, is_decoder=False), "bert": dict(is_decoder=False), "roberta": dict(is_decoder=False), "xlm-roberta": dict(is_decoder=False)}
ASKED = ["Why?", "What is it, and what is it for?", "How does it work?"]
SAID = ["x" * n for n in (3, 40, 17)]


@functools.cache
def judge_directory(name, root):
    settings = {key: value for key, value in (COMMON | MORE.get(name, {})).items() if name != "xlnet" or key != "max_position_embeddings"}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **((RIGHT | WRONG).get(name, {}) | settings | dict(num_labels=1))))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(root / name)
    byte_tokenizer().save_pretrained(root / name)
    return root / name


@pytest.mark.parametrize("name", swept(JUDGES, "gpt2", "llama", "qwen2", "bert", "deberta-v2", "xlnet"))
def test_a_reward_model_scores_a_batch_as_it_scores_one_text(name, tmp_path_factory):
    directory = judge_directory(name, tmp_path_factory.getbasetemp())
    if name == "xlnet":                                   # it reads the last place, padding or not
        with pytest.raises(SystemExit):
            grpo.load_reward_model(grpo.Config(reward_model=str(directory), reward_input="text"))
        return
    model, tokenizer = grpo.load_reward_model(grpo.Config(reward_model=str(directory)))
    together = grpo.reward_scores(model, tokenizer, ASKED, SAID, "text")
    alone = torch.cat([grpo.reward_scores(model, tokenizer, [prompt], [text], "text") for prompt, text in zip(ASKED, SAID)])
    assert torch.allclose(together, alone, atol=1e-5) and together.std() > 1e-4
    judge, tokenizer = rlhf.load_reward_model(directory, 1)
    together = rlhf.reward_logits(judge, tokenizer, ASKED, SAID, 100)
    alone = torch.cat([rlhf.reward_logits(judge, tokenizer, [prompt], [text], 100) for prompt, text in zip(ASKED, SAID)])
    assert torch.allclose(together, alone, atol=1e-5) and together.std() > 1e-4


# ---- situations that people have met (shared/reference/foreign_models.md) ------------------------------

def directory_of(tmp_path, name="gpt2", kind=AutoModelForCausalLM, tokenizer=None, **more):
    tiny(name, kind, **more).save_pretrained(tmp_path)
    (tokenizer or byte_tokenizer(adds_end=False)).save_pretrained(tmp_path)
    return tmp_path


def policy_flags(module, directory):
    """The flags that make a lesson load this policy, and little else."""
    others = {"grpo": ["--reward-model", "random", "--prompt", "Hi."], "rlhf": ["--reward-model", "random"], "gsm8k": [], "spo": []}
    name = next(name for name, (lesson, _) in LESSONS.items() if lesson is module)
    return ["--model", directory, *others[name], "--quiet"]


def refused(module, directory, tmp_path, *words):
    assert_one_line_error(call(module, *policy_flags(module, directory), "--out", tmp_path / f"run of {directory.name}"), *words)


every_lesson = pytest.mark.parametrize("lesson", [lesson for lesson, _ in LESSONS.values()], ids=list(LESSONS))


@pytest.mark.parametrize("name, more", [("cohere", dict(logit_scale=0.0625)), ("gemma2", dict(final_logit_softcapping=0.5)), ("granite", {}), ("llama", {})])
def test_gsm8k_trains_on_the_models_own_logits(name, more):
    """Loss and gradient equal those of full logits: some models scale or bend what their last layer says."""
    model, tokenizer = tiny(name, **more), byte_tokenizer(adds_end=False)
    ids, mask = gsm8k.prompt_tokens(tokenizer, PROMPTS)
    answers, answer_mask, _ = gsm8k.generate(model, ids, mask, 2, 9, 1.0, [1], torch.Generator().manual_seed(1))
    weights = torch.randn(answers.shape, generator=torch.Generator().manual_seed(2)) * answer_mask
    batch = batch_of(ids, mask, answers, answer_mask) | dict(weights=weights, entropy_weights=answer_mask / answer_mask.sum())
    config = gsm8k.Config(ent_coef=-0.1, token_chunk=7)
    head = gsm8k.last_layer(model)
    assert isinstance(head, torch.nn.Identity) == (name != "llama")
    loss = gsm8k.batch_loss(model, head, batch, config)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    logprobs = grpo.completion_logprobs(model, batch, 1.0)
    full = torch.cat([batch["prompt_ids"], answers], dim=1), torch.cat([batch["prompt_mask"], answer_mask.long()], dim=1)
    positions = (full[1].cumsum(dim=1) - 1).clamp(min=0)
    log_all = model(input_ids=full[0], attention_mask=full[1], position_ids=positions).logits[:, -answers.shape[1] - 1:-1].log_softmax(dim=-1)
    entropy = (batch["entropy_weights"] * -(log_all.exp() * log_all).sum(dim=-1)).sum()
    wanted = -(weights * logprobs).sum() + 0.1 * entropy
    wanted.backward()
    assert torch.allclose(loss, wanted, rtol=1e-5, atol=1e-5)
    for one, parameter in zip(found, [parameter for parameter in model.parameters() if parameter.grad is not None]):
        assert torch.allclose(one, parameter.grad, rtol=1e-4, atol=1e-5)


@every_lesson
def test_weights_that_are_missing_or_too_many_are_not_made_up(lesson, tmp_path):
    directory_of(tmp_path / "classifier", "llama", AutoModelForSequenceClassification, num_labels=1)
    refused(lesson, tmp_path / "classifier", tmp_path, "score.weight", "lm_head.weight")
    directory_of(tmp_path / "tied", "gpt2", AutoModelForSequenceClassification, num_labels=1, tie_word_embeddings=True)
    refused(lesson, tmp_path / "tied", tmp_path, "score.weight")
    for layers, word in ((3, "missing"), (1, "unexpected")):
        settings = json.loads((directory_of(tmp_path / f"layers{layers}", "llama") / "config.json").read_text())
        settings |= dict(num_hidden_layers=layers, layer_types=None)
        (tmp_path / f"layers{layers}" / "config.json").write_text(json.dumps(settings))
        refused(lesson, tmp_path / f"layers{layers}", tmp_path, word)


def test_a_language_model_is_no_reward_model(tmp_path):
    directory = directory_of(tmp_path / "lm", num_labels=1)
    assert_one_line_error(call(grpo, "--reward-model", directory, "--quiet", "--out", tmp_path / "run"), "score.weight")
    assert_one_line_error(call(rlhf, "--reward-model", directory, "--quiet", "--out", tmp_path / "run2"), "score.weight")


@pytest.mark.parametrize("text, reward", [
    ("<think> maybe #### 18", 0), ("<think> 18 </think> #### 18", 1), ("#### 18", 1), ("<think> #### 3 </think> <think> #### 18", 0),
    ("[THINK] #### 18", 0), ("<Thinking>#### 18", 0), ("<thought> x </thought> #### 18", 1), ("<reasoning> #### 18", 0), ("a < b #### 18", 1)])
def test_an_unfinished_thought_is_not_paid(text, reward):
    assert gsm8k.reward_of(text, 18, thinks=False) == reward
    evaluation = load("kl_bernoulli_gsm8k/kl_bernoulli_eval.py")
    assert (evaluation.result_of(text, False) == 18) == bool(reward)
    assert gsm8k.reward_of("it is #### 18", 18, thinks=True) == 0 and gsm8k.reward_of("x</think> #### 18", 18, thinks=True) == 1


@pytest.mark.parametrize("lesson", [grpo, rlhf, gsm8k], ids=["grpo", "rlhf", "gsm8k"])
def test_an_end_token_that_a_tokenizer_adds_to_a_prompt_is_dropped(lesson):
    tokenizer = byte_tokenizer(adds_end=True, template=None)
    assert tokenizer("Hi.")["input_ids"][-1] == 1
    ids, mask = lesson.prompt_tokens(tokenizer, ["Hi.", "How are you?"])
    assert not (ids[mask > 0] == 1).any()


CHATML = "{% for message in messages %}<turn>{{ message['role'] }}: {{ message['content'] }}<turn>\n{% endfor %}"


def test_the_token_that_ends_a_turn_ends_an_answer():
    tokenizer = byte_tokenizer(template=CHATML)
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    model = tiny("llama")
    model.generation_config.eos_token_id = [-1, 1, 7, 4000]       # no token has the ids -1 and 4000
    for lesson in (grpo, rlhf, gsm8k):
        assert lesson.end_tokens(model, tokenizer) == sorted([1, 7, turn])
    assert spo.end_token(tokenizer) == turn and spo.answer_tokens(tokenizer, ["4"])[0][-1] == turn
    assert spo.answer_text(tokenizer, spo.answer_tokens(tokenizer, ["42"])[0]) == "42"
    assert grpo.turn_end(byte_tokenizer(template=TEMPLATE)) is None


@every_lesson
@pytest.mark.parametrize("template, words", [
    ("{% for message in messages if message['role'] == 'human' %}{{ message['content'] }}{% endfor %}", ["loses"]),
    ("{{ raise_exception('no assistant here') }}", ["no assistant here"])], ids=["human", "refuses"])
def test_a_chat_format_that_loses_or_refuses_the_prompt_is_one_line(lesson, template, words, tmp_path):
    refused(lesson, directory_of(tmp_path / "m", "llama", tokenizer=byte_tokenizer(template=template)), tmp_path, *words)


STRICT = ("{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
          "{% if message['role'] in ('user', 'assistant') %}{{ message['content'] }}{% endif %}{% endfor %}")


@pytest.mark.parametrize("role, words", [("system", ["system user assistant", "no system message"]), ("human", ["loses a message", "human user assistant"])])
def test_roles_that_a_chat_format_does_not_know_are_named(role, words, tmp_path, capsys):
    tokenizer = byte_tokenizer(template=STRICT)
    prompt = [dict(role=role, content="Be brief."), dict(role="user", content="Hi.")]
    line = refusal(pairs.check_chats, tokenizer, [dict(prompt=prompt, chosen="Yes.", rejected="No.")], capsys=capsys)
    assert all(word in line for word in words)


def test_pairs_that_are_equal_after_the_cut_are_left_out_and_counted(capsys):
    tokenizer, said = byte_tokenizer(), []
    rows = [dict(prompt="p", chosen="x" * 50 + "good", rejected="x" * 50 + "bad"), dict(prompt="p", chosen="yes", rejected="no"), dict(prompt="p", chosen="a", rejected="a")]
    chosen, rejected = pairs.encode(tokenizer, rows, 30, said.append)
    assert len(chosen) == len(rejected) == 1 and "2 of 3" in said[0]
    assert "are equal in all pairs" in refusal(pairs.encode, tokenizer, rows[:1], 30, print, capsys=capsys)
    answers = load("reinforce_rlhf/make_answers.py")
    judge = tiny("llama", AutoModelForSequenceClassification, num_labels=1), tokenizer
    assert [row["chosen"] for row in answers.pairs_of(judge, rows, 30)] == ["yes"]
    evaluation = load("reinforce_rlhf/reinforce_rlhf_eval.py")
    figures = evaluation.judge_pairs([dict(prompt="q", chosen="a", rejected="b", margin=m, p=0.5) for m in (1.0, 0.0, -1.0, 0.0)], evaluation.load_world())
    assert figures["accuracy"] == 0.5 == figures["accuracy_annotators"]


def test_transcripts_with_an_implicit_prompt_are_read(tmp_path):
    talk = "\n\nHuman: Hi.\n\nAssistant: Hello: what is it?\n\nHuman: A rhyme?\n\nAssistant:"
    (tmp_path / "hh.jsonl").write_text(json.dumps(dict(chosen=talk + " No Human: is an island.", rejected=talk + " No.")) + "\n")
    found = pairs.read_pairs(tmp_path / "hh.jsonl")[0]
    assert found["chosen"] == "No Human: is an island." and found["rejected"] == "No."
    assert [(m["role"], m["content"]) for m in found["prompt"]] == [("user", "Hi."), ("assistant", "Hello: what is it?"), ("user", "A rhyme?")]


def test_a_context_that_is_too_short_for_the_judge_is_refused(tmp_path):
    judge = directory_of(tmp_path / "judge", "gpt2", AutoModelForSequenceClassification, num_labels=1, n_positions=64, max_position_embeddings=64)
    flags = ["--prompt", "Explain why regular exercise is important.", "--quiet", "--out", tmp_path / "run"]
    assert_one_line_error(call(grpo, "--reward-model", judge, *flags), "--max-new-tokens", "64")
    assert_one_line_error(call(rlhf, "--reward-model", judge, "--quiet", "--out", tmp_path / "run2"), "--max-length 128", "64")


@pytest.mark.parametrize("name, more, wanted", [("roberta", dict(max_position_embeddings=514, is_decoder=False, pad_token_id=1), 512), ("llama", {}, 256), ("bloom", {}, 10**6),
                                                ("xlnet", dict(d_model=32, n_layer=2, n_head=4, d_inner=48, d_head=8), 10**6)])
def test_the_usable_context_of_a_model(name, more, wanted):
    settings = {key: value for key, value in (COMMON | RIGHT.get(name, {}) | more).items() if key != "max_position_embeddings" or name not in ("xlnet", "bloom")}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **settings, num_labels=1))
    assert grpo.context_of(model) == pairs.context_of(model) == wanted


def test_text_files_of_any_editor_are_read_alike(tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\n  two\u2028three \n\n".encode())
    assert grpo.read_prompts(tmp_path / "p.txt") == ["one", "two\u2028three"]
    row = dict(prompt="p\u2028q", chosen="a", rejected="b")
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_bytes(f"\ufeff{line}\r\n\n{line}\n\n".encode())
    assert pairs.read_pairs(tmp_path / "p.jsonl") == [row, row]
    problem = json.dumps(dict(question="1 + 1?\u2028", answer="#### 2"), ensure_ascii=False)
    (tmp_path / "g.jsonl").write_bytes(f"\ufeff{problem}\n\n{problem}\n\n".encode())
    assert [found.result for found in gsm8k.read_problems(tmp_path / "g.jsonl")] == [2, 2]
    (tmp_path / "twice.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}\n')
    assert "twice" in refusal(pairs.read_pairs, tmp_path / "twice.jsonl", capsys=capsys)
    (tmp_path / "twice2.jsonl").write_text('{"question": "p", "answer": "#### 1", "answer": "#### 2"}\n')
    assert "twice" in refusal(gsm8k.read_problems, tmp_path / "twice2.jsonl", capsys=capsys)
    (tmp_path / "c.yaml").write_text("seed: 1\npart_2:\n  lr: 1.0e-4\n  lr: 2.0e-4\n")
    for module, part in ((rlhf, "part_2"), (pairs, "part_1")):
        assert "twice" in refusal(module.read_config, tmp_path / "c.yaml", part, capsys=capsys)


def test_all_spellings_of_a_number_count():
    """A tokenizer that writes 42 in one token or in two: the listed probabilities equal those of all token sequences."""
    import itertools
    words = {word: number for number, word in enumerate(["<pad>", "<end>", *"0123456789", "10", "42", "00", "100", "x"])}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe(words), eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    model = tiny("llama", vocab_size=len(words))
    found = spo.enumerate_answers(model, tokenizer).exp()
    sequences = [(*row, 1) for length in (1, 2, 3) for row in itertools.product(range(2, len(words)), repeat=length)]
    prompt = spo.prompt_tokens(tokenizer)
    with torch.no_grad():
        logprobs = torch.cat([spo.completion_logprobs(model, prompt, *spo.pad(sequences[k:k + 500], 1)) for k in range(0, len(sequences), 500)])
    wanted = torch.zeros(100)
    for row, logprob in zip(sequences, logprobs):
        number = spo.parse_guess(spo.answer_text(tokenizer, row))
        if number is not None:
            wanted[number - 1] += logprob.exp()
    assert torch.allclose(found, wanted, rtol=1e-4) and sorted(map(len, spo.spellings(tokenizer, "100"))) == [1, 2, 2, 3]


def bpe(words):
    bare = Tokenizer(models.BPE(words, [("1", "0"), ("4", "2"), ("0", "0"), ("10", "0")], unk_token="x"))
    bare.decoder = decoders.Fuse()
    return bare


@every_lesson
def test_what_is_no_decoder_with_a_cache_and_rows_for_its_tokens_is_named(lesson, tmp_path):
    directory = directory_of(tmp_path / "m", "llama")
    tokenizer = byte_tokenizer(adds_end=False)
    tokenizer.add_special_tokens(dict(eos_token="<late>"))
    small = directory_of(tmp_path / "small", "llama", tokenizer=tokenizer, vocab_size=258)
    refused(lesson, small, tmp_path, "an embedding for each")
    refused(lesson, directory_of(tmp_path / "mamba", "mamba"), tmp_path, "cannot be trained")
    refused(lesson, directory_of(tmp_path / "bert", "bert-encoder"), tmp_path, "cannot be trained")
    transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    refused(lesson, tmp_path / "t5", tmp_path, "T5Config", "no encoder-decoder")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    refused(lesson, tmp_path / "adapter", tmp_path, "no adapter")
    assert directory.exists()


def test_half_a_character_in_a_prompt_is_refused(tmp_path):
    assert_one_line_error(call(grpo, "--prompt", "a\ud800", "--out", tmp_path / "o"), "--prompt")
    for script in ("kl_bernoulli_gsm8k/kl_bernoulli_eval.py", "reinforce_rlhf/reinforce_rlhf_eval.py"):
        assert_one_line_error(call(load(script), "--prompt", "a\ud800"), "--prompt")


def test_gold_judges_the_shipped_worlds_own_models_only(tmp_path):
    for script, prompt in (("grpo_lm/grpo_eval.py", "Explain why regular exercise is important."), ("reinforce_rlhf/reinforce_rlhf_eval.py", None)):
        evaluation = load(script)
        world = evaluation.load_world()
        prompt = prompt or next(iter(world["topic_of"]))
        rows = [dict(prompt=prompt, text="It is good.", world=own) for own in (True, False)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own, other = evaluation.read_answers(tmp_path / "a.jsonl", world)
        assert own["gold"] is not None and other["gold"] is None
