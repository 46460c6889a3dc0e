"""Text and token ids: whole characters from pieces, stop strings, the tokenizer, chat templates."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pilotlight.engine.errors import CheckpointError, InvalidField
from pilotlight.server.config import DEMO_MODEL
from pilotlight.server.text import chat
from pilotlight.server.text.chat import ChatTemplate, load_chat_template
from pilotlight.server.text.detokenizer import Detokenizer
from pilotlight.server.text.stop_strings import StopStrings
from pilotlight.server.text.tokenizer import Tokenizer, load_tokenizer
from pilotlight.tests.server.wire import VOCAB_SIZE, tokenizer

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ---- detokenizer -------------------------------------------------------------------------------


def _in_pieces(token_ids: list[int], cuts: list[int], source: Tokenizer) -> list[str]:
    """The text that comes when the tokens come in pieces of these sizes, the rest one by one."""
    detokenizer = Detokenizer(source, skip_special_tokens=True)
    texts, rest = [], list(token_ids)
    sizes = iter(cuts)
    while rest:
        size = next(sizes, 1)
        texts.append(detokenizer.feed(rest[:size]))
        rest = rest[size:]
    return [*texts, detokenizer.finish()]


@unhurried
@given(text=st.text(max_size=40), cuts=st.lists(st.integers(1, 12), max_size=8))
@example(text="🧯" * 12, cuts=[10])
def test_text_comes_in_whole_characters_wherever_tokens_cut_it(text: str, cuts: list[int]) -> None:
    token_ids = tokenizer().encode(text, add_special_tokens=False)
    pieces = _in_pieces(token_ids, cuts, tokenizer())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


@unhurried
@given(st.lists(st.integers(0, VOCAB_SIZE - 1) | st.integers(3, 258), max_size=60))
@example([0] * 9 + list(tokenizer().encode("🧯", add_special_tokens=False)))
def test_whatever_the_tokens_the_pieces_add_up_to_the_text(token_ids: list[int]) -> None:
    whole = tokenizer().decode(token_ids, skip_special_tokens=True)
    assert "".join(_in_pieces(token_ids, [], tokenizer())) == whole


def test_a_character_is_held_back_until_it_is_whole() -> None:
    fire = tokenizer().encode("🔥", add_special_tokens=False)
    assert len(fire) > 1, "one token would show nothing"
    detokenizer = Detokenizer(tokenizer(), skip_special_tokens=True)
    *texts, last = [detokenizer.feed([token_id]) for token_id in fire]
    assert texts == [""] * (len(fire) - 1)
    assert last == "🔥"


def test_what_never_becomes_a_character_is_shown_at_the_end() -> None:
    first, *_ = tokenizer().encode("🔥", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer(), skip_special_tokens=True)
    assert detokenizer.feed([first]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_bytes_that_are_no_text_do_not_hold_the_stream_for_ever() -> None:
    first, *_ = tokenizer().encode("🔥", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer(), skip_special_tokens=True)
    shown = [detokenizer.feed([first]) for _ in range(40)]
    assert len("".join(shown)) > 20


@cache
def _spaced() -> Tokenizer:
    """As the Llama 2 family's: a word carries its space, a character may be single bytes."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁Hello", "▁world", "▁"]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    source = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    source.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return Tokenizer(source)


def _byte_ids(text: str) -> list[int]:
    return [1 + byte for byte in text.encode()]


def test_spaces_that_belong_to_words_are_kept() -> None:
    assert "".join(_in_pieces([257, 258, 257], [], _spaced())) == "Hello world Hello"


@pytest.mark.parametrize("cuts", [[], [3], [100]])
def test_characters_of_single_bytes_come_whole(cuts: list[int]) -> None:
    token_ids = [257, *_byte_ids("é漢🔥"), 258]
    assert "".join(_in_pieces(token_ids, cuts, _spaced())) == "Helloé漢🔥 world"


# ---- stop strings ------------------------------------------------------------------------------

LETTERS = st.text("ab", min_size=1, max_size=4)


def _fed(pieces: list[str], strings: list[str], include: bool) -> tuple[list[str], str | None]:
    stops = StopStrings(strings, include)
    shown = [stops.feed(piece) for piece in pieces]
    return [*shown, stops.finish()], stops.matched


@unhurried
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
    strings=st.lists(LETTERS, min_size=1, max_size=3),
    include=st.booleans(),
)
@example(pieces=["abab"], strings=["b", "abab"], include=False)
def test_it_does_not_matter_how_the_text_was_cut(
    pieces: list[str], strings: list[str], include: bool
) -> None:
    shown, matched = _fed(pieces, strings, include)
    by_letter, matched_by_letter = _fed(list("".join(pieces)), strings, include)
    assert ("".join(shown), matched) == ("".join(by_letter), matched_by_letter)


