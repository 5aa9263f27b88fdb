"""What `pard train` needs before its first step, over the number of rows: seconds, and memory of its own.

    python benchmarks/training_rows.py --rows 5000 50000 --output benchmarks/results/training_rows.json

Rows are texts of random words, tokenized by the bundled pair's tokenizer. Each run has a process of its own and writes
its token file anew, by one process and by as many as there are cores; a second start reads the file. Memory is the
largest anonymous resident set of the process that trains, above what it held before: pages of mapped files, which the
system takes back, are not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pard_hf import PardDraftModel, bundled_pair
from pard_hf.training.settings import TrainingSettings
from pard_hf.training.train import load_tokenizer, num_cores, training_arguments, training_rows
from script import finish, in_own_process, parser_of, run_metadata

MASK_TOKEN_ID, MAX_LENGTH = 2040, 2048
NUM_WORDS = 450


def write_texts(file: Path, num_rows: int) -> None:
    """Write rows of random words, most of them near `MAX_LENGTH` tokens."""
    chosen = random.Random(0)
    words = ["".join(chosen.choices("abcdefghijklmnopqrstuvwxyz", k=chosen.randint(2, 9))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as written:
        for _ in range(num_rows):
            written.write(json.dumps({"text": " ".join(chosen.choices(words, k=NUM_WORDS))}) + "\n")


class Memory(threading.Thread):
    """The largest anonymous resident set of this process while it ran, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = self.first = self.now()
        self.start()

    def now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while True:
            self.largest = max(self.largest, self.now())
            time.sleep(0.02)


def start(file: Path, out: Path, workers: int) -> dict[str, Any]:
    """Tokenize rows in this process and `workers` others, or read what an earlier start wrote."""
    settings = TrainingSettings(
        bundled_pair().draft, [file], out, max_length=MAX_LENGTH, workers=workers, device="cpu", skip_bad_rows=True
    )
    arguments, tokenizer = training_arguments(settings), load_tokenizer(settings)
    memory, begin = Memory(), time.perf_counter()
    rows = training_rows(settings, arguments, tokenizer, MASK_TOKEN_ID)
    rows[len(rows) - 1]
    seconds = time.perf_counter() - begin
    return {
        "seconds": round(seconds, 2),
        "memory_bytes": memory.largest - memory.first,
        "num_rows": len(rows),
        "num_tokens": rows.num_tokens,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 50000])
    parser.add_argument("--one", nargs=3, metavar=("FILE", "OUT", "WORKERS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        file, out, workers = args.one
        print(json.dumps(start(Path(file), Path(out), int(workers))))
        return
    draft = PardDraftModel.from_pretrained(bundled_pair().draft)
    result: dict[str, Any] = {**run_metadata(draft), "num_cores": num_cores(), "starts": []}
    for num_rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.jsonl")
            write_texts(file, num_rows)
            for way, workers in (("one process", 0), ("all cores", num_cores()), ("second start", 0)):
                out = Path(folder, "one process" if way == "second start" else way)
                found = in_own_process("--one", str(file), str(out), str(workers))
                result["starts"].append({"way": way, **found})
                print(result["starts"][-1], file=sys.stderr, flush=True)
    finish(result, args.output)


if __name__ == "__main__":
    main()
