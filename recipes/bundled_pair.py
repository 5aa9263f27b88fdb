"""Make the bundled pair from permissively licensed text: tokenizer, targets, their answers, draft, correction head.

    make bundled-pair DATA=FOLDER

`FOLDER` holds the files of `MIX` as `.jsonl.gz`. Each stage writes into `--work` and is skipped when its result is
there; interrupted stages continue. The target is undertrained: it exists so that acceptance, cost and the whole path
from training to `generate()` are real on a machine with no network and no GPU. A second target, of another depth and
width, stays in `--work`: one draft serves both.

Training rows are `<|begin|>prompt\\nresponse<|end|>` or `<|begin|>text<|end|>`: every row that is not cut has an end
token, so that stopping is learned.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)

from pard_hf import PardDraftModel, PardTrainer, PardTrainingArguments
from pard_hf.training.data import encode_row, read_rows, tokenize_rows
from pard_hf.training.responses import write_answers

# The padded vocabulary has ids above the tokenizer's last; the first of them is the draft's mask token.
VOCAB_SIZE, TOKENIZER_SIZE = 2048, 2040
MAX_ROW_TOKENS = 448
TARGET = {"hidden_size": 160, "intermediate_size": 416, "num_hidden_layers": 12, "num_attention_heads": 5}
WIDE_TARGET = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 8}
DRAFT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 3}
NUM_ASSISTANT_TOKENS = 8
# Training prompts that a target answers: the longest in tokens, and their number from each file, to settle the target
# and to adapt the draft.
LONGEST_PROMPT = 320
SETTLING_PROMPTS = {"code_functions": 1_800, "math_gsm8k": 1_200}
ADAPTING_PROMPTS = {"code_functions": 8_000, "math_gsm8k": 8_000, "code_leetcode": 1_500, "code_instruct": 1_500}
# How often a file's rows are seen for each pass over the mix.
MIX = {"math_gsm8k": 3, "code_functions": 2, "code_leetcode": 1, "code_instruct": 1}
# Optimizer steps: language modeling, against repetition (each of two turns), the draft's base, adaptation, its head.
STEPS = {"target": 2400, "settle": 180, "draft-base": 700, "draft": 6000, "head": 1800}
TRAINER: dict[str, Any] = {
    "save_steps": 200, "save_total_limit": 1, "logging_steps": 20, "report_to": "none", "disable_tqdm": True,
    "max_grad_norm": 1.0, "use_cpu": True, "train_sampling_strategy": "group_by_length",
}  # fmt: skip
# Matrices with a row for each token, which Adam trains.
TABLES = re.compile("embed|lm_head|correction_head")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% if not message['content'].endswith('\\n') %}{{ '\\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
)


def train_tokenizer(data: Path, out: Path) -> None:
    """Train byte-level BPE that never merges across a newline or between digits, where prompt and answer meet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"\n+|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?=[^\S\n]\S)|[^\S\n]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE, special_tokens=[*special.values()], initial_alphabet=alphabet, show_progress=False
    )
    keys = ("text", "prompt", "response")
    rows = (row for name in MIX for row in read_rows(data / f"{name}.jsonl.gz"))
    tokenizer.train_from_iterator((row[key] for row in rows for key in keys if key in row), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    options = {"padding_side": "left", "model_max_length": 2048, "clean_up_tokenization_spaces": False}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)


