"""Finds the lines of a file that mean most nearly what a question does.

    python examples/embeddings/search.py URL FILE QUESTION

URL is where a model answers, such as http://127.0.0.1:8080/predictions/embeddings. Vectors of
length 1 are compared by their product, which is the cosine.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

import numpy as np


def embed(url: str, texts: list[str], **parameters: object) -> np.ndarray:
    """The vectors of texts, `[texts, dimensions]` of length 1."""
    body = json.dumps({"inputs": texts, "normalize": True, **parameters}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return np.array(json.load(answer), np.float32)


def main() -> None:
    url, file, question = sys.argv[1:]
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    # Many texts go in one request; a server takes 128 unless it is set otherwise.
    parts = [embed(url, lines[i : i + 128]) for i in range(0, len(lines), 128)]
    scores = np.concatenate(parts) @ embed(url, [question])[0]
    for i in np.argsort(-scores, kind="stable")[:3]:
        print(f"{scores[i]:.3f}  {lines[i]}")


if __name__ == "__main__":
    main()
