"""Make the bundled pair from permissively licensed text: tokenizer, target, answers, draft.

    make bundled-pair DATA=../shared/data/train

Each stage writes into `--work` and is skipped when its result is there; an interrupted stage goes on from its last
checkpoint. A target this small is undertrained by any measure: it exists so that acceptance, cost and the whole path
from training to `generate()` are real on a machine with no network and no GPU.

Rows are `<|begin|>prompt\\nresponse<|end|>` or `<|begin|>text<|end|>`: one template, an end token on every row that is
whole, so that stopping is learned.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
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

# Rows of the padded vocabulary above the tokenizer's last id; the first of them is the draft's mask token.
VOCAB_SIZE, TOKENIZER_SIZE = 2048, 2040
MAX_ROW_TOKENS = 448
# How often a file's rows are seen for each pass over the mix, and the longest prompt (in characters) worth a slot.
MIX = {"math_gsm8k": 3, "code_functions": 2, "code_leetcode": 1, "code_instruct": 1}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}"
    "{% elif not message['content'].endswith('\\n') %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


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
        ids[i, :length] = labels[i, :length] = torch.tensor(row["input_ids"])
    return {"input_ids": ids, "labels": labels}


def train_target(data: Path, tokenizer_dir: Path, out: Path, steps: int) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    rows = encode_rows(data, tokenizer)
    random.Random(0).shuffle(rows)
    print(f"{len(rows)} rows, {sum(map(len, rows)) / 1e6:.2f} M tokens a pass", flush=True)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=160,
            intermediate_size=416,
            num_hidden_layers=12,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizer = Muon(matrices, others, lr=0.02, adam_lr=4e-3)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=16,
            train_sampling_strategy="group_by_length",
            save_steps=200,
            save_total_limit=1,
            logging_steps=20,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            max_grad_norm=1.0,
            use_cpu=True,
        ),
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        train_dataset=[{"input_ids": ids} for ids in rows],
        optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, 40, steps)),
    )
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoints/checkpoint-*")) or None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the training text (*.jsonl.gz)")
    parser.add_argument("--work", type=Path, default=Path("bundled-pair"), help="where stages leave their results")
    parser.add_argument("--target-steps", type=int, default=2400)
    args = parser.parse_args()
    tokenizer_dir, target_dir = args.work / "tokenizer", args.work / "target"
    if not (tokenizer_dir / "tokenizer.json").exists():
        train_tokenizer(args.data, tokenizer_dir)
    if not (target_dir / "model.safetensors").exists():
        train_target(args.data, tokenizer_dir, target_dir, args.target_steps)


if __name__ == "__main__":
    main()
