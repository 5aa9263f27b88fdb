"""Started by `test_run.py` in two processes: a sharded draft has a whole one's gradients, and can be drafted with."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

sys.path.insert(0, str(Path(__file__).parent.parent))
from families import make_model

from pard_hf import PardDraftModel
from pard_hf.training.collator import DataCollatorForPard
from pard_hf.training.objective import Objective
from pard_hf.training.trainer import whole_draft

EXAMPLES = [{"input_ids": list(range(3, 20))}, {"input_ids": [40, 7, 9, 33, 2]}]


def draft():
    return PardDraftModel.from_causal_lm(make_model("llama"), 99, 4)


def shard(model, version):
    if version == 1:
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(version):
    init_process_group("gloo")
    objective, collator = Objective("cat", target=make_model("llama", seed=3)), DataCollatorForPard(99, 4)
    sharded, whole, everything = shard(draft(), version), draft(), collator(EXAMPLES)
    num_items = (everything["labels"] != -100).sum()

    # Each process has one of the two texts; gradients are averaged, so sums over the step are doubled.
    loss = 2 * sharded(objective=objective, batch=collator([EXAMPLES[get_rank()]]), num_items=num_items)
    loss.backward()
    if version == 1:
        norm = sharded.clip_grad_norm_(1e9)
    else:
        norm = torch.nn.utils.clip_grad_norm_(sharded.parameters(), 1e9).full_tensor()
    whole(objective=objective, batch=everything).backward()
    expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9)
    copy = whole_draft(sharded.module if version == 1 else sharded, sharded)
    # One process drafts more often than the other.
    prompts = torch.randint(3, 90, (1 + 3 * get_rank(), 6))
    for prompt in prompts:
        assert torch.equal(copy.draft(prompt[None]), whole.draft(prompt[None]))
    if get_rank() == 0:
        print(json.dumps({"norm": norm.item(), "expected": expected.item()}))
    destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
