"""The model card that is pushed with the policy."""

from __future__ import annotations

import re
from typing import Any

import yaml

from rlhf_ppo.parameters import RunSettings


def model_card(settings: RunSettings, evaluation: dict[str, Any], repo_id: str, encoder_decoder: bool = False) -> str:
    """A card with the results of the evaluation, usage that works when pasted, and where the policy came from.

    ``evaluation`` is the content of evaluation.json.
    """
    name = repo_id.split("/")[-1]
    score, length = evaluation["metrics"]["score"], evaluation["metrics"]["response_length"]
    header = yaml.safe_dump(_header(settings, evaluation, name, encoder_decoder), sort_keys=False).strip()
    base, reward = shown(str(settings.ppo.model_name)), shown(str(settings.ppo.reward_model))
    return f"""---
{header}
---

# {name}

`{base}`, fine-tuned with PPO against the reward `{reward}`.

| mean | reference | this model | gain, 95 % interval |
|---|---|---|---|
{_row("score", score, 3)}
{_row("response length, tokens", length, 1)}

On {evaluation["prompts"]} held-out prompts. The KL divergence to the reference is {evaluation["kl"]["mean"]:.2f} nats
per response; the responses keep {evaluation["distinct2_ratio"]:.0%} of its distinct word pairs.

```python
{_usage_of_encoder(repo_id) if encoder_decoder else _usage(settings, repo_id)}
```

## Lineage

{_lineage(evaluation)}
"""


def shown(source: str) -> str:
    """A source's name as the public may see it: no directories of a local path, no credentials of a URL."""
    if source.startswith(("/", "./", "../", "~", "file:")):
        return source.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"//[^/@\s]*@", "//", source)


def _header(settings: RunSettings, evaluation: dict[str, Any], name: str, encoder_decoder: bool) -> dict[str, Any]:
    task = "text2text-generation" if encoder_decoder else "text-generation"
    results = {
        "task": {"type": task},
        "dataset": {"name": "held-out prompts", "type": shown(str(settings.ppo.query_dataset))},
        "metrics": [
            {"type": "score", "name": "mean score", "value": evaluation["metrics"]["score"]["policy"]["mean"]},
            {"type": "kl", "name": "KL to the reference, nats", "value": evaluation["kl"]["mean"]},
        ],
    }
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    if evaluation["lineage"].get("model revision"):  # only what came from the hub has one
        header["base_model"] = str(settings.ppo.model_name)
    return {**header, "tags": ["ppo", "rlhf", "rlhf-ppo"], "model-index": [{"name": name, "results": [results]}]}


def _row(label: str, found: dict[str, Any], digits: int) -> str:
    before, after, gain = found["reference"]["mean"], found["policy"]["mean"], found["gain"]
    cells = [f"{value:.{digits}f}" for value in (before, after, gain["mean"], gain["low"], gain["high"])]
    return f"| {label} | {cells[0]} | {cells[1]} | {cells[2]} [{cells[3]}, {cells[4]}] |"


def _usage(settings: RunSettings, repo_id: str) -> str:
    prompt: Any = "Once upon a time"
    if settings.data.data_chat_template:
        turns = (("system", settings.data.data_system_prompt), ("user", "Tell me a story."))
        prompt = [{"role": role, "content": text} for role, text in turns if text]
    return (
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model="{repo_id}")\n'
        f"prompt = {prompt!r}\n"
        f'print(generate(prompt, max_new_tokens=40, do_sample=True)[0]["generated_text"])'
    )


def _usage_of_encoder(repo_id: str) -> str:
    return (
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n\n"
        f'model = AutoModelForSeq2SeqLM.from_pretrained("{repo_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40, do_sample=True))[0])"
    )


def _lineage(evaluation: dict[str, Any]) -> str:
    known = {name: value for name, value in evaluation["lineage"].items() if value is not None and value != ""}
    return "\n".join(f"- {name}: `{shown(str(value))}`" for name, value in known.items())
