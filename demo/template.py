"""Chat templates of models that visitors name: the plainest of what no limit of time ends is refused unrendered."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

# Templates count messages and pad lines; no number in one is larger.
LARGEST_NUMBER = 10**6
# The one kind of block that transformers adds to those of jinja.
OWN_BLOCKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def check_template(tokenizer: Any) -> None:
    """Raise a `ValueError` for a chat template with powers or huge numbers.

    Python computes these in one step, which neither Stop nor a limit can interrupt.
    """
    template = getattr(tokenizer, "chat_template", None)
    for text in template.values() if isinstance(template, dict) else [template]:
        if not isinstance(text, str):
            continue
        try:
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(OWN_BLOCKS.sub("", text))
        except TemplateSyntaxError:  # It cannot be rendered either.
            continue
        numbers = [node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, int | float)]
        if any(parsed.find_all(nodes.Pow)) or any(abs(number) > LARGEST_NUMBER for number in numbers):
            raise ValueError(
                f"Expected a chat template without powers or numbers above {LARGEST_NUMBER:,}, which nothing could "
                "stop, got one with them. Choose another target."
            )
