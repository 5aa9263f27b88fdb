"""Prompts in, answers written by the target out: the text a draft learns from, for it is what it is to propose.

With a draft, our own loop writes them: the draft of today makes the training rows of tomorrow's, and greedy answers do
not depend on it, up to floating point. Answers are written a batch at a time; what is on disk is never written again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conditions import conditions_of
from ..draft_model import PardDraftModel
from ..generation.stats import DecodingStats
from .answer_file import AnswerFile, Counts
from .answerer import Answerer, AnswerSettings, model_name
from .conversations import conversation_of, distinct
from .data import place_of


def write_answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict[str, Any]],
    out: str | Path,
    draft: PardDraftModel | None = None,
    batch_size: int = 32,
    num_assistant_tokens: int | None = None,
    skip_bad_rows: bool = False,
    restart: bool = False,
    sources: Sequence[dict[str, Any]] = (),
    report: Callable[[Counts, DecodingStats], None] | None = None,
    **settings: Any,
) -> Counts:
    """Let the target answer prompts, and append the answers to `out`; what is answered there is left alone.

    A row asks by its `prompt`, its `turns` (texts of a user) or its `messages`; every turn of the user is answered in
    order, in sight of the target's own earlier answers, and answers that the row brings are replaced. What comes out
    is `{"id", "sample", "prompt", "response", "response_ids"}`, or `{"id", "sample", "messages", "response_ids"}`
    with one list of ids for each answer: the very tokens, up to and with the end token where there is one.

    An interrupted call is continued by the same call. `out` with `.manifest.json` behind it says how the answers were
    made. Answers to prompts without room for `max_new_tokens` before the last position (of the target, or the draft)
    are left out and counted; so are later turns of a conversation that outgrows it.

    Greedy answers depend on the prompt alone, up to floating point. The noise of sampling depends on `seed` and on who
    else is in the batch: other rows, another `batch_size` or a batch half on disk when the process died change
    which samples come, and not their distribution.

    Args:
        target ([`PreTrainedModel`]):
            The model that answers; with a `draft`, [`with_pard`] is applied to it.
        draft ([`PardDraftModel`], *optional*):
            Makes it faster.
        batch_size (`int`, *optional*, defaults to 32):
            Prompts at a time; also what an interruption can cost.
        num_assistant_tokens (`int`, *optional*):
            K, proposals a round; defaults to the draft's own.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Log conversations that the chat template refuses, and leave them out.
        restart (`bool`, *optional*, defaults to `False`):
            Move an `out` that exists aside, with its manifest, and begin anew.
        sources (`Sequence[dict]`, *optional*):
            What the manifest is to say of where the rows are from.
        report (`Callable`, *optional*):
            Called after each batch with the counts and the decoding statistics so far.
        settings:
            Anything [`AnswerSettings`] takes.

    Returns:
        [`Counts`] of the file and of this call.

    Raises:
        ValueError: A row is broken, or `out` holds answers of another target or other settings; nothing was written.
    """
    if batch_size < 1:
        raise ValueError(f"Expected `batch_size` of at least 1, got {batch_size}.")
    answerer = Answerer(target, tokenizer, AnswerSettings(**settings), draft, num_assistant_tokens)
    asked = [conversation_of(row, place_of(row, number)) for number, row in enumerate(rows, start=1)]
    conversations = distinct(asked)
    good = list(answerer.check(conversations, skip_bad_rows))
    with AnswerFile(Path(out), answerer.identity(), answerer.end_token_ids, restart) as file:
        dialogues = answerer.dialogues(good, file.done)
        waiting = [dialogue for dialogue in dialogues if answerer.has_room(dialogue.past)]
        counts = file.counts
        counts.prompts, counts.duplicates = len(conversations), len(asked) - len(conversations)
        counts.bad_rows = len(conversations) - len(good) + sum(len(source.get("skipped", ())) for source in sources)
        counts.waiting, counts.left_out = len(waiting), len(dialogues) - len(waiting)
        run = conditions_of(target) | {"draft": draft and model_name(draft), "batch_size": batch_size}
        del run["decoding"]  # Of benchmarks, which are greedy; the settings say it here.
        file.write_manifest(run, sources)
        start = time.perf_counter()
        for first in range(0, len(waiting), batch_size):
            batch = waiting[first : first + batch_size]
            answerer.answer(batch)
            counts.shortened += sum(not dialogue.is_finished for dialogue in batch)
            file.append([dialogue.to_row() for dialogue in batch])
            run |= {"new_rows": counts.new_rows, "seconds": round(time.perf_counter() - start, 2)}
            run |= answerer.stats.to_dict() if draft is not None else {}
            file.write_manifest(run, sources)
            if report is not None:
                report(counts, answerer.stats)
    return counts
