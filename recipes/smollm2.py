"""Make a draft for SmolLM2-135M-Instruct out of its own layers.

    python recipes/smollm2.py --data FOLDER --answers answers.jsonl.gz --minutes 8

`FOLDER` holds training text as `.jsonl.gz` (the files of `PROMPTS` and `TEXTS`), `--answers` the target's own answers,
as `pard data` writes them. Stages: token files, base (short trials choose layers of the target and a learning rate),
healing (next-token prediction on everything, by the target's distribution), draft (mask rows on answers, with a
correction head), and the draft in its small form. Each writes into `--work` and is skipped when its result is there;
those that train share `--minutes`. Embedding and LM head stay the target's. The mask token is `<empty_output>`, which
the chat template never prints: the vocabulary stays that of the target.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from bundled_pair import Muon
from pard_hf import PardDraftModel, PardTrainer, PardTrainingArguments
from pard_hf.draft.layers import base_from_layers
from pard_hf.draft.packaged import WEIGHTS_FILE, save_packaged
from pard_hf.evaluation.acceptance import AcceptanceEvaluator
from pard_hf.evaluation.prompts import load_prompt_sets
from pard_hf.hub.model_card import card_source, model_card
from pard_hf.io import conditions_of, write_whole
from pard_hf.loading import default_device
from pard_hf.smollm2 import HUB_ID, smollm2_folder
from pard_hf.tokens import encode_prompt
from pard_hf.training.collator import pack_rows
from pard_hf.training.data import read_rows, tokenize_rows
from pard_hf.training.token_file import TokenFile, write_token_file
from pard_hf.training.trainer import prepare_trained

PROMPTS, TEXTS = ("code_functions", "code_instruct", "math_gsm8k"), ("code_files", "code_leetcode", "stories")
MASK_TOKEN_ID = 16
LENGTH = 512
NUM_DRAFT_TOKENS = 8
HEAD_RANK = 64
# The share of the minutes that goes to healing; rows of one depth are cheap.
HEALING_SHARE = 0.3
# The share that goes to each probe: a short healing of each choice of layers, of which the best goes on.
PROBE_SHARE = 0.03
# How often the target's answers are seen for each pass over the other rows.
ANSWER_REPEATS = {"healing": 1, "draft": 2}


def token_files(data: Path, answers: Path, tokenizer: Any, work: Path) -> None:
    """Write the packed rows of answers, of prompts with their responses, and of plain text."""
    makers = {"answers": lambda: tokenize_rows(tokenizer, read_rows(answers), LENGTH, mask_token_id=MASK_TOKEN_ID)}
    makers["prompts"] = lambda: tokenize_rows(
        tokenizer, map(as_chat, read_all(data, PROMPTS)), LENGTH, True, mask_token_id=MASK_TOKEN_ID
    )
    makers["texts"] = lambda: windows(tokenizer, read_all(data, TEXTS))
    for name, make in makers.items():
        file = work / f"{name}.safetensors"
        if not file.exists():
            rows = list(make())
            packed = pack_rows(rows, LENGTH)
            random.Random(0).shuffle(packed)
            write_token_file(packed, file)
            print(f"{name}: {len(rows)} rows, {sum(len(row['input_ids']) for row in rows) / 1e6:.2f} M tokens")


def read_all(data: Path, names: tuple[str, ...]) -> Iterator[Any]:
    for name in names:
        yield from read_rows(data / f"{name}.jsonl.gz")


def as_chat(row: Any) -> dict[str, Any]:
    """Put a prompt and its response in the form of a chat; code goes into a fence, as the target writes it."""
    prompt, response = row["prompt"], row["response"]
    if prompt.lstrip().startswith(("def ", "class ", "@", "async ")):
        prompt, response = (
            f"Complete this Python function:\n```python\n{prompt}\n```",
            f"```python\n{prompt}{response}\n```",
        )
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}


def windows(tokenizer: Any, rows: Iterator[Any]) -> Iterator[dict[str, list[int]]]:
    """Cut plain text into windows of `LENGTH` tokens, each learned whole."""
    for row in rows:
        text = row.get("text") or row["prompt"] + row["response"]
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        for start in range(0, len(ids), LENGTH):
            window = ids[start : start + LENGTH]
            if len(window) > 1 and MASK_TOKEN_ID not in window:
                yield {"input_ids": window, "loss_mask": [1] * len(window)}


class LearnedWhole(TokenFile):
    """Rows whose prompts are learned as well."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = super().__getitem__(index)
        return {**example, "loss_mask": [1] * len(example["input_ids"])}


