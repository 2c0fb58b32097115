"""The tokenizer: SentencePiece BPE, lossless on every Unicode string, and the rendering of conversations.

`python -m tokenizer train --data FILE_OR_FOLDER --out DIR` trains one, `python -m tokenizer eval DIR` measures one.
"""

from tokenizer.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

__all__ = ["SPECIAL_TOKENS", "StreamDecoder", "Tokenizer"]
