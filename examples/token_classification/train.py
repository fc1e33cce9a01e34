"""Trains this folder's adapter: a few minutes on a CPU, on sentences that are made up here.

python examples/token_classification/train.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, BertForTokenClassification

from ft_handler.prepare.hub import resolve

BASE = "sentence-transformers/all-MiniLM-L6-v2"
LABELS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
SENTENCES, HELD_OUT, EPOCHS, BATCH = 1500, 200, 3, 16

#: Names by kind, and sentences with places for a person {P}, an organisation {O}, a location {L}.
MATERIAL = json.loads((Path(__file__).parent / "material.json").read_text())


def filled(rng: random.Random) -> tuple[list[str], list[str]]:
    """One sentence as words and their labels."""
    words, labels = [], []
    for part in rng.choice(MATERIAL["sentences"]).split():
        if part not in ("{P}", "{O}", "{L}"):
            words.append(part)
            labels.append("O")
            continue
        if part == "{P}":
            kind, name = "PER", rng.choice(MATERIAL["first"])
            if rng.random() < 0.8:
                name += " " + rng.choice(MATERIAL["last"])
        elif part == "{L}":
            kind, name = "LOC", rng.choice(MATERIAL["places"])
        else:
            stem = rng.choice([rng.choice(MATERIAL[of]) for of in ("stems", "last", "places")])
            kind, name = "ORG", f"{stem} {rng.choice(MATERIAL['kinds'])}"
            if rng.random() < 0.3:
                name = f"University of {rng.choice(MATERIAL['last'])}"
        for i, word in enumerate(name.split()):
            words.append(word)
            labels.append(f"{'I' if i else 'B'}-{kind}")
    return words, labels


def batches(tokenizer, sentences):
    """Padded ids, masks and labels; a word's later tokens continue its entity."""
    for at in range(0, len(sentences), BATCH):
        part = sentences[at : at + BATCH]
        words = [words for words, _ in part]
        encoded = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        wanted = torch.full(encoded["input_ids"].shape, -100)
        for row, (_, labels) in enumerate(part):
            before = None
            for column, word in enumerate(encoded.word_ids(row)):
                if word is not None:
                    label = labels[word].replace("B-", "I-") if word == before else labels[word]
                    wanted[row, column] = LABELS.index(label)
                before = word
        yield encoded, wanted


def main() -> None:
    output = Path(sys.argv[1])
    torch.manual_seed(1)
    rng = random.Random(1)
    train = [filled(rng) for _ in range(SENTENCES)]
    base = resolve(BASE, None).name
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = BertForTokenClassification.from_pretrained(
        base, num_labels=len(LABELS), id2label=dict(enumerate(LABELS))
    )
    config = LoraConfig(
        task_type="TOKEN_CLS", r=4, lora_alpha=8, lora_dropout=0.05, modules_to_save=["classifier"],
        target_modules=["query", "value", "intermediate.dense", "output.dense"],
    )  # fmt: skip
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    steps = EPOCHS * -(-SENTENCES // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    model.train()
    for epoch in range(EPOCHS):
        rng.shuffle(train)
        total = 0.0
        for encoded, wanted in batches(tokenizer, train):
            logits = model(**encoded).logits
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * BATCH / SENTENCES
        print(f"epoch {epoch + 1}: mean loss {total:.4f}", flush=True)
    model.eval()
    held_out = [filled(rng) for _ in range(HELD_OUT)]
    right = count = 0
    with torch.inference_mode():
        for encoded, wanted in batches(tokenizer, held_out):
            kept = wanted >= 0
            right += int((model(**encoded).logits.argmax(-1) == wanted)[kept].sum())
            count += int(kept.sum())
    print(f"{right} of {count} tokens of {HELD_OUT} other sentences are right")
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(output)
    (output / "README.md").unlink(missing_ok=True)
    (output / "labels.json").write_text(json.dumps(dict(enumerate(LABELS))) + "\n")


if __name__ == "__main__":
    main()
