"""Make the bundled pair from permissively licensed text: tokenizer, targets, their answers, draft, correction head.

    make bundled-pair DATA=../shared/data/train

Each stage writes into `--work` and is skipped when its result is there; interrupted training goes on from its last
checkpoint, and writing answers after the last one written. A target this small is undertrained by any measure:
it exists so that acceptance, cost and the whole path from training to `generate()` are real on a machine with no
network and no GPU. A second target, of another depth and width, stays in `--work`: one draft serves both.

Rows are `<|begin|>prompt\\nresponse<|end|>` or `<|begin|>text<|end|>`: one template, an end token on every row that is
whole, so that stopping is learned.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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

# Rows of the padded vocabulary above the tokenizer's last id; the first of them is the draft's mask token.
VOCAB_SIZE, TOKENIZER_SIZE = 2048, 2040
MAX_ROW_TOKENS = 448
TARGET = {"hidden_size": 160, "intermediate_size": 416, "num_hidden_layers": 12, "num_attention_heads": 5}
WIDE_TARGET = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 8}
DRAFT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 3}
NUM_ASSISTANT_TOKENS = 8
# Training prompts that a target answers: their longest (in tokens), and how many of each file, where targets are
# settled and where the draft is adapted.
LONGEST_PROMPT = 320
SETTLING_PROMPTS = {"code_functions": 1_800, "math_gsm8k": 1_200}
ADAPTING_PROMPTS = {"code_functions": 8_000, "math_gsm8k": 8_000, "code_leetcode": 1_500, "code_instruct": 1_500}
# How often a file's rows are seen for each pass over the mix.
MIX = {"math_gsm8k": 3, "code_functions": 2, "code_leetcode": 1, "code_instruct": 1}
TRAINER = {
    "save_steps": 200,
    "save_total_limit": 1,
    "logging_steps": 20,
    "report_to": "none",
    "disable_tqdm": True,
    "max_grad_norm": 1.0,
    "use_cpu": True,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% if not message['content'].endswith('\\n') %}{{ '\\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
)


def parts_of(row: dict[str, str]) -> tuple[str, str]:
    """Split a row into what is given and what is to be written; plain text has an empty prompt."""
    if "text" in row:
        return "", row["text"]
    prompt = row["prompt"] if row["prompt"].endswith("\n") else row["prompt"] + "\n"
    return prompt, row["response"]


def train_tokenizer(data: Path, out: Path) -> None:
    """Byte-level BPE that never merges across a newline or between digits, so that prompt and answer split cleanly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"\n+|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?=[^\S\n]\S)|[^\S\n]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for name in MIX for row in read_rows(data / f"{name}.jsonl.gz") for text in parts_of(row))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)


def encode_rows(data: Path, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of the mix, whole rows only where they fit, text cut at `MAX_ROW_TOKENS`."""
    rows: list[list[int]] = []
    for name, repeats in MIX.items():
        for row in read_rows(data / f"{name}.jsonl.gz"):
            prompt, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts_of(row))
            ids = [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id]
            if prompt and len(prompt) > MAX_ROW_TOKENS - 32:
                continue  # A cut inside the prompt would teach nothing about answering.
            rows.extend([ids[:MAX_ROW_TOKENS]] * repeats)
    return rows


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz, for matrices; Adam for the rest. https://kellerjordan.github.io/posts/muon

    torch.optim.Muon works in bfloat16, which a CPU without matrix units runs eight times slower than float32.
    """

    def __init__(self, matrices: list[torch.Tensor], others: list[torch.Tensor], lr: float, adam_lr: float):
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        super().__init__([{"params": matrices, "lr": lr}, {"params": others, "lr": adam_lr}], {})

    @classmethod
    def for_model(cls, model: torch.nn.Module, lr: float, adam_lr: float) -> Muon:
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        return cls(matrices, [p for name, p in named if p.ndim != 2 or "embed" in name], lr, adam_lr)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        matrices, others = self.param_groups
        self.adam.param_groups[0]["lr"] = others["lr"]
        self.adam.step()
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for weight in matrices["params"]:
            by_shape.setdefault(weight.shape, []).append(weight)
        for shape, weights in by_shape.items():
            for weight in weights:
                self.state[weight].setdefault("momentum", torch.zeros_like(weight)).lerp_(weight.grad, 0.05)
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
    """Right-pad; causal attention keeps padding out of sight of every real token, so no mask is needed."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = ids[i, :length].where(torch.tensor(row["loss_mask"]) == 1, -100)
    return {"input_ids": ids, "labels": labels}


def pretrain(data: Path, tokenizer_dir: Path, out: Path, shape: dict[str, int], steps: int) -> None:
    """Ordinary language modeling of the mix, from nothing."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    rows = encode_rows(data, tokenizer)
    random.Random(0).shuffle(rows)
    print(f"{len(rows)} rows, {sum(map(len, rows)) / 1e6:.2f} M tokens a pass", flush=True)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            vocab_size=VOCAB_SIZE,
            num_key_value_heads=shape["num_attention_heads"],
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    examples = [{"input_ids": ids, "loss_mask": [1] * len(ids)} for ids in rows]
    fit(model, tokenizer, examples, out, steps, lr=0.02, adam_lr=4e-3)


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, list[int]]],
    out: Path,
    steps: int,
    lr: float,
    adam_lr: float,
) -> None:
    """Next-token training on rows with loss masks; the rate falls to nothing over `steps`."""
    optimizer = Muon.for_model(model, lr, adam_lr)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=16,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            **TRAINER,
        ),
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        train_dataset=rows,
        optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, min(40, steps // 10), steps)),
    )
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoints/checkpoint-*")) or None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def repeats(answer: list[int], size: int = 4) -> list[bool]:
    """Mark each token that completes an n-gram said before in the same answer."""
    seen: set[tuple[int, ...]] = set()
    marks = []
    for end in range(1, len(answer) + 1):
        gram = tuple(answer[max(end - size, 0) : end])
        marks.append(len(gram) == size and gram in seen)
        seen.add(gram)
    return marks


