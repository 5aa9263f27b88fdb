"""`pard …`: parsing and printing only."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

GREEN, UNDERLINE, RESET = "\033[32m", "\033[4m", "\033[0m"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pard", description="Parallel draft models for transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_generate(commands)
    add_demo(commands)
    add_train(commands)
    return parser


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="folder or Hub id of the target model (default: the bundled target)")
    parser.add_argument("--draft", help="folder or Hub id of the draft model (default: the bundled draft)")
    parser.add_argument("--dtype", default="auto", help="weights and compute (default: the fastest for the device)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    parser.add_argument(
        "--num-assistant-tokens", type=int, help="K, draft tokens proposed a round (default: the draft's own)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to generate at most (default: 128)")


def add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="complete a prompt", description="Complete one prompt.")
    parser.add_argument("prompt", nargs="?", help="the prompt; '-' or nothing reads standard input")
    parser.add_argument("--file", type=Path, help="read the prompt from a file")
    add_pair_arguments(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, help="seed for sampling")
    parser.add_argument("--raw", action="store_true", help="do not put the prompt into the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="tint accepted tokens")
    parser.set_defaults(run=run_generate)


def add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="plain generate and ours on real prompts", description="Race plain generate against PARD."
    )
    add_pair_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a prompt and route (default: 3)")
    parser.set_defaults(run=run_demo)


def add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="adapt a small causal LM into a parallel draft",
        description="Adapt a small causal LM into a parallel draft. Rows: {text}, {prompt, response} or {messages}.",
    )
    parser.add_argument("--base", required=True, help="folder or Hub id of a small causal LM of the target's family")
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="training rows, .jsonl or .jsonl.gz")
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and the finished draft")
    parser.add_argument("--mask-token-id", required=True, type=int, help="id the tokenizer never produces")
    parser.add_argument("--num-draft-tokens", type=int, default=8, help="K_train, depths trained (default: 8, paper)")
    parser.add_argument("--retention-rate", type=float, default=0.7, help="r of COD (default: 0.7, paper)")
    parser.add_argument("--min-retention-rate", type=float, default=0.2, help="r_min of COD (default: 0.2, paper)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens a row is cut at (default: 512)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows (default: 1)")
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps, instead of epochs")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step and device (default: 8)")
    parser.add_argument("--learning-rate", type=float, default=3e-5, help="(default: 3e-5, paper, Qwen2.5)")
    parser.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints (default: 200)")
    parser.add_argument("--dtype", default="float32", help="weights and compute (default: float32)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu keeps off the GPU")
    parser.add_argument("--seed", type=int, default=42, help="(default: 42)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave broken rows out instead of stopping")
    parser.add_argument("--restart", action="store_true", help="move checkpoints in --output aside and begin anew")
    parser.set_defaults(run=run_train)


class TintedStreamer:
    """Prints tokens as they come; accepted draft tokens are tinted, the target's own are plain."""

    def __init__(self, tokenizer: Any, is_tinted: bool):
        self.tokenizer = tokenizer
        self.is_tinted = is_tinted
        self.ids: list[int] = []
        self.shown = ""
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.show(value, "")

    def put_accepted(self, value: Any) -> None:
        self.show(value, GREEN if self.is_tinted else "")

    def show(self, value: Any, tint: str) -> None:
        self.ids.extend(value.tolist())
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return  # A character whose bytes are not all here yet.
        new, self.shown = text[len(self.shown) :], text
        sys.stdout.write(f"{tint}{new}{RESET}" if tint and new else new)
        sys.stdout.flush()
        if text.endswith("\n"):  # Decode no more than a line again and again; the break keeps its neighbour's space.
            self.ids = self.ids[-1:]
            self.shown = self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def end(self) -> None:
        sys.stdout.write("\n")


def read_prompt(args: argparse.Namespace) -> str:
    if args.file is not None and args.prompt is not None:
        raise ValueError("Expected a prompt or `--file`, got both. Drop one of them.")
    if args.file is not None:
        prompt = args.file.read_text(encoding="utf-8")
    elif args.prompt in (None, "-"):
        prompt = sys.stdin.read()
    else:
        prompt = args.prompt
    if not prompt.strip():
        raise ValueError("Expected a prompt, got nothing but white space. Pass it as an argument, `--file` or stdin.")
    return prompt


