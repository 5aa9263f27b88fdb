"""A target that answers conversations, turn by turn and in batches.

Knows models and tokens; knows nothing of files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conditions import shown_model
from ..draft_model import PardDraftModel
from ..generation.mixin import with_pard
from ..generation.stats import DecodingStats
from ..host import input_device
from ..pair import bundled_pair
from ..positions import num_positions
from .chat import encode_prompt, next_prompt
from .conversations import Conversation, Message

logger = logging.getLogger(__name__)

# Stands for an answer that is not written yet.
PLACEHOLDER = {"role": "assistant", "content": "…"}
# Settings of a checkpoint that change its answers.
OWN_SETTINGS = (
    "bad_words_ids",
    "eos_token_id",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "suppress_tokens",
    "top_k",
    "typical_p",
)


@dataclass(frozen=True)
class AnswerSettings:
    """How the answers of one file are written.

    Args:
        temperature (`float`, *optional*, defaults to 0):
            0 is greedy. Other settings of sampling (`top_k`, …) are the target's own `generation_config`.
        top_p (`float`, *optional*, defaults to 1):
            Probability mass that is sampled from.
        max_new_tokens (`int`, *optional*, defaults to 512):
            Tokens of an answer at most.
        num_samples (`int`, *optional*, defaults to 1):
            Answers to each prompt.
        seed (`int`, *optional*, defaults to 0):
            Seed of sampling.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_right, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
        ):
            if not is_right:
                raise ValueError(f"Expected `{name}` {expected}, got {getattr(self, name)}.")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"Expected `num_samples` of 1 with greedy decoding, got {self.num_samples}: all would be the same. "
                "Raise `temperature`, or drop `num_samples`."
            )
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError("Expected `top_p` with a `temperature` above 0 only: greedy answers do not sample.")

    def generate_kwargs(self) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, **(sampling if self.temperature else {"do_sample": False})}


@dataclass
class Dialogue:
    """One sample of a conversation on its way: `past` is everything before the next answer, as token ids."""

    conversation: Conversation
    sample: int
    tokenizer: PreTrainedTokenizerBase
    past: list[int]
    messages: list[Message]
    answers: list[list[int]] = field(default_factory=list)
    is_finished: bool = False

    def take(self, answer: list[int]) -> None:
        """Add an answer and go on to the next turn."""
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.answers.append(answer)
        self.messages.append({"role": "assistant", "content": text})
        if len(self.answers) == len(self.conversation.turns):
            self.is_finished = True
        else:
            asked = [*self.messages, *self.conversation.turns[len(self.answers)]]
            self.past = next_prompt(self.tokenizer, asked, self.past, answer)

    def go_on(self) -> None:
        """Ask the next turn, which has room."""
        if self.answers:
            self.messages += self.conversation.turns[len(self.answers)]

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"id": self.conversation.id, "sample": self.sample}
        if len(self.conversation.turns) == len(self.conversation.turns[0]) == 1:
            prompt, response = (message["content"] for message in self.messages)
            return {**row, "prompt": prompt, "response": response, "response_ids": self.answers[0]}
        return {**row, "messages": self.messages, "response_ids": self.answers}