def without_loop(answer: list[int], breaks: set[int], end: int) -> list[int] | None:
    """End an answer at the last line break (or, failing that, the last token) before it begins to loop.

    A loop begins where two thirds of a dozen tokens repeat. `None` for an answer that is little but repetition.
    """
    marks = repeats(answer)
    onset = next((i for i in range(len(answer) - 11) if sum(marks[i : i + 12]) >= 8), None)
    if onset is not None:
        line = next((i for i in range(onset, 3, -1) if answer[i - 1] in breaks), onset)
        answer = [*answer[:line], end]
    return answer if len(answer) >= 4 and sum(repeats(answer)) <= 0.2 * len(answer) else None


def settle_target(answers: Path, start: Path, out: Path, steps: int) -> None:
    """Teach the target to end where it would begin to loop, on its own answers cut there.

    Loops look like high acceptance and say nothing. What the target says before stays its own, so it stays as
    predictable for a draft as it was (unlikelihood training, tried first, made it say unlikely things).
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    end, rows = tokenizer.eos_token_id, []
    breaks = {index for token, index in tokenizer.get_vocab().items() if "\u010a" in token}
    for row in read_rows(answers):
        answer = without_loop(row["response_ids"], breaks, end)
        if answer is not None:
            rows.append(encode_row(tokenizer, {**row, "response_ids": answer}))
    print(f"{len(rows)} answers, {sum(sum(row['loss_mask']) for row in rows) / 1e6:.2f} M tokens", flush=True)
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    fit(model, tokenizer, rows, out, steps, lr=5e-3, adam_lr=1e-3)


def answer_training_prompts(data: Path, target_dir: Path, out: Path, numbers: dict[str, int]) -> None:
    """The target's own greedy answers to training prompts."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target_dir)
    target = LlamaForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    chosen: list[str] = []
    for name, number in numbers.items():
        prompts = [row["prompt"] for row in read_rows(data / f"{name}.jsonl.gz") if "prompt" in row]
        prompts = [prompt for prompt in prompts if len(tokenizer(prompt)["input_ids"]) <= LONGEST_PROMPT]
        random.Random(0).shuffle(prompts)
        chosen += prompts[:number]
    rows = [{"prompt": prompt} for prompt in chosen]
    write_answers(target, tokenizer, rows, out, batch_size=96, max_new_tokens=128)


