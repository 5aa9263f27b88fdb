"""The mask token is an id that no text contains."""

import pytest
from families import TEMPLATE
from transformers import GenerationConfig, LlamaConfig

from pard_hf.draft.mask_token import KNOWN_IDS, check_mask_token, choose_mask_token, ids_named_in


def test_reserved_tokens_may_be_masks(bundled_like_tokenizer):
    """Llama-3 has no free id; AMD takes one of its reserved special tokens."""
    bundled_like_tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    reserved = bundled_like_tokenizer.convert_tokens_to_ids("<|reserved_0|>")

    check_mask_token(bundled_like_tokenizer, reserved)
    assert choose_mask_token(bundled_like_tokenizer, len(bundled_like_tokenizer))[0] == reserved
    for used in ("</s>", "<pad>", "A"):
        with pytest.raises(ValueError, match="never produces"):
            check_mask_token(bundled_like_tokenizer, bundled_like_tokenizer.convert_tokens_to_ids(used))


def test_special_tokens_of_the_template_are_refused(bundled_like_tokenizer):
    bundled_like_tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_turn|>"]})
    bundled_like_tokenizer.chat_template = "{% for m in messages %}<|reserved_turn|>{{ m['content'] }}{% endfor %}"
    turn = bundled_like_tokenizer.convert_tokens_to_ids("<|reserved_turn|>")

    with pytest.raises(ValueError, match="chat template writes"):
        check_mask_token(bundled_like_tokenizer, turn)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        choose_mask_token(bundled_like_tokenizer, turn + 1)


def test_padding_rows_come_first(bundled_like_tokenizer):
    bundled_like_tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    chosen, why = choose_mask_token(bundled_like_tokenizer, 128)

    assert chosen == len(bundled_like_tokenizer)
    assert "27 rows that only pad the vocabulary" in why
    check_mask_token(bundled_like_tokenizer, chosen)


@pytest.mark.parametrize("known", KNOWN_IDS)
def test_known_ids_come_before_all(bundled_like_tokenizer, known):
    """Each where the vocabulary has room for it; the smallest of them first, as families with fewer ids come first."""
    chosen, why = choose_mask_token(bundled_like_tokenizer, known + 1)

    assert chosen == min(KNOWN_IDS)
    assert "Llama-3" in why


def test_a_known_id_that_is_a_word_is_not_taken(bundled_like_tokenizer, monkeypatch):
    """151665 is `<tool_response>` in Qwen3."""
    monkeypatch.setattr("pard_hf.draft.mask_token.KNOWN_IDS", {50: "Other", 101: "This"})

    assert choose_mask_token(bundled_like_tokenizer, 110)[0] == 101


def add_special(tokenizer, *tokens):
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer.convert_tokens_to_ids(list(tokens))


def test_special_tokens_that_nobody_writes_come_last(bundled_like_tokenizer):
    """All ids of many a vocabulary are in use, some by special tokens of texts that no chat contains."""
    issue, turn, empty = add_special(bundled_like_tokenizer, "<issue_closed>", "<|im_end|>", "<empty_output>")
    bundled_like_tokenizer.chat_template = TEMPLATE + "<|im_end|>"

    chosen, why = choose_mask_token(bundled_like_tokenizer, empty + 1)
    assert chosen == empty
    assert "'<empty_output>'" in why
    for free in (issue, empty):
        check_mask_token(bundled_like_tokenizer, free)
    with pytest.raises(ValueError, match="chat template writes"):
        check_mask_token(bundled_like_tokenizer, turn)

    assert choose_mask_token(bundled_like_tokenizer, empty + 2)[0] == empty + 1  # A row that only pads comes first.
    [reserved] = add_special(bundled_like_tokenizer, "<reserved_3>")
    add_special(bundled_like_tokenizer, "<zzz>")
    assert choose_mask_token(bundled_like_tokenizer, len(bundled_like_tokenizer))[0] == reserved


@pytest.mark.parametrize("role", ["bos", "eos", "pad", "unk", "sep", "cls"])
def test_tokens_with_a_role_are_refused(bundled_like_tokenizer, role):
    bundled_like_tokenizer.add_special_tokens({f"{role}_token": "<named>"})
    named = bundled_like_tokenizer.convert_tokens_to_ids("<named>")

    with pytest.raises(ValueError, match=f"'<named>', the tokenizer's {role}_token"):
        check_mask_token(bundled_like_tokenizer, named)


def test_tokens_that_a_config_names_are_refused(bundled_like_tokenizer):
    """Instruct models often end with a token that only `generation_config.json` names."""
    one, two, image, free = add_special(bundled_like_tokenizer, "<a>", "<b>", "<c>", "<d>")
    named = ids_named_in(
        GenerationConfig(eos_token_id=[2, two], pad_token_id=one), LlamaConfig(eos_token_id=2, image_token_id=image)
    )

    for used in (one, two, image):
        with pytest.raises(ValueError, match="which the model's config names"):
            check_mask_token(bundled_like_tokenizer, used, named)
    assert choose_mask_token(bundled_like_tokenizer, free + 1, named)[0] == free
    assert free not in ids_named_in(LlamaConfig(mask_token_id=free, pard_token=free))


def test_tokens_that_a_template_puts_together_are_refused(bundled_like_tokenizer):
    """Phi writes `'<|' + message['role'] + '|>'`: the token stands nowhere in the template."""
    tokens = add_special(bundled_like_tokenizer, "<|system|>", "<|user|>", "<|assistant|>", "<|other|>")
    bundled_like_tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    )

    for written in tokens[:3]:
        with pytest.raises(ValueError, match="chat template writes"):
            check_mask_token(bundled_like_tokenizer, written)
    check_mask_token(bundled_like_tokenizer, tokens[3])


def test_where_all_is_used_the_advice_helps(bundled_like_tokenizer):
    """Resizing is the last way out: a vocabulary larger than the target's is refused by vLLM and the stock loop."""
    with pytest.raises(ValueError, match="all 100 are used.*add_special_tokens.*resize_token_embeddings.*vLLM"):
        choose_mask_token(bundled_like_tokenizer, 100)

    [rare] = add_special(bundled_like_tokenizer, "ø")
    assert choose_mask_token(bundled_like_tokenizer, 100)[0] == rare == 99
