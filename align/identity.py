"""What names a model that is in memory, wherever it came from."""

import hashlib
import json

import torch

from align.model import DualEncoder


def weights_fingerprint(model: DualEncoder) -> str:
    """A SHA-256 over every weight, the configuration and the tokenizer of a model.

    It is not that of the bundle it would be saved as (`align.bundle.fingerprint`), which is over
    files: it is for models that have none of ours, such as OpenCLIP's and Hugging Face's.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    tokenizer = model.tokenizer
    cleaning = f"{tokenizer.context_length} {tokenizer.clean} "
    vocabulary = json.loads(tokenizer.backend.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # these are of its last use, and no part of it
        vocabulary.pop(setting, None)
    digest.update((cleaning + json.dumps(vocabulary, sort_keys=True)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
