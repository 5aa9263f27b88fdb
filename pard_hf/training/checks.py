"""What can be known to fail before any weight is loaded; every message says what to do."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from ..positions import num_positions
from .chat import has_marks

PROBE = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]


def check_base(base: str, tokenizer: Any, max_length: int) -> int:
    """Raise a `ValueError` where a base model cannot read its tokenizer's ids or such rows; returns its vocabulary."""
    config = AutoConfig.from_pretrained(base)
    if config.is_encoder_decoder:
        raise ValueError(f"Expected a decoder-only base model, got the encoder-decoder `{base}`.")
    vocab_size = config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"Expected a base model that knows every id of its tokenizer, got ids up to {largest} for {vocab_size} "
            f"rows in `{base}`. The tokenizer is another model's, or tokens were added without "
            "`model.resize_token_embeddings`."
        )
    if max_length > num_positions(config):
        raise ValueError(
            f"Expected `--max-length` within the {num_positions(config)} positions of the base model, got "
            f"{max_length}."
        )
    return vocab_size


def check_lengths(num_draft_tokens: int, max_length: int) -> None:
    """Raise a `ValueError` where no row could be as long as a chain of masks."""
    if num_draft_tokens >= max_length:
        raise ValueError(
            f"Expected `--num-draft-tokens` below `--max-length`, got {num_draft_tokens} and {max_length}: the "
            "deepest mask rows would never be built. 8 is the paper's K_train."
        )


def check_same_tokenizer(tokenizer: Any, other: Any, name: str) -> None:
    """Raise a `ValueError` where a target reads other ids than the draft."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    example = different[0]
    raise ValueError(
        f"Expected one tokenizer for the base model and the target `{name}`, got {len(different)} tokens with other "
        f"ids ({example!r} is {ours.get(example)} and {theirs.get(example)}). Adapt a base of the target's family."
    )


def check_template(tokenizer: Any) -> None:
    """Raise a `ValueError` where a chat template does not tell where an answer begins.

    It does with `{% generation %}` marks around answers; without them, what it writes up to an answer must be the
    beginning of what it writes with it.
    """
    if tokenizer.chat_template is None or has_marks(tokenizer):
        return
    way_out = (
        "Mark answers with `{% generation %}…{% endgeneration %}` in a copy of the template and pass it with "
        "`--chat-template`."
    )
    try:
        before = tokenizer.apply_chat_template(PROBE[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(PROBE, tokenize=False)
    except Exception as error:
        raise ValueError(
            f"Expected a chat template for a question and an answer, but it fails: {error}. {way_out}"
        ) from error
    if not whole.startswith(before) or PROBE[1]["content"] not in whole[len(before) :]:
        raise ValueError(
            "Expected a chat template that writes what comes before an answer alike with and without it, got "
            f"{before!r} and {whole!r}: where the answer begins cannot be told. {way_out}"
        )
