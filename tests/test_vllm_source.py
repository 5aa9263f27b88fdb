"""The families that vLLM turns into MTP layers, by its own source where it is installed."""

import ast
import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pard_hf.hub.engines import MTP_ARCHITECTURES, MTP_MODEL_TYPES, has_mtp_layers

SOURCE = importlib.util.find_spec("vllm")
pytestmark = pytest.mark.skipif(SOURCE is None, reason="vLLM is not installed")


@pytest.fixture
def override(monkeypatch):
    """`SpeculativeConfig.hf_config_override`, without importing vLLM: that takes a device and most of a minute."""
    [folder] = SOURCE.submodule_search_locations
    tree = ast.parse((Path(folder) / "config" / "speculative.py").read_text(encoding="utf-8"))
    [function] = [node for node in ast.walk(tree) if getattr(node, "name", None) == "hf_config_override"]
    function.decorator_list, function.returns = [], None
    for argument in function.args.args:
        argument.annotation = None
    layers = ModuleType("vllm.model_executor.models.mimo_v2_mtp")
    layers._MIMO_V2_PRO_NUM_MTP_LAYERS = layers._MIMO_V2_FLASH_NUM_MTP_LAYERS = 1
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models", layers.__name__):
        monkeypatch.setitem(sys.modules, name, layers if name == layers.__name__ else ModuleType(name))
    names = {"copy": copy, "get_hf_text_config": lambda config: config.get_text_config()}
    exec(compile(ast.Module([function], []), "speculative.py", "exec"), names)
    return names["hf_config_override"]


def is_turned(override, model_type, architecture):
    config = PretrainedConfig(architectures=[architecture])
    config.model_type = model_type
    try:
        config = override(config)
    except (AssertionError, AttributeError, ValueError):  # It looked for layers that this config does not have.
        return True
    return (config.model_type, config.architectures) != (model_type, [architecture])


def test_every_family_that_vllm_turns_is_named(override):
    """Older releases turn fewer; the list is the newest one's that was read."""
    pairs = {(kind, "AForCausalLM") for kind in {*MTP_MODEL_TYPES, *CONFIG_MAPPING.keys()}}
    pairs |= {("a", architecture) for architecture in MTP_ARCHITECTURES}
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        pairs |= {(kind, name) for name in ([names] if isinstance(names, str) else names)}

    turned = {pair for pair in pairs if is_turned(override, *pair)}
    named = {(kind, name) for kind, name in pairs if has_mtp_layers({"model_type": kind, "architectures": [name]})}

    assert len(turned) > 20
    assert turned <= named, sorted(turned - named)
