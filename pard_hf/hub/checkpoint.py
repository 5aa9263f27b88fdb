"""A checkpoint folder as files, without loading it: its config, its tokenizer and the headers of its weights.

Knows which files make a checkpoint; knows nothing of engines. Reading reports what is wrong as a
`ValueError` whose sentence holds file names only, never the folder.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..draft.addons import ADDON_FILES
from .errors import hub_errors

INDEX_FILE = "model.safetensors.index.json"
# A vocabulary lies in one of these; the other files of a tokenizer only say how it is used.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "*.tiktoken", "tekken.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*",
)
TARGET_FILES = ("config.json", *TOKENIZER_FILES)
DRAFT_FILES = (*TARGET_FILES, *ADDON_FILES, "generation_config.json", "*.safetensors", INDEX_FILE)


def local_folder(name: str | Path, patterns: tuple[str, ...], **kwargs: Any) -> Path:
    """The folder of a checkpoint; one on the Hub is downloaded, as far as `patterns` name its files.

    `kwargs` are those of `snapshot_download`, such as `token` and `revision`.

    Raises:
        OSError: There is neither such a folder nor such a repository, or the Hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    is_hub_id = len(Path(name).parts) <= 2 and str(name) == Path(name).as_posix() and str(name)[0] not in "./~"
    if not is_hub_id:
        raise FileNotFoundError(f"Expected a folder or a Hub id such as `amd/PARD-Qwen2.5-0.5B`, got {str(name)!r}.")
    with hub_errors(name, kwargs.get("revision")):
        return Path(snapshot_download(str(name), allow_patterns=list(patterns), **kwargs))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of `folder`."""
    if not (folder / name).is_file():
        raise ValueError(f"The checkpoint has no {name}. Save it with `save_pretrained`, or name the folder inside.")
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object: download or save the checkpoint again.")
    return content


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model, the whole of it for most.

    Where that part leaves the vocabulary to the defaults of its class, as Gemma 3's does, these are filled in.
    """
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    if "vocab_size" in nested:
        return nested
    if "vocab_size" not in config and is_known_model(config):
        with suppress(Exception):  # A config of any content; what is wrong with it is said where a value is missed.
            return CONFIG_MAPPING[config["model_type"]].from_dict(config).get_text_config().to_dict()
    return config


def vocab_size(config: dict[str, Any]) -> int:
    """Rows a config declares for the embedding and the language-model head."""
    size = text_config(config).get("vocab_size")
    if type(size) is not int or size < 1:
        raise ValueError(f"config.json should hold a positive integer `vocab_size`, got {size!r}.")
    return size


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a tokenizer, none where no vocabulary is among them."""
    if not any(path.is_file() for pattern in VOCABULARY_FILES for path in folder.glob(pattern)):
        return []
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a checkpoint; its code, if it has any of its own, is not run."""
    if not tokenizer_files(folder):
        raise ValueError("The checkpoint has no tokenizer. Save the target's beside it.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises plain `Exception`s.
        raise ValueError(
            f"The tokenizer cannot be read ({type(error).__name__}): download or save it again."
        ) from error


def legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rope of a config under the top-level keys that transformers 4 reads; empty where layers differ in it.

    >>> legacy_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}})
    {'rope_theta': 1000000.0}
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    keys = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key not in keys}
    return keys


def is_known_model(config: dict[str, Any]) -> bool:
    """Whether the installed transformers has a config class for the model, its own code aside."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING and "auto_map" not in config


def first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:2])


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files a loader reads: those of the index file, else all there are."""
    if not (folder / INDEX_FILE).is_file():
        return sorted(path.name for path in folder.glob("*.safetensors"))
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{INDEX_FILE} has no `weight_map` from tensors to files: save the checkpoint again.")
    return sorted(set(weight_map.values()))


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors, read from the headers of the safetensors files.

    Raises:
        ValueError: A file is missing or truncated, or a tensor that the index names is not there.
    """
    shapes: dict[str, list[int]] = {}
    files = weight_files(folder)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{INDEX_FILE} names {', '.join(missing)}, which is not there: download or save it again.")
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} is truncated or no safetensors file: download or save it again.") from error
    if (folder / INDEX_FILE).is_file():
        lost = sorted(read_json(folder, INDEX_FILE)["weight_map"].keys() - shapes.keys())
        if lost:
            raise ValueError(
                f"{INDEX_FILE} names tensors no file holds, such as {lost[0]}: save the checkpoint again."
            )
    return shapes


def vocabulary_tensors(folder: Path) -> list[str]:
    """Names of the tensors with one row a vocabulary entry: the embedding and, unless tied to it, the head.

    Built without weights from the config, by the transformers at hand.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # A config of any content ends here; what is wrong with it differs by family.
        raise ValueError(
            "The transformers installed here builds no causal LM from config.json, so the weights were not compared "
            f"with it ({type(error).__name__}: {first_line(error)})."
        ) from error
    modules = [model.get_input_embeddings()]
    if not config.get_text_config().tie_word_embeddings:
        modules.append(model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    return [f"{names[id(module)]}.weight" for module in modules if module is not None]
