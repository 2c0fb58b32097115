"""The tokenizer: SentencePiece BPE, lossless on every Unicode string, and the rendering of conversations.

`python -m tokenizer train --data PATH --out DIR` trains one; `python -m tokenizer evaluate --dir DIR --data PATH`
measures one. PATH is a .parquet or .txt file, or a folder of them.
"""

from tokenizer.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

__all__ = ["SPECIAL_TOKENS", "StreamDecoder", "Tokenizer"]
