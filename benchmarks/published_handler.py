"""For comparison: the behaviour of TorchServe's published Hugging Face example.

Every request is tokenized alone and padded to `max_length`; the batch goes through one plain traced
model. Written for this benchmark after the behaviour of `Transformer_handler_generalized.py` in
pytorch/serve (Apache-2.0), without its prints and with the input parsing it needs today.
"""

import ast
import os

import torch
from transformers import AutoTokenizer
from ts.torch_handler.base_handler import BaseHandler


class PublishedHandler(BaseHandler):
    """Pads every request to `max_length`."""

    def initialize(self, context):
        properties = context.system_properties
        folder, gpu = properties["model_dir"], properties.get("gpu_id")
        settings = context.model_yaml_config["handler"]
        self.mode, self.max_length = settings["mode"], int(settings["max_length"])
        use_gpu = torch.cuda.is_available() and gpu is not None
        self.device = torch.device(f"cuda:{gpu}" if use_gpu else "cpu")
        path = os.path.join(folder, "traced_model.pt")
        self.model = torch.jit.load(path, map_location=self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.initialized = True

    def preprocess(self, data):
        ids, masks = [], []
        for row in data:
            request = row.get("data") or row.get("body")
            if isinstance(request, (bytes, bytearray)):
                request = request.decode("utf-8")
            if self.mode == "question_answering":
                if not isinstance(request, dict):
                    request = ast.literal_eval(request)
                texts = (request["question"], request["context"])
            else:
                texts = (request,)
            encoded = self.tokenizer(
                *texts,
                max_length=self.max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            )
            ids.append(encoded["input_ids"].to(self.device))
            masks.append(encoded["attention_mask"].to(self.device))
        return torch.cat(ids), torch.cat(masks)

    @torch.inference_mode()
    def inference(self, data):
        ids, masks = data
        outputs = self.model(ids, masks)
        if self.mode == "question_answering":
            starts, ends = outputs[0], outputs[1]
            return [
                self.tokenizer.decode(ids[i, starts[i].argmax() : ends[i].argmax() + 1])
                for i in range(len(ids))
            ]
        return [str(row.argmax().item()) for row in outputs[0]]

    def postprocess(self, data):
        return data
