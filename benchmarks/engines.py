"""Serve a pair with vLLM, and compare texts, rounds and acceptance by position with our loop's.

    make test-engines

The draft is exported as `pard export` writes it. vLLM generates every text with it and without it, in float32. It does
not draft in the round that reads a prompt, so our loop begins one token later: its prompts end with the first new one.
Equal texts in equally many rounds were drafted alike. By position vLLM has more, for it also counts what it accepts
beyond the end of a text. Exits with 1 where a text differs, or the number of rounds by more than `MOST_ROUNDS`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pard_hf import PardDraftModel
from pard_hf.evaluation.benchmark import Benchmark, BenchmarkSettings
from pard_hf.evaluation.prompts import load_prompts
from pard_hf.generation.stats import DecodingStats
from pard_hf.host import end_token_ids
from pard_hf.hub.export import export_draft
from pard_hf.loading import Pair
from script import add_pair, finish, load_pair_of, parser_of, run_metadata, write

MOST_ROUNDS = 0.03  # As a share; in other kernels near ties of the draft fall the other way.


def main() -> int:
    args = parse()
    pair = load_pair_of(args)
    settings = BenchmarkSettings(limit=args.limit, max_new_tokens=args.max_new_tokens)
    benchmark = Benchmark(pair, settings)
    sets = [benchmark.encode(*load_prompts(source)) for source in args.prompts]
    result: dict[str, Any] = {
        **run_metadata(pair.target),
        "num_assistant_tokens": args.num_assistant_tokens,
        "sets": {},
    }
    with TemporaryDirectory() as work:
        served = export(pair, Path(work))
        # Engines draft without a correction head.
        draft = PardDraftModel.from_pretrained(served["draft"], correction_head=False, dtype=pair.target.dtype)
        pair = pair._replace(draft=draft.eval())
        for found in sets:
            print(f"{found.name}: {len(found.ids)} prompts", file=sys.stderr, flush=True)
            version, compared = compare(args, pair, served, found.ids)
            result["engine"] = f"vLLM {version}"
            result["sets"][found.name] = compared
            write(result, args.output)
    finish(result, args.output)
    return int(not all(map(agrees, result["sets"].values())))


def parse() -> Any:
    parser = parser_of(__doc__)
    add_pair(parser, dtype="float32")
    parser.add_argument("--python", required=True, help="interpreter that has vLLM")
    parser.add_argument("--prompts", nargs="+", default=["demo"], help="prompt sets")
    parser.add_argument("--limit", type=int, default=80, help="prompts of each set, drawn with seed 0")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    return parser.parse_args()


def export(pair: Pair, work: Path) -> dict[str, str]:
    """Write target and draft as whole checkpoints, the draft as engines load it."""
    target, draft = str(work / "target"), str(work / "draft")
    for model, folder in zip(pair.models, (target, draft), strict=True):
        model.save_pretrained(folder)
        pair.tokenizer.save_pretrained(folder)
    return {"target": target, "draft": str(export_draft(draft, work / "served", target))}


def compare(args: Any, pair: Pair, served: dict[str, str], prompts: list[list[int]]) -> tuple[str, dict[str, Any]]:
    ends = end_token_ids(pair.target.generation_config)
    job = {
        "prompts": prompts,
        "max_new_tokens": args.max_new_tokens,
        "num_assistant_tokens": args.num_assistant_tokens,
        "end_token_ids": ends,
        "max_model_len": max(map(len, prompts)) + args.max_new_tokens + args.num_assistant_tokens + 1,
    }
    plain = run_vllm(args.python, {**job, **served, "draft": None})
    drafted = run_vllm(args.python, {**job, **served})
    texts, stats = ours(pair, plain["texts"], prompts, args)
    counts = drafted["counts"]
    return drafted["version"], {
        "num_prompts": len(prompts),
        "same_as_vllm_without_draft": share_of_equal(drafted["texts"], plain["texts"]),
        "same_as_ours": share_of_equal(drafted["texts"], texts),
        "vllm": {
            "num_rounds": counts["num_rounds"],
            "num_accepted": counts["num_accepted"],
            "position_acceptance": [round(n / counts["num_rounds"], 4) for n in counts["accepted_by_position"]],
        },
        "ours": {
            "num_rounds": stats.num_rounds,
            "num_accepted": stats.num_accepted,
            "position_acceptance": [round(share, 4) for share in stats.position_acceptance],
        },
    }


def run_vllm(python: str, job: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("vllm_texts.py")
    with TemporaryDirectory() as folder:
        asked, answered = Path(folder, "job.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(job), encoding="utf-8")
        subprocess.run([python, str(script), str(asked), str(answered)], check=True, stdout=sys.stderr)
        return json.loads(answered.read_text(encoding="utf-8"))


def ours(
    pair: Pair, plain: list[list[int]], prompts: list[list[int]], args: Any
) -> tuple[list[list[int]], DecodingStats]:
    """Generate in our loop, each text from its first new token on; return texts and statistics."""
    ends, texts, stats = set(end_token_ids(pair.target.generation_config)), [], DecodingStats()
    for ids, expected in zip(prompts, plain, strict=True):
        text = expected[:1]
        if text[0] not in ends and args.max_new_tokens > 1:
            inputs = torch.tensor([ids + text], device=pair.target.device)
            output = pair.target.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                assistant_model=pair.draft,
                num_assistant_tokens=args.num_assistant_tokens,
                max_new_tokens=args.max_new_tokens - 1,
                assistant_tree_size=0,
                do_sample=False,
                return_dict_in_generate=True,
                disable_compile=True,
            )
            text = text + output.sequences[0, inputs.shape[1] :].tolist()
            stats += output.stats
        texts.append(text)
    return texts, stats


def share_of_equal(ones: list[list[int]], others: list[list[int]]) -> float:
    return sum(one == other for one, other in zip(ones, others, strict=True)) / len(ones)


def agrees(compared: dict[str, Any]) -> bool:
    """Return whether all texts are equal, in nearly as many rounds."""
    is_same = compared["same_as_vllm_without_draft"] == compared["same_as_ours"] == 1
    theirs, own = (compared[name]["num_rounds"] for name in ("vllm", "ours"))
    return is_same and abs(theirs - own) <= MOST_ROUNDS * own


if __name__ == "__main__":
    sys.exit(main())
