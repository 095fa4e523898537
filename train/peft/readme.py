"""The README of an exported folder: how to load it, and what the folder cannot hold."""

import json
from typing import Any

from adapters.backbone.model import Backbone
from adapters.format.spec import AdapterSpec, Pooling


def readme(spec: AdapterSpec, config: Any, host: Backbone) -> str:
    """Markdown. config: of PEFT."""
    base = json.dumps(config.base_model_name_or_path)
    revision = "" if config.revision is None else f", revision={json.dumps(config.revision)}"
    activation = "softmax(-1)" if spec.activation == "softmax" else "sigmoid()"
    notes = [
        "Outputs in this order: " + ", ".join(f"`{label}`" for label in spec.labels) + ".",
        "The temperature of the adapter's scores is part of the last layer.",
        f"It was served with at most {spec.max_length} tokens of a text.",
    ]
    if spec.multi_label:
        thresholds = ", ".join(f"{each:g}" for each in spec.label_thresholds)
        notes.append(
            "A text has each label whose score reaches its threshold; in the same order: "
            f'{thresholds}. Set `problem_type="multi_label_classification"` to train on.'
        )
    if spec.abstain_below is not None:
        notes.append(f"It was to abstain where the best score is below {spec.abstain_below:g}.")
    if host.family.causal and spec.head.pooling is Pooling.ANSWER:
        notes.append(
            "The head reads `<|endoftext|>`: append it to every text, and give the model another "
            "padding token, or one text at a time. To import the folder again: `--end-token`."
        )
    listed = "\n".join(f"- {note}" for note in notes)
    return f"""---
base_model: {base}
library_name: peft
---

# A LoRA adapter for sequence classification

{listed}

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained(
    {base}{revision}, num_labels={len(spec.labels)}
)
model = PeftModel.from_pretrained(base, ".")  # this folder
scores = model(**inputs).logits.{activation}
```
"""
