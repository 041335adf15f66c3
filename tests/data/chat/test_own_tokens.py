"""Tokenizers that render conversations themselves, with no template (mistral-common's): the same
rule, on tokens."""

import json
from typing import Any

import pytest

from ratel.data import byte_level_tokenizer, check_vocab
from ratel.data.batches.encode import Encoder
from ratel.data.sources.records import RecordError, parse_line

pytestmark = pytest.mark.unit


class Own:
    """As transformers' MistralCommonBackend: no templates, no added vocabulary, and a last answer
    only to be continued."""

    chat_template = None
    is_fast = False

    def __init__(self, *, forgets: bool = False, drops: tuple[str, ...] = ()) -> None:
        self._bytes, self._forgets, self._drops = byte_level_tokenizer(), forgets, drops

    def __call__(self, text: str, add_special_tokens: bool = True, return_attention_mask: bool = True, verbose: bool = True) -> Any:
        return {"input_ids": self._bytes(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def __getattr__(self, name: str) -> Any:
        if name in ("bos_token_id", "eos_token_id", "pad_token_id", "all_special_tokens", "all_special_ids", "get_vocab",
                    "decode", "convert_ids_to_tokens"):
            return getattr(self._bytes, name)
        raise AttributeError(name)

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        raise NotImplementedError

    def apply_chat_template(self, conversation: list[dict[str, Any]], tools: Any, tokenize: bool, return_dict: bool,
                            continue_final_message: bool = False) -> list[int]:
        assert tokenize and not return_dict
        if (conversation[-1]["role"] == "assistant") != continue_final_message:
            raise ValueError("Expected last role User or Tool")
        text = "".join(tool["function"]["name"] for tool in tools or ())
        ids = [self.bos_token_id, *text.encode()]
        for number, message in enumerate(conversation, start=1):
            said = message.get("content") or ""
            for call in message.get("tool_calls", ()):
                assert isinstance(call["function"]["arguments"], str)
                said += f"[{call['function']['name']}({call['function']['arguments']})]"
            if number < len(conversation) and self._forgets and message["role"] == "assistant":
                said = said.rpartition("</think>")[2]
            if message["role"] in self._drops:
                said = ""
            ids += said.encode() if message["role"] == "assistant" else f"[INST]{said}[/INST]".encode()
            if message["role"] == "assistant" and number < len(conversation):
                ids.append(self.eos_token_id)
        return ids


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "four"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"city": "Paris"}}}]}


def encoded(tokenizer: Own, talk: list[dict[str, Any]], **more: Any) -> tuple[str, str, int]:
    """What is learned, the whole, and the number of texts."""
    document = Encoder(tokenizer).encode(parse_line(json.dumps({"messages": talk, **more}).encode()))
    return tokenizer.decode(document.ids[document.targets]), tokenizer.decode(document.ids), len(document.starts)


def test_answers_with_their_end_are_learned() -> None:
    whole = "<|bos|>[INST]Hi[/INST]Hello.<|eos|>[INST]2+2?[/INST]four<|eos|>"
    assert encoded(Own(), TALK) == ("Hello.<|eos|>four<|eos|>", whole, 1)
    assert encoded(Own(), TALK[:3])[0] == "Hello.<|eos|>"
    assert encoded(Own(), [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]) == ("four<|eos|>", whole, 1)
    talk = [TALK[0], CALL, {"role": "tool", "content": "20"}, TALK[3]]
    assert encoded(Own(), talk)[0] == '[look({"city": "Paris"})]<|eos|>four<|eos|>'


def test_a_history_that_is_rewritten_makes_several_texts() -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>a</think>Hello."}, *TALK[2:]]
    said, whole, count = encoded(Own(forgets=True), talk)
    assert said == "<think>a</think>Hello.<|eos|>four<|eos|>" and count == 2
    assert whole.endswith("<|bos|>[INST]Hi[/INST]Hello.<|eos|>[INST]2+2?[/INST]four<|eos|>")


def test_what_it_refuses_or_leaves_out_is_refused() -> None:
    for tokenizer, message in ((Own(drops=("user",)), 'leaves out what message 1 says: its "content"'),
                               (Own(drops=("assistant",)), 'leaves out what message 4 says: its "content"')):
        with pytest.raises(RecordError, match=message):
            encoded(tokenizer, TALK)
    thought = [TALK[0], {**TALK[1], "reasoning_content": "a greeting"}]
    with pytest.raises(RecordError, match='message 2 says: its "reasoning_content"'):
        encoded(Own(), thought)
    with pytest.raises(RecordError, match="the tokenizer refuses these messages: Expected last role"):
        encoded(Own(), [*TALK[:2], TALK[1]])


def test_its_vocabulary_is_checked_without_an_added_one() -> None:
    check_vocab(Own(), 259)