@unhurried
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
    strings=st.lists(LETTERS, min_size=1, max_size=3),
)
def test_text_ends_before_the_first_string_that_is_complete(
    pieces: list[str], strings: list[str]
) -> None:
    text = "".join(pieces)
    shown, matched = _fed(pieces, strings, include=False)
    ends = [found.end() for s in strings for found in re.finditer(f"(?={s}).{{{len(s)}}}", text)]
    if not ends:
        assert ("".join(shown), matched) == (text, None)
    else:
        assert matched is not None
        assert "".join(shown) + matched == text[: min(ends)]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["STOP"], include=False)
    assert [stops.feed(text) for text in ("go S", "T", "ART")] == ["go ", "", "START"]


def test_nothing_comes_after_the_match() -> None:
    stops = StopStrings(["."], include=True)
    assert [stops.feed(text) for text in ("a.b", "c")] == ["a.", ""]
    assert stops.finish() == ""


# ---- tokenizer ---------------------------------------------------------------------------------


@unhurried
@given(st.text(max_size=60))
def test_encode_and_decode_are_inverse(text: str) -> None:
    token_ids = tokenizer().encode(text, add_special_tokens=True)
    assert tokenizer().decode(token_ids, skip_special_tokens=False) == text
    assert len(text) <= tokenizer().max_chars(len(token_ids))


def test_ids_beyond_the_vocabulary_become_nothing() -> None:
    token_ids = tokenizer().encode("abc", add_special_tokens=False)
    assert tokenizer().decode([*token_ids, 2**31 - 1], skip_special_tokens=True) == "abc"


def test_a_folder_without_tokenizer_has_none_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "tokenizer.json"))):
        load_tokenizer(tmp_path)


# ---- chat templates ----------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello"}]


def _render(source: str, messages: list[dict[str, str]] = HELLO) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, True)


def test_a_template_sees_messages_special_tokens_and_the_generation_prompt() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}{% endfor %}"
    assert _render(source + "{{ add_generation_prompt }}") == "<s>user:HelloTrue"


def test_what_templates_in_the_wild_use_is_there() -> None:
    assert _render("{{ messages | tojson }}") == '[{"role": "user", "content": "Hello"}]'
    assert _render("{% for m in messages %}x{% break %}{% endfor %}") == "x"
    assert _render("{% for m in messages %}{{ loop.length }}{{ loop.last }}{% endfor %}") == "1True"
    assert _render("{% for k, v in messages[0].items() if k == 'role' %}{{ v }}{% endfor %}") == (
        "user"
    )
    assert _render("{% for x in nobody %}x{% else %}none{% endfor %}") == "none"
    assert _render("{{ '=' * 3 }}{{ 3 * 4 }}{{ 2 ** 10 }}") == "===121024"
    assert _render("  {% if true %}\n  a\n  {% endif %}\n") == "  a\n"
    assert _render("{{ '<é>' | tojson }}") == '"<é>"', "no HTML escapes"


ATTACKS = {
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__['os'].system('true') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "filters": "{{ (messages | map(attribute='__class__') | first).__mro__ }}",
    "mutation": "{{ messages.append(messages[0]) }}",
    "own globals": "{{ raise_exception.__globals__['json'] }}",
    "huge range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "recursion": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "import": "{% import 'os' as os %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops in a macro": (
        "{% macro m() %}{% for i in range(99999) %}{% endfor %}{% endmacro %}"
        "{% for i in range(99999) %}{{ m() }}{% endfor %}"
    ),
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": (
        "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}"
    ),
    "long text": "{{ ('x' * 10 ** 12) | length }}",
    "long list": "{{ (messages * 10 ** 12) | length }}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_sandbox_holds(attack: str) -> None:
    with pytest.raises(InvalidField) as refused:
        _render(ATTACKS[attack])
    assert refused.value.field == "chat.messages"
    assert "chat template" in refused.value.limit


def test_a_template_changes_no_message() -> None:
    messages = [dict(HELLO[0])]
    with pytest.raises(InvalidField):
        _render("{{ messages[0].update(role='system') }}", messages)
    assert messages == HELLO


def test_the_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_PROMPT_CHARS", 1000)
    with pytest.raises(InvalidField, match="longer than 1000 characters"):
        _render("{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}")
    assert len(_render("{% for i in range(1000) %}x{% endfor %}")) == 1000


def test_a_template_may_refuse_messages_in_its_own_words() -> None:
    with pytest.raises(InvalidField, match="roles must alternate"):
        _render("{{ raise_exception('roles must alternate') }}")


def test_the_demo_model_has_a_template() -> None:
    template = load_chat_template(DEMO_MODEL)
    assert template is not None
    assert template.render(HELLO, False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    config = '{"chat_template": "config", "eos_token": {"content": "</s>"}, "pad_token": null}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(HELLO, True) == "config"
    (tmp_path / "chat_template.jinja").write_text("file{{ eos_token }}")
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(HELLO, True) == "file</s>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"{% for m in %}"),
        ("chat_template.jinja", b"{{ messages | no_such_filter }}"),
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b"{"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load_chat_template(tmp_path)
