"""OpenAI's client: floats, base64 (its own choice where nothing is said), dimensions, a refusal."""

from __future__ import annotations

import json
import sys

from openai import APIStatusError, OpenAI


def main(base: str, model: str, *texts: str) -> None:
    """Print what the client makes of each answer; the model's name is the last part of the path."""
    client = OpenAI(base_url=f"{base}/predictions", api_key="none", max_retries=0)
    found: dict[str, object] = {}
    for name, options in (
        ("unsaid", {}),
        ("float", {"encoding_format": "float"}),
        ("base64", {"encoding_format": "base64"}),
        ("dimensions", {"dimensions": 5}),
    ):
        answer = client.embeddings.create(model=model, input=list(texts), **options)
        found[name] = {
            "vectors": [one.embedding for one in answer.data],
            "model": answer.model,
            "tokens": answer.usage.prompt_tokens,
        }
    try:
        client.embeddings.create(model=model, input=[[101, 7592]])
    except APIStatusError as error:
        found["refusal"] = [error.status_code, str(error.body)]
    print(json.dumps(found))


main(*sys.argv[1:])