def adapt_draft(answers: Path, start: Path, out: Path, steps: int) -> None:
    """Adapt a small causal LM into the draft, on the target's answers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    rows = tokenize_rows(tokenizer, read_rows(answers), MAX_ROW_TOKENS, skip_bad_rows=True)
    base = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    draft = PardDraftModel.from_causal_lm(base, TOKENIZER_SIZE, NUM_ASSISTANT_TOKENS)
    optimizer = Muon.for_model(draft, lr=0.01, adam_lr=2e-3)
    arguments = PardTrainingArguments(
        str(out / "checkpoints"),
        num_draft_tokens=NUM_ASSISTANT_TOKENS,
        max_steps=steps,
        per_device_train_batch_size=16,
        train_sampling_strategy="group_by_length",
        **TRAINER,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 40, steps)
    trainer = PardTrainer(draft, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoints/checkpoint-*")) or None)
    draft.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_head(answers: Path, draft_dir: Path, out: Path, steps: int) -> None:
    """A correction head on the draft, which stays as it is, on the same answers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(draft_dir)
    rows = tokenize_rows(tokenizer, read_rows(answers), MAX_ROW_TOKENS, skip_bad_rows=True)
    arguments = PardTrainingArguments(
        str(out / "checkpoints"),
        correction_head="frozen",
        num_draft_tokens=NUM_ASSISTANT_TOKENS,
        max_steps=steps,
        per_device_train_batch_size=32,
        warmup_steps=min(30, steps // 10),
        train_sampling_strategy="group_by_length",
        **TRAINER,
    )
    draft = PardDraftModel.from_pretrained(draft_dir, dtype=torch.float32)
    trainer = PardTrainer(draft, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoints/checkpoint-*")) or None)
    draft.save_pretrained(out)
    tokenizer.save_pretrained(out)


def package(target_dir: Path, draft_dir: Path, out: Path) -> None:
    """Write the pair as it ships: bfloat16, small files, a tokenizer beside each."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target_dir)
    tokenizer.chat_template = CHAT_TEMPLATE
    models = {
        "target": LlamaForCausalLM.from_pretrained(target_dir, dtype=torch.bfloat16),
        "draft": PardDraftModel.from_pretrained(draft_dir, dtype=torch.bfloat16),
    }
    for name, model in models.items():
        model.save_pretrained(out / name, max_shard_size="14MB")
        tokenizer.save_pretrained(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the training text (*.jsonl.gz)")
    parser.add_argument("--work", type=Path, default=Path("bundled-pair"), help="where stages leave their results")
    parser.add_argument("--out", type=Path, default=Path("pard_hf/bundled"), help="where the finished pair goes")
    parser.add_argument("--target-steps", type=int, default=2400, help="optimizer steps of language modeling")
    parser.add_argument("--settle-steps", type=int, default=180, help="optimizer steps against repetition, a turn")
    parser.add_argument("--draft-base-steps", type=int, default=700, help="language modeling of the draft's base")
    parser.add_argument("--draft-steps", type=int, default=6000, help="adaptation of the draft")
    parser.add_argument("--head-steps", type=int, default=1800, help="training of its correction head")
    args = parser.parse_args()
    tokenizer_dir, target_dir = args.work / "tokenizer", args.work / "target"
    if not (tokenizer_dir / "tokenizer.json").exists():
        train_tokenizer(args.data, tokenizer_dir)
    if not (target_dir / "model.safetensors").exists():
        pretrain(args.data, tokenizer_dir, target_dir, TARGET, args.target_steps)
    settled_dir = target_dir
    for turn in range(2):  # The second turn meets the loops that the first left over.
        looping, start_dir = args.work / f"looping-answers-{turn}.jsonl", settled_dir
        settled_dir = args.work / f"target-settled-{turn}"
        if not (settled_dir / "model.safetensors").exists():
            answer_training_prompts(args.data, start_dir, looping, SETTLING_PROMPTS)
            settle_target(looping, start_dir, settled_dir, args.settle_steps)
    base_dir, answers, draft_dir = args.work / "draft-base", args.work / "answers.jsonl", args.work / "draft"
    if not (base_dir / "model.safetensors").exists():
        pretrain(args.data, tokenizer_dir, base_dir, DRAFT, args.draft_base_steps)
    answer_training_prompts(args.data, settled_dir, answers, ADAPTING_PROMPTS)
    if not (draft_dir / "model.safetensors").exists():
        adapt_draft(answers, base_dir, draft_dir, args.draft_steps)
    head_dir = args.work / "draft-with-head"
    if not (head_dir / "model.safetensors").exists():
        train_head(answers, draft_dir, head_dir, args.head_steps)
    package(settled_dir, head_dir, args.out)
    make_wide_target(args)


def make_wide_target(args: argparse.Namespace) -> None:
    """A second target for the same draft, settled on the first one's answers, as real families share their tuning."""
    start_dir, out = args.work / "target-wide-start", args.work / "target-wide"
    if not (start_dir / "model.safetensors").exists():
        pretrain(args.data, args.work / "tokenizer", start_dir, WIDE_TARGET, args.target_steps)
    if not (out / "model.safetensors").exists():
        settle_target(args.work / "looping-answers-0.jsonl", start_dir, out, args.settle_steps)


if __name__ == "__main__":
    main()
