"""The names of files in a traced folder, in an archive and inside a traced file.

Every other module takes them from here, so that writer and reader cannot drift apart.
"""

from __future__ import annotations

#: The model as TorchScript, `ft_handler.model.bundle` writes and reads it.
TRACED_FILE = "traced_model.pt"
#: Carried inside the traced file: what it says of itself (`ft_handler.model.info`).
METADATA_FILE = "ft_handler.json"
#: A fast tokenizer, beside the traced file and inside it.
TOKENIZER_FILE = "tokenizer.json"
#: WordPiece's words one a line: what is read where there is no tokenizer file.
VOCABULARY_FILE = "vocab.txt"
#: What transformers wrote of the tokenizer; kept for the reader, never read here.
TOKENIZER_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
#: TorchServe's settings of the model, the handler's among them.
CONFIG_FILE = "model-config.yaml"
#: The handler's settings as older archives have them.
OLDER_CONFIG_FILE = "setup_config.json"
#: Label names by number; where it is there, it wins over the traced file's own.
LABELS_FILE = "index_to_name.json"
#: What `ft-handler tune` measured, for an archive that brings its own.
GEMM_TABLE = "gemm_table.json"
#: A request to try the model with, as JSON and as the body of a plain-text request.
SAMPLE_REQUEST = "sample_request.json"
SAMPLE_TEXT = "sample_text.txt"
#: The ops.
LIBRARY = "libpyt_fastertransformer.so"
