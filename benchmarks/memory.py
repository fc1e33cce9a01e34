"""Resident memory of a process that serves a model, by precision; needs no quiet machine.

    python benchmarks/memory.py
    python benchmarks/memory.py --data-type fp32 int8 --layers 24 --hidden 1024 --heads 16

A BERT with random weights is traced in each precision, and a process of its own loads it with
`Predictor`, as a worker does, warm-up included, and answers one sentence. What it then holds is
`VmRSS` of /proc/self/status, the most it ever held `VmHWM`; beside them stands the same process
with nothing loaded but the library.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ft_handler import precisions
from ft_handler.files import TRACED_FILE
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace

TOKENIZER = "sentence-transformers/all-MiniLM-L6-v2"
PROCESS = """
import json, sys
from pathlib import Path
import ft_handler
from ft_handler import Predictor
def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return [round(int(values[name].split()[0]) / 1024) for name in ("VmRSS", "VmHWM")]
ft_handler.load_library()
empty = memory()[0]
model = Predictor.load(sys.argv[1], device="cpu", num_threads=2)
model.predict("A warm, funny film that never outstays its welcome.")
print(json.dumps([empty, *memory()]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-type", nargs="+", default=list(precisions.names()))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    arguments = parser.parse_args()
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_attention_heads=arguments.heads,
        intermediate_size=4 * arguments.hidden,
        num_labels=2,
    )
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        BertForSequenceClassification(config).save_pretrained(checkpoint)
        for data_type in arguments.data_type:
            quantized = precisions.get(data_type).quantized is not None
            folder = trace(
                TraceOptions(
                    mode="sequence_classification",
                    model_name_or_path=str(checkpoint),
                    tokenizer_name=TOKENIZER,
                    output=Path(scratch) / data_type,
                    data_type=data_type,
                    batch_size=1,
                    max_seq_length=16,
                    keep_products=["none"] if quantized else None,
                )
            )
            found = subprocess.run(
                [sys.executable, "-c", PROCESS, str(folder)],
                check=True,
                capture_output=True,
                text=True,
            )
            empty, resident, most = json.loads(found.stdout.splitlines()[-1])
            size = (folder / TRACED_FILE).stat().st_size
            print(
                f"{data_type}: {resident:,} MiB resident, {resident - empty:,} for the model; "
                f"{most:,} at most, while loading; the file is {size / 2**20:,.0f} MiB",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