class Answerer:
    """A target, perhaps with a draft, that answers batches of dialogues."""

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: AnswerSettings,
        draft: PardDraftModel | None = None,
        num_assistant_tokens: int | None = None,
    ):
        self.target = target if draft is None else with_pard(target)
        self.tokenizer, self.settings, self.draft = tokenizer, settings, draft
        self.num_positions = min(num_positions(model.config) for model in (target, draft) if model is not None)
        self.stats = DecodingStats()
        ends = target.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.end_token_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
        pads = (target.generation_config.pad_token_id, tokenizer.pad_token_id, *self.end_token_ids, 0)
        self.pad_token_id = next(pad for pad in pads if pad is not None)
        self.generate_kwargs = {
            **settings.generate_kwargs(),
            "eos_token_id": self.end_token_ids or None,
            "pad_token_id": self.pad_token_id,
            "return_dict_in_generate": True,
        }
        if draft is not None:
            self.generate_kwargs |= {"assistant_model": draft, "num_assistant_tokens": num_assistant_tokens}

    def identity(self) -> dict[str, Any]:
        """What the answers depend on; the draft is not among it, for it only makes them sooner."""
        own = self.target.generation_config.to_diff_dict()
        own = {name: own[name] for name in OWN_SETTINGS if name in own}
        return {
            "target": model_name(self.target),
            "settings": {
                **asdict(self.settings),
                "dtype": str(self.target.dtype).removeprefix("torch."),
                "generation_config": own,
                "chat_template_sha256": digest(self.tokenizer.chat_template),
                "weights_sha256": weights_digest(self.target),
            },
        }

    def check(self, conversations: Iterable[Conversation], skip_bad_rows: bool = False) -> Iterator[Conversation]:
        """The conversations that the chat template can write.

        Raises:
            ValueError: It refuses one (turns of a system, say); its place is named. With `skip_bad_rows` such
                conversations are logged and left out.
        """
        for conversation in conversations:
            problem = self.why_not_written(conversation)
            if problem is None:
                yield conversation
            elif skip_bad_rows:
                logger.warning("%s skipped: %s", conversation.place, problem)
            else:
                raise ValueError(
                    f"Expected a conversation that the target's chat template can write in {conversation.place}, but "
                    f"{problem}. Mend it, or pass `--skip-bad-rows` to go on without it."
                )

    def why_not_written(self, conversation: Conversation) -> str | None:
        """Say what keeps the chat template from writing a conversation; `None` when nothing does."""
        messages = [message for turn in conversation.turns for message in (*turn, PLACEHOLDER)]
        if self.tokenizer.chat_template is None and len(messages) > 2:
            return (
                "the target's tokenizer has no chat template, which would say whose words are whose (a row with one "
                "`prompt` needs none)"
            )
        try:
            encode_prompt(self.tokenizer, messages[:-1])
        except Exception as error:  # Templates raise what they like at turns they do not know.
            return f"it fails: {error}"
        return None

    def dialogues(self, conversations: Iterable[Conversation], done: set[tuple[str, int]]) -> list[Dialogue]:
        """What is still to be answered, conversations of as many turns and like length together, longest first."""
        waiting = []
        for conversation in conversations:
            samples = [n for n in range(self.settings.num_samples) if (conversation.digest, n) not in done]
            messages = list(conversation.turns[0])
            past = encode_prompt(self.tokenizer, messages) if samples else []
            waiting += [Dialogue(conversation, n, self.tokenizer, past, list(messages)) for n in samples]
        return sorted(waiting, key=lambda d: (len(d.conversation.turns), len(d.past)), reverse=True)

    def has_room(self, prompt: list[int]) -> bool:
        return len(prompt) + self.settings.max_new_tokens <= self.num_positions

    def answer(self, batch: Sequence[Dialogue]) -> None:
        """Answer every turn of a batch of dialogues that has room, turn by turn."""
        while waiting := list(self.waiting(batch)):
            for dialogue, answer in zip(waiting, self.generate(waiting), strict=True):
                dialogue.take(answer)

    def waiting(self, batch: Sequence[Dialogue]) -> Iterator[Dialogue]:
        for dialogue in batch:
            if not dialogue.is_finished and self.has_room(dialogue.past):
                dialogue.go_on()
                yield dialogue

    def generate(self, dialogues: Sequence[Dialogue]) -> list[list[int]]:
        """The next answer of each dialogue, up to and with its end token."""
        prompts = [torch.tensor(dialogue.past) for dialogue in dialogues]
        device = input_device(self.target)
        ids = pad_sequence(prompts, True, self.pad_token_id, "left").to(device)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(self.seed_of(dialogues))
            output = self.target.generate(input_ids=ids, attention_mask=mask, **self.generate_kwargs)
        self.stats += getattr(output, "stats", None) or DecodingStats()
        return [self.cut(answer) for answer in output.sequences[:, ids.shape[1] :].tolist()]

    def seed_of(self, dialogues: Sequence[Dialogue]) -> int:
        """A seed of its own for every turn of every batch: the order of batches plays no part."""
        who = [(d.conversation.digest, d.sample, len(d.answers)) for d in dialogues]
        return int(digest(json.dumps([self.settings.seed, who])), 16)

    def cut(self, answer: list[int]) -> list[int]:
        end = next((n for n, token in enumerate(answer) if token in self.end_token_ids), len(answer))
        return answer[: end + 1]


def digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()[:16]


def model_name(model: PreTrainedModel) -> str:
    """A Hub id, the last part of a folder, or the class of a model that comes from neither."""
    name = model.config.name_or_path
    if name in bundled_pair():
        return f"bundled {Path(name).name}"
    return shown_model(name) if name else type(model).__name__


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of the first values of every weight: it tells a model from one of the same name trained further.

    Of a weight that is offloaded the shape alone counts.
    """
    sha256 = hashlib.sha256()
    for name, weight in model.named_parameters():
        sha256.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.is_meta:
            continue
        sha256.update(weight.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return sha256.hexdigest()[:16]
