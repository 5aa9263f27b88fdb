"""What a call with a draft returns."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.generation import GenerateDecoderOnlyOutput

from .stats import DecodingStats


@dataclass
class PardGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns, with the decoding statistics.

    Args:
        stats ([`DecodingStats`], *optional*):
            Rounds, drafted and accepted tokens of this call, summed over rows.
        compile_seconds (`float`, *optional*):
            Wall time of this call that went into compiling, first runs of compiled code included; 0 without any.
    """

    stats: DecodingStats | None = None
    compile_seconds: float | None = None
