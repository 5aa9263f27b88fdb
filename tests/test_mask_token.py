"""The mask token is an id that no text contains."""

import pytest

from pard_hf.training.mask_token import KNOWN_IDS, check_mask_token, choose_mask_token


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
    monkeypatch.setattr("pard_hf.training.mask_token.KNOWN_IDS", {50: "Other", 101: "This"})

    assert choose_mask_token(bundled_like_tokenizer, 110)[0] == 101
