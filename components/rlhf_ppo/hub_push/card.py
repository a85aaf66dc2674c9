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
    header = yaml.safe_dump(_header(settings, evaluation, name, encoder_decoder), sort_keys=False).strip()
    base, reward = shown(str(settings.ppo.model_name)), shown(str(settings.ppo.reward_model))
    return f"""---
{header}
---

# {name}

`{base}`, fine-tuned with PPO against the reward `{reward}`.

| mean | reference | this model | gain, 95 % interval |
|---|---|---|---|
{_rows(evaluation)}

On {evaluation["prompts"]} held-out prompts. {_said(evaluation)}

```python
{_usage(settings, repo_id, encoder_decoder)}
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
            {"type": "win_rate", "name": "win rate against the reference", "value": evaluation["win_rate"]["mean"]},
            {"type": "kl", "name": "KL to the reference, nats", "value": evaluation["kl"]["mean"]},
        ],
    }
    adapter = settings.hub.hub_adapter
    header: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": task}
    if evaluation["lineage"].get("model revision"):  # only what came from the hub has one
        header["base_model"] = str(settings.ppo.model_name)
        header["base_model_relation"] = "adapter" if adapter else "finetune"
    return {**header, "tags": ["ppo", "rlhf", "rlhf-ppo"], "model-index": [{"name": name, "results": [results]}]}


def _rows(evaluation: dict[str, Any]) -> str:
    metrics, judge = evaluation["metrics"], evaluation.get("judge")
    rows = [_row("score", metrics["score"], 3)]
    if judge:
        rows.append(_row(f"score of the judge `{shown(judge['name'])}`", judge, 3))
    return "\n".join([*rows, _row("response length, tokens", metrics["response_length"], 1)])


def _said(evaluation: dict[str, Any]) -> str:
    """What the evaluation found besides the means, in sentences."""
    champion = evaluation.get("champion")
    text = [
        f"{_percents(evaluation['win_rate'])} of the responses score higher than the reference's to the same prompt, a "
        "tie counting one half.",
        f"The KL divergence to the reference is {evaluation['kl']['mean']:.2f} nats per response; the responses keep "
        f"{evaluation['distinct2_ratio']:.0%} of its distinct word pairs.",
    ]
    if champion:
        gain = champion["metrics"]["score"]["gain"]
        text.append(
            f"Over the model that was published before (`{champion['revision']}`) the score's gain is "
            f"{gain['mean']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]."
        )
    return "\n".join(text)


def _percents(share: dict[str, float]) -> str:
    return f"{share['mean']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"


def _row(label: str, found: dict[str, Any], digits: int) -> str:
    before, after, gain = found["reference"]["mean"], found["policy"]["mean"], found["gain"]
    cells = [f"{value:.{digits}f}" for value in (before, after, gain["mean"], gain["low"], gain["high"])]
    return f"| {label} | {cells[0]} | {cells[1]} | {cells[2]} [{cells[3]}, {cells[4]}] |"


def _usage(settings: RunSettings, repo_id: str, encoder_decoder: bool) -> str:
    library, prefix = ("peft", "AutoPeftModelFor") if settings.hub.hub_adapter else ("transformers", "AutoModelFor")
    prompt: Any = "Once upon a time"
    if encoder_decoder:
        return (
            f"{_imports(library, prefix + 'Seq2SeqLM', 'AutoTokenizer')}\n\n"
            f'model = {prefix}Seq2SeqLM.from_pretrained("{repo_id}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
            f'inputs = tokenizer("{prompt}", return_tensors="pt")\n'
            "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40, do_sample=True))[0])"
        )
    if settings.data.data_chat_template:
        turns = (("system", settings.data.data_system_prompt), ("user", "Tell me a story."))
        prompt = [{"role": role, "content": text} for role, text in turns if text]
    generation = f'prompt = {prompt!r}\nprint(generate(prompt, max_new_tokens=40, do_sample=True)[0]["generated_text"])'
    if not settings.hub.hub_adapter:
        made = f'generate = pipeline("text-generation", model="{repo_id}")'
        return f"from transformers import pipeline\n\n{made}\n{generation}"
    return (
        f"{_imports(library, prefix + 'CausalLM', 'AutoTokenizer, pipeline')}\n\n"
        f'model = {prefix}CausalLM.from_pretrained("{repo_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
        f'generate = pipeline("text-generation", model=model, tokenizer=tokenizer)\n{generation}'
    )


def _imports(library: str, model: str, others: str) -> str:
    if library == "transformers":
        return f"from transformers import {model}, {others}"
    return f"from {library} import {model}\nfrom transformers import {others}"


def _lineage(evaluation: dict[str, Any]) -> str:
    known = {name: value for name, value in evaluation["lineage"].items() if value is not None and value != ""}
    return "\n".join(f"- {name}: `{shown(str(value))}`" for name, value in known.items())
