"""The model card that is pushed with the policy."""

from __future__ import annotations

from typing import Any

import yaml

from rlhf_ppo.parameters import RunSettings


def model_card(settings: RunSettings, evaluation: dict[str, Any], repo_id: str) -> str:
    """A card with the results of the evaluation, usage that works when pasted, and where the policy came from."""
    score = evaluation["metrics"]["score"]
    base = str(settings.ppo.model_name)
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ppo", "rlhf", "rlhf-ppo"],
        "model-index": [
            {
                "name": repo_id.split("/")[-1],
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "held-out prompts", "type": str(settings.ppo.query_dataset)},
                        "metrics": [
                            {"type": "score", "name": "mean score", "value": score["policy"]["mean"]},
                            {"type": "kl", "name": "KL to the reference, nats", "value": evaluation["kl"]["mean"]},
                        ],
                    }
                ],
            }
        ],
    }
    if "/" in base and not base.startswith((".", "/")) and base.count("/") == 1 and not base.endswith(".gguf"):
        header["base_model"] = base
    lineage = "\n".join(f"- {name}: `{value}`" for name, value in evaluation.get("lineage", {}).items() if value)
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {repo_id.split("/")[-1]}

`{base}`, fine-tuned with PPO against the reward `{settings.ppo.reward_model}`.

| | reference | this model | gain, 95 % interval |
|---|---|---|---|
| mean score | {score["reference"]["mean"]:.3f} | {score["policy"]["mean"]:.3f} | {score["gain"]["mean"]:.3f} [{
        score["gain"]["low"]:.3f}, {score["gain"]["high"]:.3f}] |

On {evaluation["prompts"]} held-out prompts; the KL divergence to the reference is {evaluation["kl"]["mean"]:.2f} nats
per response.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}")
inputs = tokenizer("The film", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=True)[0]))
```

## Lineage

{lineage}
"""