def encode(tokenizer: Any, prompt: str, raw: bool = False) -> Any:
    """A prompt as model inputs, in the tokenizer's chat template where it has one."""
    if raw or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def load(args: argparse.Namespace) -> Any:
    from transformers.utils import logging

    from .pair import load_pair

    logging.disable_progress_bar()
    pair = load_pair(args.target, args.draft, args.dtype, args.device)
    if args.num_assistant_tokens is None:
        args.num_assistant_tokens = pair.draft.num_assistant_tokens
    return pair


def run_generate(args: argparse.Namespace) -> int:
    import torch

    if args.temperature < 0:
        raise ValueError(f"Expected `--temperature` of at least 0, got {args.temperature}.")
    prompt = read_prompt(args)
    pair = load(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    inputs = encode(pair.tokenizer, prompt, args.raw).to(pair.target.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    is_tinted = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    start = time.perf_counter()
    output = pair.target.generate(
        **inputs,
        **sampling,
        max_new_tokens=args.max_new_tokens,
        num_assistant_tokens=args.num_assistant_tokens,
        assistant_model=pair.draft,
        streamer=None if args.json else TintedStreamer(pair.tokenizer, is_tinted),
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    result = {
        "text": pair.tokenizer.decode(new, skip_special_tokens=True),
        "num_new_tokens": len(new),
        "seconds": round(seconds, 4),
        "tokens_per_second": round(len(new) / seconds, 2),
        "num_assistant_tokens": args.num_assistant_tokens,
        **output.stats.to_dict(),
    }
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(
            f"{result['num_new_tokens']} tokens · {result['tokens_per_second']} tokens/s (prefill included) · "
            f"τ {output.stats.acceptance_length:.2f} · α {output.stats.acceptance_rate:.2f} · "
            f"{output.stats.num_rounds} rounds of K = {args.num_assistant_tokens}",
            file=sys.stderr,
        )
    return 0


def run_demo(args: argparse.Namespace) -> int:
    from .evaluation.race import DEMO_PROMPTS, race

    pair = load(args)
    device, dtype = pair.target.device, str(pair.target.dtype).removeprefix("torch.")
    print(f"K = {args.num_assistant_tokens} · {dtype} · {device} · greedy · up to {args.max_new_tokens} new tokens\n")
    results = []
    for number, prompt in enumerate(DEMO_PROMPTS, start=1):
        print(f"[{number}/{len(DEMO_PROMPTS)}] {prompt.rstrip()}")
        result = race(
            pair, encode(pair.tokenizer, prompt), args.num_assistant_tokens, args.max_new_tokens, args.repeats
        )
        results.append(result)
        print(f"\n{UNDERLINE if sys.stdout.isatty() else ''}plain generate{RESET if sys.stdout.isatty() else ''}")
        print(result.plain_text.rstrip())
        print(f"\n{UNDERLINE if sys.stdout.isatty() else ''}with the draft{RESET if sys.stdout.isatty() else ''}")
        print(result.pard_text.rstrip())
        print(
            f"\n  identical: {'yes' if result.is_identical else 'NO'} · {result.num_new_tokens} tokens · plain "
            f"{result.plain_rate:.0f} tokens/s · PARD {result.pard_rate:.0f} tokens/s · "
            f"τ {result.stats.acceptance_length:.2f} · speedup {result.speedup:.2f}\n",
            flush=True,
        )
    total = sum(results[1:], results[0])
    print(
        f"all prompts: identical {sum(r.is_identical for r in results)}/{len(results)} · plain "
        f"{total.plain_rate:.0f} tokens/s · PARD {total.pard_rate:.0f} tokens/s · "
        f"τ {total.stats.acceptance_length:.2f} · speedup {total.speedup:.2f}"
    )
    if args.target is None:
        print("The bundled pair is a stand-in to see the mechanism, not a useful assistant.")
    return 0


def run_train(args: argparse.Namespace) -> int:
    from .training.run import train_draft

    draft_dir = train_draft(
        base=args.base,
        data=args.data,
        output=args.output,
        mask_token_id=args.mask_token_id,
        max_length=args.max_length,
        dtype=args.dtype,
        skip_bad_rows=args.skip_bad_rows,
        restart=args.restart,
        num_draft_tokens=args.num_draft_tokens,
        retention_rate=args.retention_rate,
        min_retention_rate=args.min_retention_rate,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        save_steps=args.save_steps,
        seed=args.seed,
        use_cpu=args.device == "cpu",
    )
    print(json.dumps({"draft": str(draft_dir)}))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; bad input ends with a sentence and exit code 2, never a stack trace."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"pard {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pard {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
