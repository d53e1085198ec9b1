"""What was probably meant by a word, a window or a number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import values
from proxy.config.suggestions import did_you_mean, similar_count, similar_duration, similar_window, similar_word

KINDS = ("openai", "azure", "anthropic", "vllm", "ollama", "llamacpp", "simulator")


@pytest.mark.parametrize(
    ("word", "known", "similar"),
    [
        ("opneai", KINDS, "openai"),
        ("OpenAI", KINDS, "openai"),
        ("openai-compatible", KINDS, "openai"),
        ("AZURE", KINDS, "azure"),
        ("llama.cpp", KINDS, "llamacpp"),
        ("mistral", KINDS, None),
        ("", KINDS, None),
        ("any", ("any_group", "every_group"), "any_group"),
        ("mon", ("monday", "sunday"), "monday"),
        ("s", ("saturday", "sunday"), None),
        ("staf", ["staff", "admins"], "staff"),
        ("Staff", ["staff", "Staff"], "staff"),
        ("x" * 1_000_000, ["staff"], None),
    ],
)
def test_the_most_similar_word_is_found(word, known, similar):
    """In any case, and by its beginning. A word of a megabyte is compared at once."""
    assert similar_word(word, known) == similar
    assert did_you_mean(word, known) == (f'did you mean "{similar}"?' if similar else "")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("dya", "day"),
        ("Day", "day"),
        ("days", "day"),
        ("per day", "day"),
        ("daily", "day"),
        ("hourly", "hour"),
        ("monhtly", "month"),
        ("quaterly", "quarter"),
        ("annually", "year"),
        ("d", "day"),
        ("m", None),  # minutes or months
        ("6hours", "6h"),
        ("6 hours", "6h"),
        ("every 6 hours", "6h"),
        ("6H", "6h"),
        ("1 h", "1h"),
        ("24hrs", "24h"),
        ("90 seconds", "90s"),
        ("2 weeks", "2w"),
        ("1.5h", "90m"),
        ("1h30m", "90m"),
        ("1 hour, 30 minutes", "90m"),
        ("1d12h", "36h"),
        ("1mo", "month"),
        ("1 month", "month"),
        ("3 months", "quarter"),
        ("2 months", "60d"),
        ("1y", "year"),
        ("2 years", "730d"),
        ("11 years", None),  # longer than a window may be
        ("0.001s", None),
        ("0 hours", None),
        ("6", None),
        ("6 of them", None),
        ("fortnight", None),
        ("", None),
    ],
)
def test_a_window_is_found_by_its_number_and_unit(written, meant):
    """Or by the name of an interval."""
    assert similar_window(written) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (30, "30s"),
        ("30", "30s"),
        ("30sec", "30s"),
        ("1 minute", "1m"),
        ("700", None),  # longer than ten minutes
        ("1 hour", None),
        ("day", None),
        (True, None),
        (None, None),
        (["30s"], None),
    ],
)
def test_a_duration_is_found_within_its_bounds(written, meant):
    """A number alone has the unit that is usual there."""
    assert similar_duration(written, unit="s", bounds=(1, 600_000)) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("5m", "5M"),
        ("200K", "200k"),
        ("200 k", "200k"),
        ("200,000", "200k"),
        ("200 000", "200k"),
        ("1'500'000", "1500k"),
        ("1e6", "1M"),
        ("1.5e6", "1500k"),
        ("2 million", "2M"),
        ("1.5mio", "1500k"),
        ("1b", "1000M"),
        ("200k tokens", "200k"),
        ("200 tokens", "200"),
        ("10 requests", "10"),
        ("0k", "0"),
        ("1.000", None),  # one, or a thousand
        ("1.2345k", None),
        ("1e99", None),
        ("1g", None),
        ("many", None),
        ("", None),
    ],
)
def test_a_number_is_found_in_other_notations(written, meant):
    """Only a whole one."""
    assert similar_count(written) == meant


@given(st.text(max_size=12) | st.from_regex(r"[0-9]{1,4}[ .,]?[0-9]{0,3} ?[a-zA-Z]{0,8}", fullmatch=True))
def test_a_suggestion_is_valid(text):
    """Whatever was written."""
    if (window := similar_window(text)) is not None:
        assert values.per(window) == window
    if (count := similar_count(text)) is not None:
        values.count(count)
    if (duration := similar_duration(text, unit="s", bounds=(1, values.WAIT_MS_MAX))) is not None:
        values.wait_ms(duration)
