"""Tiny targets of many families, drafts of every quality, and ragged prompts."""

from __future__ import annotations

import copy

import torch
from device import DEVICE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from pard_hf import PardDraftModel, PardGenerationConfig
from pard_hf.draft.correction_head import CorrectionHead
from pard_hf.generation.decoder import PardDecoder
from pard_hf.generation.schedule import Schedule

VOCAB_SIZE, MASK_TOKEN_ID = 100, 99
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large weights, or every model of this size says the same token for ever.
    "initializer_range": 0.25,
}
# A chat template for tokenizers with one token a character: turns behind a letter, answers with their end.
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'][0] }}]{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
# The window is shorter than every text of the tests.
WINDOW = {"sliding_window": 9}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.25,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, COMMON),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, COMMON),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, COMMON),
    "mistral": (MistralForCausalLM, MistralConfig, {**COMMON, **WINDOW}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**COMMON, **MIXED, "query_pre_attn_scalar": 8}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**COMMON, **MIXED, "query_pre_attn_scalar": 8}),
    "cohere": (CohereForCausalLM, CohereConfig, COMMON),
    "granite": (GraniteForCausalLM, GraniteConfig, {**COMMON, "logits_scaling": 3.0}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {**GPT2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    ),
}
# Targets only: a convolution's state, and attention.
HYBRIDS = {"lfm2": (Lfm2ForCausalLM, Lfm2Config, {**COMMON, "layer_types": ["conv", "full_attention"]})}
TARGETS = [*FAMILIES, *(HYBRIDS if hasattr(Cache, "get_conv_state") else ())]


def placed(model: PreTrainedModel) -> PreTrainedModel:
    """Place a model; on CUDA calls compile by themselves, and tests that want it ask for it."""
    if DEVICE.type == "cuda":
        model.generation_config.disable_compile = True
    return model.to(DEVICE)


def make_model(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    torch.manual_seed(seed)
    model_class, config_class, settings = (FAMILIES | HYBRIDS)[family]
    model = model_class(config_class(**{**settings, **changes})).eval()
    # No end token unless a test chooses one: every text has its full length.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return placed(model)


# Nodes of a round's tree for the drafts made here; 0 leaves the chain.
TREE_SIZE = 0


def make_draft(model: PreTrainedModel, num_assistant_tokens: int = 5) -> PardDraftModel:
    draft = PardDraftModel.from_causal_lm(model, MASK_TOKEN_ID, num_assistant_tokens)
    if TREE_SIZE:
        draft.generation_config.assistant_tree_size = TREE_SIZE
    return draft


class ScriptedLM(LlamaForCausalLM):
    """Proposes a given text, and from the proposal at `first_miss` on something else.

    `script[row]` is the row's text without padding. A real model underneath keeps the cache as a draft's would be.
    """

    script: list[list[int]]
    first_miss: int

    def forward(self, input_ids=None, position_ids=None, logits_to_keep=0, **kwargs):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, logits_to_keep=0, **kwargs)
        depths = (input_ids == self.config.pard_token).cumsum(-1)
        longest = max(map(len, self.script))
        padded = [[*text, *[3] * (longest + 1 - len(text))] for text in self.script]
        script = torch.tensor(padded, device=input_ids.device)
        following = (position_ids + 1).clamp(max=longest).expand(len(input_ids), -1)
        tokens = script.gather(1, following)
        tokens = torch.where(depths < self.first_miss, tokens, 3 + (tokens - 2) % (MASK_TOKEN_ID - 3))
        logits = torch.full_like(output.logits, -10.0).scatter_(-1, tokens.unsqueeze(-1), 10.0)
        output.logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        return output


def make_scripted_draft(script: list[list[int]], first_miss: int, num_assistant_tokens: int = 5) -> PardDraftModel:
    torch.manual_seed(3)
    config = LlamaConfig(**{**COMMON, "num_hidden_layers": 1})
    draft = make_draft(ScriptedLM(config).eval().to(DEVICE), num_assistant_tokens)
    draft.script, draft.first_miss = script, first_miss
    return draft