class Muon(torch.optim.Optimizer):
    """Orthogonalize the momentum of matrices (https://kellerjordan.github.io/posts/muon); Adam for the rest.

    `torch.optim.Muon` computes in bfloat16, which a CPU without matrix units runs eight times slower than float32.
    """

    def __init__(self, model: torch.nn.Module, lr: float, adam_lr: float):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and not TABLES.search(name)]
        others = [p for name, p in named if p.ndim != 2 or TABLES.search(name)]
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        super().__init__([{"params": matrices, "lr": lr}, {"params": others, "lr": adam_lr}], {})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        matrices, others = self.param_groups
        self.adam.param_groups[0]["lr"] = others["lr"]
        self.adam.step()
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for weight in matrices["params"]:
            by_shape.setdefault(weight.shape, []).append(weight)
            self.state[weight].setdefault("momentum", torch.zeros_like(weight)).lerp_(weight.grad, 0.05)
        for shape, weights in by_shape.items():
            momenta = torch.stack([self.state[weight]["momentum"] for weight in weights])
            grads = torch.stack([weight.grad for weight in weights])
            updates = orthogonalize(grads.lerp(momenta, 0.95)) * max(1, shape[0] / shape[1]) ** 0.5
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - matrices["lr"] * 0.1).add_(update, alpha=-matrices["lr"])

    def state_dict(self):
        return {"muon": super().state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Map a stack of matrices `[N, rows, columns]` towards the nearest with equal singular values."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def collate(rows: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right: causal attention keeps padding out of sight of every real token, so no mask is needed."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [row_ids.where(torch.tensor(row["loss_mask"]) == 1, -100) for row_ids, row in zip(ids, rows, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def pretrain(data: Path, tokenizer_dir: Path, shape: dict[str, int], steps: int, out: Path) -> None:
    """Train a language model of the mix from scratch."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    rows = []
    for name, repetitions in MIX.items():
        of_file = tokenize_rows(tokenizer, read_rows(data / f"{name}.jsonl.gz"), MAX_ROW_TOKENS, skip_bad_rows=True)
        rows += [{**row, "loss_mask": [1] * len(row["input_ids"])} for row in of_file for _ in range(repetitions)]
    random.Random(0).shuffle(rows)
    set_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        **shape, **ids, vocab_size=VOCAB_SIZE, num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    fit(model, tokenizer, rows, out, steps, lr=0.02, adam_lr=4e-3)


def fit(model: Any, tokenizer: Any, rows: list[Any], out: Path, steps: int, lr: float, adam_lr: float) -> None:
    """Train next-token prediction on rows with loss masks; the learning rate falls to 0 over `steps`."""
    print(f"{len(rows)} rows, {sum(sum(row['loss_mask']) for row in rows) / 1e6:.2f} M labels", flush=True)
    optimizer = Muon(model, lr, adam_lr)
    schedule = get_linear_schedule_with_warmup(optimizer, min(40, steps // 10), steps)
    options = {"max_steps": steps, "per_device_train_batch_size": 16, "remove_unused_columns": False, **TRAINER}
    trainer = Trainer(
        model,
        TrainingArguments(str(out / "checkpoints"), **options),
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        train_dataset=rows,
        optimizers=(optimizer, schedule),
    )
    finish(trainer, tokenizer, out)


def finish(trainer: Trainer, tokenizer: Any, out: Path) -> None:
    """Train, from the last checkpoint if there is one, and save the model with its tokenizer."""
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoints/checkpoint-*")) or None)
    trainer.model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def repeats(answer: list[int], size: int = 4) -> list[bool]:
    """Mark each token that completes an n-gram that the answer already has."""
    grams = [tuple(answer[max(end - size, 0) : end]) for end in range(1, len(answer) + 1)]
    return [len(gram) == size and gram in grams[:index] for index, gram in enumerate(grams)]


def without_loop(answer: list[int], breaks: set[int], end: int) -> list[int] | None:
    """End an answer at the last line break (or, failing that, the last token) before it begins to loop.

    A loop begins where two thirds of a dozen tokens repeat. Return `None` for an answer that is mostly repetition.
    """
    marks = repeats(answer)
    onset = next((i for i in range(len(answer) - 11) if sum(marks[i : i + 12]) >= 8), None)
    if onset is not None:
        line = next((i for i in range(onset, 3, -1) if answer[i - 1] in breaks), onset)
        answer = [*answer[:line], end]
    return answer if len(answer) >= 4 and sum(repeats(answer)) <= 0.2 * len(answer) else None


def settle_target(answers: Path, start: Path, steps: int, out: Path) -> None:
    """Train the target to end where it would begin to loop, on its own answers cut there.

    Loops look like high acceptance. The text before them stays the target's own, and as predictable for a draft as it
    was; unlikelihood training, tried first, made the target write unlikely text.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    breaks = {index for token, index in tokenizer.get_vocab().items() if "\u010a" in token}
    rows = []
    for row in read_rows(answers):
        answer = without_loop(row["response_ids"], breaks, tokenizer.eos_token_id)
        if answer is not None:
            rows.append(encode_row(tokenizer, {**row, "response_ids": answer}))
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    fit(model, tokenizer, rows, out, steps, lr=5e-3, adam_lr=1e-3)


def answer_training_prompts(data: Path, target_dir: Path, numbers: dict[str, int], out: Path) -> None:
    """Write the target's greedy answers to training prompts."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target_dir)
    target = LlamaForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    rows: list[dict[str, str]] = []
    for name, number in numbers.items():
        prompts = [row["prompt"] for row in read_rows(data / f"{name}.jsonl.gz") if "prompt" in row]
        prompts = [prompt for prompt in prompts if len(tokenizer(prompt)["input_ids"]) <= LONGEST_PROMPT]
        random.Random(0).shuffle(prompts)
        rows += [{"prompt": prompt} for prompt in prompts[:number]]
    write_answers(target, tokenizer, rows, out, batch_size=96, max_new_tokens=128)


def adapt(answers: Path, start: Path, steps: int, correction_head: str | None, out: Path) -> None:
    """Adapt a causal LM into the draft on the target's answers, or train a correction head on a finished draft."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    rows = list(tokenize_rows(tokenizer, read_rows(answers), MAX_ROW_TOKENS, skip_bad_rows=True))
    draft = PardDraftModel.from_pretrained(
        start, mask_token_id=TOKENIZER_SIZE, num_assistant_tokens=NUM_ASSISTANT_TOKENS, dtype=torch.float32
    )
    optimizers: tuple[Any, Any] = (None, None)  # AdamW, for the head.
    if correction_head is None:
        optimizer = Muon(draft, lr=0.01, adam_lr=2e-3)
        optimizers = (optimizer, get_linear_schedule_with_warmup(optimizer, 40, steps))
    options = {"max_steps": steps, "warmup_steps": min(30, steps // 10), "num_draft_tokens": NUM_ASSISTANT_TOKENS}
    options |= {"correction_head": correction_head, "per_device_train_batch_size": 32 if correction_head else 16}
    arguments = PardTrainingArguments(str(out / "checkpoints"), **options, **TRAINER)
    finish(PardTrainer(draft, arguments, train_dataset=rows, optimizers=optimizers), tokenizer, out)


def package(target_dir: Path, draft_dir: Path, out: Path) -> None:
    """Write the pair as it ships: bfloat16, shards of 14 MB, each with the tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target_dir)
    for name, kind, folder in (("target", LlamaForCausalLM, target_dir), ("draft", PardDraftModel, draft_dir)):
        model = kind.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(out / name, max_shard_size="14MB")
        tokenizer.save_pretrained(out / name)


def stage(function: Callable[..., None], *arguments: Any) -> Path:
    """Run a stage, whose last argument is the folder of its result, unless the result is there."""
    out = arguments[-1]
    if not any((out / name).exists() for name in ("model.safetensors", "tokenizer.json")):
        function(*arguments)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the training text (*.jsonl.gz)")
    parser.add_argument("--work", type=Path, default=Path("bundled-pair"), help="folder for the results of stages")
    parser.add_argument("--out", type=Path, default=Path("pard_hf/bundled"), help="folder for the finished pair")
    for name, number in STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=number, help=f"optimizer steps ({number})")
    args = parser.parse_args()
    missing = [f"{name}.jsonl.gz" for name in MIX if not (args.data / f"{name}.jsonl.gz").is_file()]
    if missing:
        parser.error(f"expected {', '.join(missing)} in `{args.data}`: name another --data")
    data, work = args.data, args.work
    tokenizer = stage(train_tokenizer, data, work / "tokenizer")
    target = stage(pretrain, data, tokenizer, TARGET, args.target_steps, work / "target")
    for turn in range(2):  # The second turn meets the loops that the first left over.
        looping, settled = work / f"looping-answers-{turn}.jsonl", work / f"target-settled-{turn}"
        if not (settled / "model.safetensors").exists():
            answer_training_prompts(data, target, SETTLING_PROMPTS, looping)
        target = stage(settle_target, looping, target, args.settle_steps, settled)
    base = stage(pretrain, data, tokenizer, DRAFT, args.draft_base_steps, work / "draft-base")
    answers = work / "answers.jsonl"
    answer_training_prompts(data, target, ADAPTING_PROMPTS, answers)
    draft = stage(adapt, answers, base, args.draft_steps, None, work / "draft")
    package(target, stage(adapt, answers, draft, args.head_steps, "frozen", work / "draft-with-head"), args.out)
    # A second target for the same draft, settled on the first one's answers, as families share their tuning data.
    wide = stage(pretrain, data, tokenizer, WIDE_TARGET, args.target_steps, work / "target-wide-start")
    stage(settle_target, work / "looping-answers-0.jsonl", wide, args.settle_steps, work / "target-wide")


if __name__ == "__main__":
    main()
