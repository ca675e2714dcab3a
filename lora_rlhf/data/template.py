"""How prompts and responses become ids: the same in SFT, reward, PPO, evaluation and chat."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from lora_rlhf.data.plain import Continuation, adds_prefix_space, encode
from lora_rlhf.data.records import Messages
from lora_rlhf.errors import DataError

DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
_MEDIA = ("image", "vision", "video", "audio")  # their pads stand for embeddings
_SENTINEL = "sentinel7241"
_PROBE = "The quick brown fox, 3.14 times; na\u00efve\n\tend."
Mode = Literal["auto", "default", "none"]


class RefusedMessages(DataError):
    """A chat template that will not render a prompt's turns."""


class ChatFormat:
    """A tokenizer with one way to write prompts and responses.

    - `auto`: the tokenizer's own chat template; `DEFAULT_TEMPLATE` where it has none. A prompt
      ends with the template's generation prompt (without thinking, where the template has that
      switch); a response is stripped of outer white space and ends with the template's
      end-of-turn token.
    - `default`: `DEFAULT_TEMPLATE` always: turns under `User:` and `Assistant:`, ended by EOS.
    - `none`: plain continuation. A prompt of one user turn is its text as it stands, and a response
      continues it to the letter, so that a leading space belongs to the response. Several turns
      are written as `Human:` and `Assistant:` paragraphs. A response ends with EOS.

    BOS stands exactly once at the start: the one the template writes, else one put there where
    the tokenizer has it (for a tokenizer's own template: where its plain encoding adds it; such
    templates leave BOS out on purpose when it is a turn marker or the end token).

    A response is tokenised apart from its prompt, so that its ids do not depend on the prompt.

    Attributes:
        tokenizer: as given.
        mode: `none`, `default` or `auto`, after the choice above.
        end_id: what a finished response ends with.
        stop_ids: every token that ends a response: `end_id`, EOS, and `extra_stop_ids`.
        pad_id: fills rows on the right; never a stop token. Lengths come from counts, never from
            this id. A tokenizer without a pad token, or whose pad token is one of
            `extra_stop_ids`, gets one: its unknown token, else a pad-like or reserved added token,
            else the first ordinary one.
        sha256: of template and tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer with an EOS token.
        mode: see above.
        pad_token: in the vocabulary and not a stop token; unset, the tokenizer's.
        extra_stop_ids: further end tokens, such as those of a generation config.

    Raises:
        DataError: a pad token equal to EOS or to the end-of-turn token, a pad token that is not in
            the vocabulary, or no EOS token.
    """

    def __init__(
        self,
        tokenizer: Any,
        mode: Mode = "auto",
        pad_token: str | None = None,
        extra_stop_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        own = _own_template(tokenizer)
        self.mode: Mode = "default" if mode == "auto" and own is None else mode
        self._template = own if self.mode == "auto" else DEFAULT_TEMPLATE
        self.end_id = self._find_end()
        stops = [self.end_id, tokenizer.eos_token_id, *extra_stop_ids]
        # A dict keeps the order and drops repetitions.
        self.stop_ids = tuple(dict.fromkeys(int(i) for i in stops if i is not None))
        self.pad_id = self._find_pad(pad_token)
        self._adds_bos = self._leads_with_bos()
        self._continuation = Continuation(tokenizer, self._continues_a_line())
        self.sha256 = self._hash()

    # -- ids ------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a prompt up to where the response starts.

        Raises:
            RefusedMessages: the template will not have these roles in this order.
        """
        assert messages, "a prompt has at least one turn"
        if self.mode == "none":
            ids = encode(self.tokenizer, dialogue_text(messages))
        else:
            text = self._render(messages, add_generation_prompt=True)
            ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return self._with_one_bos(ids)

    def response_ids(self, text: str, end: bool = True) -> list[int]:
        """Ids of a response, with the end token unless it is cut short."""
        if self.mode != "none":
            text = text.strip()
        return self._continuation.encode(text) + [self.end_id] * end

    def text_ids(self, text: str, end: bool = True) -> list[int]:
        """Ids of a document without a prompt: BOS, the text, EOS unless it is cut short."""
        ids = self._with_one_bos(encode(self.tokenizer, text), plain=True)
        eos = self.tokenizer.eos_token_id
        return ids + [self.end_id if eos is None else eos] * end

    def decode(self, ids: Sequence[int]) -> str:
        """The response up to its first stop token, without special tokens.

        Stripped of outer white space but in mode `none`, where a leading space belongs to it.
        """
        live = []
        for token in ids:
            if token in self.stop_ids:
                break
            live.append(int(token))
        text = self._continuation.decode(live)
        return text if self.mode == "none" else text.strip()

    # -- rendering ------------------------------------------------------------------------------

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                enable_thinking=False,
            )
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise RefusedMessages(
                f"The chat template of {self.tokenizer.name_or_path or 'the tokenizer'} refuses a "
                f"prompt with the roles {roles}: {error}. Allowed by every template: user and "
                f"assistant in turn, user first and last. Mend the rows, or set "
                f"base.chat_template=default."
            ) from error
        assert isinstance(text, str)
        return text

    def _with_one_bos(self, ids: list[int], plain: bool = False) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == bos:
            start += 1
        add = self._adds_bos or plain
        return [bos] * (start > 0 or add) + ids[start:]

    def _leads_with_bos(self) -> bool:
        """Whether BOS is put before a prompt whose rendering has none."""
        if self.mode != "auto":
            return True
        ids = self.tokenizer.encode("a")
        return bool(ids) and ids[0] == self.tokenizer.bos_token_id

    def _continues_a_line(self) -> bool:
        """Whether a response stands in the middle of a text, and not after a special token."""
        if self.mode == "none":
            return True
        turn: Messages = ({"role": "user", "content": "a"},)
        return self._render(turn, add_generation_prompt=True).endswith("\n")

    # -- tokens ---------------------------------------------------------------------------------

    def _find_end(self) -> int:
        """The end-of-turn token: the first special or added one after an assistant's turn."""
        eos = self.tokenizer.eos_token_id
        if self.mode == "auto":
            turns: Messages = (
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": _SENTINEL},
            )
            tail = self._render(turns, add_generation_prompt=False).rpartition(_SENTINEL)[2]
            marks = {*self.tokenizer.added_tokens_decoder, eos}
            for token in self.tokenizer.encode(tail, add_special_tokens=False):
                if token in marks:
                    return int(token)
        if eos is None:
            raise DataError(
                f"The tokenizer {self.tokenizer.name_or_path} has no EOS token, so no response "
                f"could end. Set eos_token in its tokenizer_config.json, or use another base.model."
            )
        return int(eos)

    def _find_pad(self, wanted: str | None) -> int:
        tokenizer = self.tokenizer
        ends = {self.end_id, tokenizer.eos_token_id}
        if wanted is not None:
            pad = tokenizer.get_vocab().get(wanted)
            if pad is None:
                raise DataError(
                    f"base.pad_token: {wanted!r} is not in the vocabulary of the tokenizer. "
                    f"Allowed: one token that ends nothing. {self._pad_advice()}"
                )
            if pad in self.stop_ids:
                raise DataError(
                    f"base.pad_token: {wanted!r} (id {pad}) ends a response, so padding could not "
                    f"be told from an end. {self._pad_advice()}"
                )
            return int(pad)
        pad = tokenizer.pad_token_id
        if pad is not None and pad in ends:
            raise DataError(
                f"The tokenizer's pad token {tokenizer.pad_token!r} (id {pad}) is equal to its "
                f"EOS or end-of-turn token, so padding could not be told from an end. "
                f"{self._pad_advice()}"
            )
        if pad is not None and pad not in self.stop_ids:
            return int(pad)
        return self._pad_candidates()[0]

    def _pad_candidates(self) -> list[int]:
        """Ids that can pad, the likeliest first; the same list for the same tokenizer."""
        tokenizer = self.tokenizer
        taken = {*self.stop_ids, tokenizer.bos_token_id}
        added = {i: str(t).lower() for i, t in sorted(tokenizer.added_tokens_decoder.items())}
        named = [
            i
            for word in ("pad", "unk", "reserved")
            for i, token in added.items()
            if word in token and not any(medium in token for medium in _MEDIA)
        ]
        ordinary = sorted(tokenizer.get_vocab().values())
        order = [tokenizer.unk_token_id, *named, *added, *ordinary]
        return [int(i) for i in dict.fromkeys(order) if i is not None and i not in taken]

    def _pad_advice(self) -> str:
        names: list[str] = self.tokenizer.convert_ids_to_tokens(self._pad_candidates()[:5])
        return f"Set base.pad_token to one of: {', '.join(map(repr, names))}."

    # -- identity -------------------------------------------------------------------------------

    def _hash(self) -> str:
        """Of what the ids of a text depend on; not of files, which change with versions."""
        facts = [
            self.mode,
            self._template if self.mode != "none" else "",
            sorted(self.tokenizer.get_vocab().items()),
            encode(self.tokenizer, _PROBE),
            adds_prefix_space(self.tokenizer),
            self._adds_bos,
            self.end_id,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def dialogue_text(messages: Messages) -> str:
    """A prompt without a template: one user turn as it stands, several as labelled paragraphs."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    labels = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    turns = [labels[m["role"]] + m["content"] for m in messages]
    return "\n\n".join([*turns, "Assistant:"])


def _own_template(tokenizer: Any) -> str | None:
    """The tokenizer's template for plain chat; None where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    template: str = tokenizer.get_chat_template()
    return template
