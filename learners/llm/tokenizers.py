"""Text as token ids: a character tokenizer that needs no files, and the tokenizer of a pretrained model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What actors and learners need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Token ids are at least 0 and below this."""
        ...

    @property
    def end(self) -> int:
        """Id of the token that ends a completion."""
        ...

    @property
    def pad(self) -> int:
        """Id of the token that fills batches; it is never attended to, and may be `end`."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text within a sequence: nothing is put before it or after it."""
        ...

    def encode_prompt(self, text: str, hint: str = "") -> list[int]:
        """Ids of a whole prompt, after which a completion begins; `hint` is the beginning of the answer, given."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; the end token and other special ones leave no trace in it."""
        ...


CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
SPECIAL = ("<|pad|>", "<|end|>", "<|begin|>")  # ids 0, 1 and 2


class CharacterTokenizer:
    """One token per character: newline and printable ASCII; prompts begin with a token of their own."""

    pad, end, begin = range(3)
    vocab_size = len(SPECIAL) + len(CHARACTERS)

    def __init__(self) -> None:
        self._ids = {character: index for index, character in enumerate(CHARACTERS, len(SPECIAL))}
        self._texts = ("",) * len(SPECIAL) + tuple(CHARACTERS)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError, which names them, for characters that have no token."""
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            unknown = sorted({character for character in text if character not in self._ids})
            raise ValueError(
                f"expected newlines and printable ASCII, which the embedded model's tokenizer knows; got {unknown} in "
                f"{text[:80]!r}; write the text without them, or set model.path to a pretrained model"
            ) from None

    def encode_prompt(self, text: str, hint: str = "") -> list[int]:
        """The begin token, the text and the hint; raises ValueError as `encode`."""
        return [self.begin, *self.encode(text), *self.encode(hint)]

    def decode(self, ids: Iterable[int]) -> str:
        """Raises ValueError for an id outside [0, vocab_size)."""
        ids = [int(index) for index in ids]
        wrong = sorted({index for index in ids if not 0 <= index < self.vocab_size})
        if wrong:
            raise ValueError(f"expected token ids from 0 to {self.vocab_size - 1}, got {wrong}")
        return "".join([self._texts[index] for index in ids])

    def pretrained(self) -> PretrainedTokenizer:
        """The same tokens as a tokenizer of Hugging Face, which can be saved beside a model."""
        from tokenizers import Regex, decoders, models, pre_tokenizers, processors
        from tokenizers import Tokenizer as Rules
        from transformers import PreTrainedTokenizerFast

        vocabulary = {text: index for index, text in enumerate((*SPECIAL, *CHARACTERS))}
        pad, end, begin = SPECIAL
        rules = Rules(models.WordLevel(vocabulary, unk_token=""))  # no token is "": unknown characters are an error
        rules.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        rules.decoder = decoders.Fuse()
        rules.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, self.begin)])
        return PretrainedTokenizer(
            PreTrainedTokenizerFast(tokenizer_object=rules, pad_token=pad, eos_token=end, bos_token=begin)
        )


class PretrainedTokenizer:
    """A Hugging Face tokenizer. With a chat template, prompts are user messages and hints begin the assistant's answer."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers.PreTrainedTokenizerBase. Raises ValueError if it has no end-of-sequence token."""
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"expected a tokenizer with an end-of-sequence token, got {type(tokenizer).__name__} of "
                f"{tokenizer.name_or_path!r} without; set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.end = int(tokenizer.eos_token_id)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without special tokens round it."""
        return self._encode(text, add_special_tokens=False) if text else []

    def encode_prompt(self, text: str, hint: str = "") -> list[int]:
        """Ids of the prompt followed by those of the hint, encoded apart: the prompt's are the same with every hint."""
        if self.tokenizer.chat_template is not None:
            message = [{"role": "user", "content": text}]
            chat = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            return self.encode(chat) + self.encode(hint)
        ids = self._encode(text, add_special_tokens=True)
        # Some tokenizers also append the end token, after which a model would begin something else.
        while ids and ids[-1] == self.end:
            ids.pop()
        return ids + self.encode(hint)

    def decode(self, ids: Iterable[int]) -> str:
        """The text as the tokenizer decodes it, without tidying of spaces."""
        text: str = self.tokenizer.decode(
            [int(index) for index in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _encode(self, text: str, **options: bool) -> list[int]:
        try:
            return list(self.tokenizer.encode(text, **options))
        except Exception as error:  # the tokenizers library raises no narrower one
            raise ValueError(f"expected text that the model's tokenizer knows, got {text[:80]!r}: {error}") from error
