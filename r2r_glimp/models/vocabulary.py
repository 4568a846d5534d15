"""Whether two tokenizers speak of the same token ids, and what a tokenizer is, in one hash."""

import hashlib
import json

from transformers import PreTrainedTokenizerFast


def same_vocabulary(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """True if every token, added tokens included, has the same id in both.

    How far the embeddings are padded does not matter: 151936 and 152064 can be one vocabulary.
    """
    return one is other or (
        len(one) == len(other)
        and one.get_added_vocab() == other.get_added_vocab()
        and one.get_vocab() == other.get_vocab()
    )


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of vocabulary, merges and added tokens, in hex.

    Padding, truncation and how text is split before the merges are left out: the first two change
    with use, and transformers builds the last anew in each release.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    canonical = {
        "type": state["model"].get("type"),
        "vocab": state["model"].get("vocab"),
        "merges": state["model"].get("merges"),
        "added_tokens": [[t["id"], t["content"], t["special"]] for t in state["added_tokens"]],
    }
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