def train(args: Any, stage: str, start: Path, out: Path, share: float, choice: str) -> None:
    """Run one of the two stages that train, `healing` or `draft`, in a share of the minutes."""
    is_healing = stage == "healing"
    file = LearnedWhole if is_healing else TokenFile
    answers, prompts, texts = (file(args.work / f"{name}.safetensors") for name in ("answers", "prompts", "texts"))
    rows = ConcatDataset([*[answers] * ANSWER_REPEATS[stage], prompts, *([texts] if is_healing else [])])
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).eval()
    draft = PardDraftModel.from_causal_lm(
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32), MASK_TOKEN_ID, NUM_DRAFT_TOKENS
    )
    arguments = PardTrainingArguments(
        str(out / "checkpoints"), objective="kd", num_draft_tokens=1 if is_healing else NUM_DRAFT_TOKENS,
        correction_head=None if is_healing else "joint", correction_head_rank=HEAD_RANK, freeze_embeddings=True,
        max_minutes=args.minutes * share,
        per_device_train_batch_size=args.batch_size, warmup_steps=20, bf16=args.bf16, max_grad_norm=1.0,
        logging_steps=args.logging_steps, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_num_workers=args.workers, dataloader_pin_memory=args.device == "cuda",
        use_cpu=args.device == "cpu",
    )  # fmt: skip
    prepare_trained(draft, arguments)
    optimizer = Muon(draft, float(choice.partition("@")[2]), args.adam_learning_rate)
    trainer = PardTrainer(draft, arguments, target, train_dataset=rows, optimizers=(optimizer, None))
    if args.device == "cuda" or args.warm_up:
        warm_up(trainer)
    trainer.train()
    draft.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "log.json").write_text(json.dumps(trainer.state.log_history))


