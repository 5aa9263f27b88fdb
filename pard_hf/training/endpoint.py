"""Let a target that a server runs write the answers: one that speaks OpenAI's completions API, such as `vllm serve`.

Prompts are sent as token ids, so that the chat template is applied here, as for a target of our own. vLLM returns the
very tokens of an answer; what another server returns as text is encoded again.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from ..tokens import until_end

# Long answers of a large batch take long.
SECONDS = 3600.0


class Endpoint:
    """A server at an address such as `http://127.0.0.1:8000/v1`; the key is taken from `OPENAI_API_KEY`.

    Args:
        url (`str`):
            What comes before `/completions`.
        model (`str`, *optional*):
            The name under which the model is served; defaults to the first that the server lists.

    Raises:
        ValueError: The address is none of http or https.
        OSError: The server does not answer, or not as it should.
    """

    def __init__(self, url: str, model: str | None = None):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"Expected an endpoint such as `http://127.0.0.1:8000/v1`, got {url!r}. Correct it.")
        self.url = url.rstrip("/")
        self.model = model or str(self.part(self.ask("models"), "data")[0]["id"])

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request, and return the JSON that comes back."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace").strip()
            raise OSError(f"Expected `{self.url}` to answer, got {error.code} {error.reason}: {said}") from error
        except (OSError, ValueError) as error:
            raise OSError(
                f"Expected an OpenAI-compatible server at `{self.url}`, but: {error}. Start it, or correct the URL."
            ) from error
        return found

    def part(self, answer: Any, name: str) -> list[dict[str, Any]]:
        """Return the list of this name in an answer."""
        parts = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(parts, list) or not parts:
            raise OSError(f"Expected `{name}` in the answer of `{self.url}`, got {str(answer)[:200]!r}.")
        return parts

    def complete(
        self, prompts: Sequence[list[int]], end_token_ids: Sequence[int], tokenizer: Any, **sampling: Any
    ) -> list[list[int]]:
        """Continue prompts, token ids, by the `sampling` of the API; return new tokens up to and with an end token."""
        body = {"model": self.model, "prompt": list(prompts), "stop_token_ids": list(end_token_ids), **sampling}
        choices = self.part(self.ask("completions", {**body, "return_token_ids": True}), "choices")
        if len(choices) != len(prompts):
            raise OSError(f"Expected {len(prompts)} answers of `{self.url}`, got {len(choices)}.")
        choices.sort(key=lambda choice: choice.get("index", 0))
        return [tokens_of(choice, end_token_ids, tokenizer) for choice in choices]


def tokens_of(choice: dict[str, Any], end_token_ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Return the tokens of an answer, with an end token where the model ended it."""
    tokens = choice.get("token_ids")
    if tokens is None:
        tokens = tokenizer.encode(choice["text"], add_special_tokens=False)
    if choice.get("finish_reason") == "stop" and end_token_ids and (not tokens or tokens[-1] not in end_token_ids):
        tokens = [*tokens, end_token_ids[0]]
    return until_end(tokens, list(end_token_ids))
