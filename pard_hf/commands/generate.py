"""`pard generate`: one prompt, streamed; or the prompts of files, in batches."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..io import read_text, why_no_text
from .models import add_pair_arguments, load
from .streamer import TintedStreamer


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "generate", help="complete prompts", description="Complete one prompt, or all prompts of files."
    )
    parser.add_argument("prompt", nargs="?", help="the prompt; '-' or nothing reads standard input")
    parser.add_argument(
        "--file",
        type=Path,
        action="append",
        help="read a prompt from a text file, or one from each row of a .jsonl file (`prompt`); may be given again",
    )
    add_pair_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="texts at a time, for several prompts (default: 8)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, help="seed for sampling")
    parser.add_argument("--raw", action="store_true", help="do not put the prompt into the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt instead of text")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="tint accepted tokens")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    if args.temperature < 0:
        raise ValueError(f"Expected `--temperature` of at least 0, got {args.temperature}.")
    if args.batch_size < 1:
        raise ValueError(f"Expected `--batch-size` of at least 1, got {args.batch_size}.")
    prompts = read_prompts_of(args)
    pair = load(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if isinstance(prompts, str):
        complete_one(args, pair, prompts)
    else:
        complete_all(args, pair, prompts)
    return 0


def read_prompts_of(args: argparse.Namespace) -> str | list[str]:
    """The one prompt to stream, or the list to run in batches."""
    from ..evaluation.prompts import read_prompts

    files = args.file or []
    if files and args.prompt is not None:
        raise ValueError("Expected a prompt or `--file`, got both. Drop one of them.")
    if len(files) > 1 or any(map(is_rows, files)):
        prompts: list[str] = []
        for file in files:
            is_list = is_rows(file)
            prompts += [row["prompt"] for row in read_prompts(file)] if is_list else [read_text(file)]
        if not prompts:
            raise ValueError("Expected at least one prompt in the files, got none. Add a row with a `prompt`.")
        return [checked(prompt) for prompt in prompts]
    if files:
        return checked(read_text(files[0]))
    return checked(sys.stdin.read() if args.prompt in (None, "-") else args.prompt)


def is_rows(file: Path) -> bool:
    return file.name.endswith((".jsonl", ".jsonl.gz"))


def checked(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("Expected a prompt, got nothing but white space. Pass it as an argument, `--file` or stdin.")
    problem = why_no_text(prompt)
    if problem is not None:
        raise ValueError(f"Expected a prompt in UTF-8, but the prompt has {problem.removeprefix('it has ')}. Mend it.")
    return prompt


def generate(args: argparse.Namespace, pair: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    """Generate by the flags of the command."""
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    return pair.target.generate(
        **inputs,
        **sampling,
        **kwargs,
        max_new_tokens=args.max_new_tokens,
        num_assistant_tokens=args.num_assistant_tokens,
        assistant_tree_size=args.assistant_tree_size,
        assistant_model=pair.draft,
        return_dict_in_generate=True,
    )


def complete_one(args: argparse.Namespace, pair: Any, prompt: str) -> None:
    """Stream the text of one prompt, or print it with what it took as JSON."""
    from ..evaluation.prompts import encode_prompt, make_batches
    from ..host import pad_token_id

    ids = encode_prompt(pair.tokenizer, prompt, args.raw)
    [batch] = make_batches([ids], 1, pad_token_id(pair.target.generation_config), pair.target.device)
    is_tinted = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    start = time.perf_counter()
    output = generate(
        args, pair, batch.inputs, streamer=None if args.json else TintedStreamer(pair.tokenizer, is_tinted)
    )
    seconds = time.perf_counter() - start
    new = output.sequences[0, batch.num_columns :]
    if args.json:
        result = {
            "text": pair.tokenizer.decode(new, skip_special_tokens=True),
            "num_new_tokens": len(new),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(len(new) / seconds, 2),
            "num_assistant_tokens": args.num_assistant_tokens,
            **output.stats.to_dict(),
        }
        print(json.dumps(result, ensure_ascii=False))
    else:
        print_summary(len(new), seconds, output.stats, args.num_assistant_tokens)


def complete_all(args: argparse.Namespace, pair: Any, prompts: list[str]) -> None:
    """Run prompts in batches of like length; print the texts in the order of the prompts."""
    from ..evaluation.prompts import encode_prompt, make_batches
    from ..generation.stats import DecodingStats
    from ..host import end_token_ids, pad_token_id

    encoded = [encode_prompt(pair.tokenizer, prompt, args.raw) for prompt in prompts]
    ends = end_token_ids(pair.target.generation_config)
    texts: dict[int, list[int]] = {}
    stats, start = DecodingStats(), time.perf_counter()
    for batch in make_batches(
        encoded, args.batch_size, pad_token_id(pair.target.generation_config), pair.target.device
    ):
        output = generate(args, pair, batch.inputs)
        texts |= batch.new_texts(output.sequences, ends)
        stats += output.stats
    seconds = time.perf_counter() - start
    for index, prompt in enumerate(prompts):
        text = pair.tokenizer.decode(texts[index], skip_special_tokens=True)
        if args.json:
            result = {"prompt": prompt, "text": text, "num_new_tokens": len(texts[index])}
            print(json.dumps(result, ensure_ascii=False))
        else:
            print(f"[{index + 1}/{len(prompts)}] {prompt.rstrip()}\n\n{text.rstrip()}\n")
    print_summary(sum(map(len, texts.values())), seconds, stats, args.num_assistant_tokens)


def print_summary(num_new_tokens: int, seconds: float, stats: Any, num_assistant_tokens: int) -> None:
    print(
        f"{num_new_tokens} tokens · {num_new_tokens / seconds:.2f} tokens/s (prefill included) · "
        f"τ {stats.acceptance_length:.2f} · α {stats.acceptance_rate:.2f} · "
        f"{stats.num_rounds} rounds of K = {num_assistant_tokens}",
        file=sys.stderr,
    )
