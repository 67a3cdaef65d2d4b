"""Fine-tune a language model on one domain after another, and see what it forgets."""

import logging
import os

__all__: list[str] = []

# On import bitsandbytes looks for an optional kernel package and reports that it is not there; nothing here uses it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Tokenizers are used before and after data-loader processes fork; their own threads would only warn about it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
