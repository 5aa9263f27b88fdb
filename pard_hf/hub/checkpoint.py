"""Read a checkpoint without loading it: config, tokenizer and the headers of its weights.

Problems are `ValueError`s that name the file and never the folder.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..draft.addons import ADDON_FILES

INDEX_FILE = "model.safetensors.index.json"
# One of these holds the vocabulary; the other files of a tokenizer only configure it.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "*.tiktoken", "tekken.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip
TARGET_FILES = ("config.json", *TOKENIZER_FILES)
DRAFT_FILES = (*TARGET_FILES, *ADDON_FILES, "generation_config.json", "*.safetensors", INDEX_FILE)


def local_folder(name: str | Path, patterns: tuple[str, ...], **kwargs: Any) -> Path:
    """Return the folder of a checkpoint; of one on the Hub, download the files that match `patterns`.

    `kwargs` go to `snapshot_download`, such as `token` and `revision`, and its errors (`OSError`) pass.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns), **kwargs))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"Expected a folder or a Hub id such as `amd/PARD-Qwen2.5-0.5B`, got {str(name)!r}."
        ) from error


def read_json(folder: Path, name: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object; without the file, return `missing`, or raise a `ValueError` if that is `None`."""
    if not (folder / name).is_file():
        if missing is not None:
            return missing
        raise ValueError(f"The checkpoint has no {name}. Save it with `save_pretrained`, or name the folder inside.")
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object: download or save the checkpoint again.")
    return content


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that describes the language model, with defaults where it lacks `vocab_size`."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    if "vocab_size" in nested:
        return nested
    if "vocab_size" not in config and is_known_model(config):  # Gemma 3, for one.
        with suppress(Exception):  # The config may hold anything; `vocab_size` reports what is missing.
            return CONFIG_MAPPING[config["model_type"]].from_dict(config).get_text_config().to_dict()
    return config


def vocab_size(config: dict[str, Any]) -> int:
    """Return the number of rows that a config declares for the embedding and the LM head."""
    size = text_config(config).get("vocab_size")
    if type(size) is not int or size < 1:
        raise ValueError(f"config.json should hold a positive integer `vocab_size`, got {size!r}.")
    return size


def is_known_model(config: dict[str, Any]) -> bool:
    """Return whether the installed transformers has a config class for the model, which has no code of its own."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING and "auto_map" not in config


def tokenizer_files(folder: Path) -> list[Path]:
    """List the files of a tokenizer; none without a vocabulary."""
    if not any(path.is_file() for pattern in VOCABULARY_FILES for path in folder.glob(pattern)):
        return []
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint, without running its code."""
    if not tokenizer_files(folder):
        raise ValueError("The checkpoint has no tokenizer. Save the target's with it.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises plain `Exception`s.
        raise ValueError(
            f"The tokenizer cannot be read ({type(error).__name__}): download or save it again."
        ) from error


def weight_files(folder: Path) -> list[str]:
    """Name the safetensors files that a loader reads: those of the index, else all of the folder."""
    if not (folder / INDEX_FILE).is_file():
        return sorted(path.name for path in folder.glob("*.safetensors"))
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{INDEX_FILE} has no `weight_map` from tensors to files: save the checkpoint again.")
    return sorted(set(weight_map.values()))


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Read the shapes of all tensors from the headers of the safetensors files.

    Raises a `ValueError` where a file or a tensor of the index is missing, or a file is truncated.
    """
    shapes: dict[str, list[int]] = {}
    files = weight_files(folder)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{INDEX_FILE} names {', '.join(missing)}, which is missing: download or save it again.")
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} is truncated or no safetensors file: download or save it again.") from error
    lost = sorted(read_json(folder, INDEX_FILE, {}).get("weight_map", {}).keys() - shapes.keys())
    if lost:
        raise ValueError(f"{INDEX_FILE} names tensors no file holds, such as {lost[0]}: save the checkpoint again.")
    return shapes


def vocabulary_rows(folder: Path, shapes: dict[str, list[int]]) -> dict[str, int | None]:
    """Count the rows of the embedding and of an untied LM head, by the names of a model built from the config.

    A count is `None` where the weights lack the tensor.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # The config may hold anything.
        raise ValueError(
            "The transformers installed here builds no causal LM from config.json, so the weights were not compared "
            f"with it ({type(error).__name__}: {first_lines(error)})."
        ) from error
    modules = [model.get_input_embeddings()]
    if not config.get_text_config().tie_word_embeddings:
        modules.append(model.get_output_embeddings())
    names = [f"{name}.weight" for name, module in model.named_modules() if any(module is one for one in modules)]
    rows: dict[str, int | None] = {}
    for name in names:
        # Checkpoints of the model without its head, and of one inside another, have other prefixes.
        found = next((key for key in shapes if f".{key}".endswith(f".{name}") or name.endswith(f".{key}")), None)
        rows[found or name] = (shapes[found] or [0])[0] if found else None
    return rows


def first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:2])
