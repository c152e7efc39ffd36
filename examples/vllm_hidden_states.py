"""Has vLLM write the hidden states of the prompts of `sts-fast capture --prompts-only`, for `--from-export`.

    python examples/vllm_hidden_states.py MODEL prompts.jsonl FOLDER LAYER...

Written after vLLM's documentation; see docs/activations.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import load_hidden_states


def main(model: str, prompts: str, folder: str, *layers: str) -> None:
    draft = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [int(layer) for layer in layers]}}
    connector = {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer"}
    llm = LLM(
        model=model,
        enable_prefix_caching=False,  # it leaves out the tokens that prompts start with alike
        enable_chunked_prefill=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": draft,
        },
        kv_transfer_config={**connector, "kv_connector_extra_config": {"shared_storage_path": folder}},
    )
    requests = [json.loads(line) for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    inputs = [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests]
    for output in llm.generate(inputs, SamplingParams(max_tokens=1)):
        load_hidden_states(output.kv_transfer_params["hidden_states_path"])  # waits until it is written


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
