"""Generate with vLLM, plainly or with a parallel draft; `engines.py` runs it with an interpreter that has vLLM.

    python benchmarks/vllm_texts.py JOB OUTPUT

JOB is a JSON file with target, draft, prompts (token ids) and settings. OUTPUT gets the texts and what vLLM counted.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

COUNTERS = {
    "vllm:spec_decode_num_drafts": "num_rounds",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_by_position",
}


def main() -> None:
    import vllm

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llm = load(job)
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=job["max_new_tokens"], stop_token_ids=job["end_token_ids"], detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    result = {
        "version": vllm.__version__,
        "texts": [list(output.outputs[0].token_ids) for output in outputs],
        "counts": {COUNTERS[metric.name]: value_of(metric) for metric in llm.get_metrics() if metric.name in COUNTERS},
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def load(job: dict[str, Any]) -> Any:
    from vllm import LLM

    drafting = {
        "method": "draft_model",
        "model": job["draft"],
        "num_speculative_tokens": job["num_assistant_tokens"],
        "parallel_drafting": True,
    }
    return LLM(
        model=job["target"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=job["max_model_len"],
        speculative_config=drafting if job["draft"] else None,
        disable_log_stats=False,
    )


def value_of(metric: Any) -> Any:
    return metric.values if hasattr(metric, "values") else metric.value


if __name__ == "__main__":
    main()