def make_self_draft(target: PreTrainedModel, num_assistant_tokens: int = 5) -> PardDraftModel:
    return make_draft(copy.deepcopy(target), num_assistant_tokens)


def load_draft(folder, **kwargs) -> PardDraftModel:
    """A saved draft on the device."""
    return PardDraftModel.from_pretrained(folder, **kwargs).to(DEVICE)


def add_head(draft: PardDraftModel, strength: float = 1.0, seed: int = 7, **settings) -> PardDraftModel:
    """A correction head of any opinions."""
    torch.manual_seed(seed)
    config = draft.config.get_text_config()
    head = CorrectionHead(config.vocab_size, config.hidden_size, **{"rank": 8, **settings})
    torch.nn.init.normal_(head.output.weight, std=strength)
    draft.correction_head = head.to(draft.device)
    return draft


def make_prompts(batch_size: int, longest: int = 18) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths, the shortest a single token where the batch allows."""
    generator = torch.Generator().manual_seed(batch_size)
    ids = torch.randint(3, MASK_TOKEN_ID, (batch_size, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch_size):
        mask[row, : (longest - 1) * row // max(batch_size - 1, 1)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def make_decoder(target, draft, prompts, new_tokens, kind=PardDecoder, eos_token_id=None, **options) -> PardDecoder:
    """A decoder as `generate()` makes it; `options` are those of the decoder, and else of the generation config."""
    compiled, schedule, sources = (options.pop(name, None) for name in ("compiled", "schedule", "sources"))
    config = PardGenerationConfig(pad_token_id=0, **options)
    schedule = schedule or Schedule(config.num_assistant_tokens, config.assistant_tree_size or 0)
    criteria = StoppingCriteriaList([MaxLengthCriteria(prompts["input_ids"].shape[1] + new_tokens)])
    if eos_token_id is not None:
        criteria.append(EosTokenCriteria(eos_token_id))
    return kind(
        target,
        draft,
        **prompts,
        compiled=compiled,
        schedule=schedule,
        generation_config=config,
        logits_processor=LogitsProcessorList(),
        stopping_criteria=criteria,
        sources=sources,
    )


def texts_of(sequences: torch.Tensor, attention_mask: torch.Tensor) -> list[list[int]]:
    """Rows without their left padding."""
    num_padding = (attention_mask == 0).sum(-1).tolist()
    return [row[start:] for row, start in zip(sequences.tolist(), num_padding, strict=True)]


def path_of(tree, row, node):
    """Tokens from the root to a node, counted from 1."""
    path = []
    while node:
        path.append(int(tree.tokens[row, node - 1]))
        node = int(tree.parents[row, node - 1])
    return tuple(reversed(path))


def character_tokenizer(more="", first="!", **kwargs):
    """One token a character: three special ones, 94 characters from `first` on, and `more`."""
    alphabet = ["<pad>", "<s>", "</s>", *(chr(ord(first) + i) for i in range(94)), *more]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(alphabet)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **kwargs)


class ForgetfulConfig(LlamaConfig):
    model_type = "forgetful_llama"


class ForgetfulLlama(LlamaForCausalLM):
    """Says something else where it reads several tokens far into a text, as only a verify does."""

    config_class = ForgetfulConfig

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        if input_ids.shape[1] > 1 and int(position_ids.min()) > 7:
            output.logits = output.logits.roll(1, dims=-1)
        return output


def make_forgetful(**changes) -> ForgetfulLlama:
    """A target that no draft leaves as it is, known to the Auto classes."""
    AutoConfig.register("forgetful_llama", ForgetfulConfig, exist_ok=True)
    AutoModelForCausalLM.register(ForgetfulConfig, ForgetfulLlama, exist_ok=True)
    model = make_model("llama", **changes)
    config = ForgetfulConfig(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    forgetful = ForgetfulLlama(config).eval()
    forgetful.load_state_dict(model.state_dict())
    forgetful.generation_config.eos_token_id = None
    return forgetful
