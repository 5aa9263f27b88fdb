"""The flags that name a pair of models, and loading it."""

from __future__ import annotations

import argparse
from typing import Any

# Outputs that had to be equal were not.
EXIT_DIFFERENT = 3


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="folder or Hub id of the target model (default: the bundled target)")
    parser.add_argument("--draft", help="folder or Hub id of the draft model (default: the bundled draft)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the checkpoint's; float32 on a CPU)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to generate at most (default: 128)")


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--num-assistant-tokens", type=int, help="K, draft tokens proposed a round (default: the draft's own)"
    )
    parser.add_argument(
        "--assistant-tree-size", type=int, help="N, nodes of a tree verified a round; 0 = chain (default: the draft's)"
    )


def load(args: argparse.Namespace) -> Any:
    """Load the pair that the flags name, and fill in its K where they name none."""
    from transformers.utils import logging

    from ..loading import load_pair

    logging.disable_progress_bar()
    pair = load_pair(args.target, args.draft, args.dtype, args.device)
    if args.num_assistant_tokens is None:
        args.num_assistant_tokens = pair.draft.num_assistant_tokens
    return pair


def load_perhaps_without_draft(args: argparse.Namespace) -> Any:
    """Load the pair that the flags name; a target that is named alone comes without a draft (`None`)."""
    from transformers.utils import logging

    from ..loading import Pair, load_pair, load_target

    logging.disable_progress_bar()
    if args.target is not None and args.draft is None:
        target, tokenizer = load_target(args.target, args.dtype, args.device)
        return Pair(target, None, tokenizer)
    return load_pair(args.target, args.draft, args.dtype, args.device)
