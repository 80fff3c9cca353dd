"""What the runtime has to give: transformers in float32 on the dequantized weights."""

from __future__ import annotations

import json

import numpy as np
import torch

from qhub import QuantizedWeights


def reference(folder, ids):
    """Logits of transformers in float32 with the dequantized weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config")
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = QuantizedWeights(folder)
    state = {}
    for name in weights:
        layer = name.removesuffix(".weight")
        state[name] = weights.layer(layer).dequantize(torch.float32) if layer in weights.schemes else weights.read(name).float()
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(ids).logits.numpy()


def off(found, wanted):
    """The largest difference as a share of the range of logits."""
    return np.abs(found - wanted).max() / np.ptp(wanted)