def warm_up(trainer: PardTrainer) -> None:
    """Compile what a step compiles, before the clock runs."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.to(trainer.args.device).train()
    batch = {name: values.to(trainer.args.device) for name, values in batch.items() if name != "sources"}
    with trainer.compute_loss_context_manager():
        trainer.model(objective=trainer.objective, batch=batch).backward()
    trainer.model.zero_grad()


def package(draft: Path, out: Path, megabytes: float | None) -> None:
    """Write the draft as it ships, and its weights in pieces of at most so many MB, which `cat` joins."""
    save_packaged(PardDraftModel.from_pretrained(draft), out)
    if megabytes is None:
        return
    weights, size = (out / WEIGHTS_FILE).read_bytes(), int(megabytes * 1e6)
    for number, start in enumerate(range(0, len(weights), size)):
        (out / f"{WEIGHTS_FILE}.{number:02}").write_bytes(weights[start : start + size])


def probe(args: Any, out: Path) -> None:
    """Heal a base of each choice for a short time; go on with the one that has the least loss at the end."""
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16)
    found = {}
    for choice in args.probes:
        folder = args.work / f"probe-{choice}"
        if not is_done(folder / "healed"):
            base_from_layers(model, layers_of(choice)).save_pretrained(folder / "base")
            train(args, "healing", folder / "base", folder / "healed", PROBE_SHARE, choice)
        log = read_log(folder / "healed")
        losses = [float(entry.get("loss", entry.get("train_loss"))) for entry in log]
        found[choice] = sum(losses[-3:]) / len(losses[-3:])
        print(f"probe {choice}: loss {found[choice]:.3f}", flush=True)
    best = min(found, key=found.__getitem__)
    (args.work / "choice.json").write_text(json.dumps({"choice": best, "losses": found}), encoding="utf-8")
    (args.work / f"probe-{best}" / "healed").rename(out)


def evaluate(args: Any, draft: Path, out: Path) -> None:
    """Measure the acceptance of the draft on each prompt set, in chains with its correction head."""
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    rows = {name: found[: args.limit] for name, found in load_prompt_sets(args.prompts).items()}
    prompts = {name: [encode_prompt(tokenizer, row["prompt"]) for row in found] for name, found in rows.items()}
    evaluator = AcceptanceEvaluator(target, prompts, max_new_tokens=args.max_new_tokens, batch_size=1)
    measured = evaluator(PardDraftModel.from_pretrained(draft, dtype=torch.float32).to(args.device))
    sets = {
        name: {"acceptance": {**stats.to_dict(), "num_prompts": len(prompts[name])}}
        for name, stats in measured.items()
    }
    result = {**conditions_of(target), "max_new_tokens": args.max_new_tokens, "num_assistant_tokens": NUM_DRAFT_TOKENS}
    write_whole(out, json.dumps({**result, "sets": sets}, indent=1))


def is_done(folder: Path) -> bool:
    return (folder / "log.json").exists()


def layers_of(choice: str) -> list[int]:
    return [int(layer) for layer in choice.partition("@")[0].split(",")]


def read_log(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "log.json").read_text(encoding="utf-8"))


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the training text (*.jsonl.gz)")
    parser.add_argument("--answers", type=Path, help="the target's own answers (.jsonl.gz)")
    parser.add_argument("--target", help="folder of the target (default: from PyPI)")
    parser.add_argument("--work", type=Path, default=Path("smollm2"), help="folder for the results of stages")
    parser.add_argument("--minutes", type=float, default=8, help="of training, in all")
    parser.add_argument(
        "--probes", nargs="+", default=["0,1,2,3@8e-3", "0,10,20,29@8e-3", "0,1,2,29@8e-3", "0,10,20,29@2e-2"],
        metavar="LAYERS@RATE", help="layers to begin with and learning rate of matrices; the best is kept",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=32, help=f"sequences of {LENGTH} tokens a step")
    parser.add_argument("--adam-learning-rate", type=float, default=2e-3, help="of everything else")
    parser.add_argument("--warm-up", action="store_true", help="run one step before the clock, as a GPU does")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--logging-steps", type=int, default=20)
    parser.add_argument("--prompts", nargs="+", default=["demo"], help="prompt sets to evaluate on")
    parser.add_argument("--limit", type=int, default=8, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of each answer that is evaluated")
    parser.add_argument("--split-files", type=float, help="write the packaged weights in pieces of so many MB as well")
    args = parser.parse_args()
    args.device = default_device()
    args.bf16 = args.device == "cuda"
    torch._dynamo.config.suppress_errors = True  # A kernel that cannot be compiled runs as it is.
    args.target = args.target or smollm2_folder()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    token_files(args.data, args.answers, tokenizer, args.work)
    base, healed, draft = (args.work / name for name in ("base", "healed", "draft"))
    if not is_done(base):
        probe(args, base)
    choice = json.loads((args.work / "choice.json").read_text(encoding="utf-8"))["choice"]
    if not is_done(healed):
        train(args, "healing", base, healed, HEALING_SHARE, choice)
    if not is_done(draft):
        train(args, "draft", healed, draft, 1 - HEALING_SHARE - PROBE_SHARE * len(args.probes), choice)
    package(draft, args.work / "packaged", args.split_files)
    measured = args.work / "evaluation.json"
    if not measured.exists():
        evaluate(args, draft, measured)
    stated = {"license": "apache-2.0", "base_model": HUB_ID, "target": HUB_ID}
    model_card(card_source(str(draft), [measured], **stated)).save(draft / "README.md")


if __name__ == "__main__":
    main()
