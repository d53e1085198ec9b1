"""Which upstreams and models there are, and which model a client means by a name."""

from dataclasses import replace

import pytest

from proxy.policy.catalog import Allow, Catalog, Model, Secret, Upstream

OPENAI = Upstream("openai", "https://api.openai.example/v1", Secret("sk-upstream"))
LOCAL = Upstream("local", "http://localhost:8000/v1", None, kind="vllm", on_disconnect="stop")
FAST = Model("fast", OPENAI, "gpt-4o-mini", max_output_tokens=16384, context=128_000, encoding="o200k_base")
ANYTHING = Model("*", LOCAL, "*")


@pytest.mark.parametrize(
    ("listed", "default", "name", "upstream", "upstream_model"),
    [
        pytest.param(None, OPENAI, "gpt-4o", "openai", "gpt-4o", id="no section: any name, to the default upstream"),
        pytest.param(None, None, "gpt-4o", None, None, id="no section and no default upstream: none"),
        pytest.param([], OPENAI, "gpt-4o", None, None, id="an empty section is closed"),
        pytest.param([FAST], OPENAI, "fast", "openai", "gpt-4o-mini", id="an alias"),
        pytest.param([FAST], OPENAI, "gpt-4o-mini", None, None, id="the name behind an alias is not listed"),
        pytest.param([FAST], OPENAI, "FAST", None, None, id="names are case-sensitive"),
        pytest.param(
            [FAST, ANYTHING], OPENAI, "gpt-4o", "local", "gpt-4o", id='"*" accepts any name, for its own upstream'
        ),
        pytest.param([FAST, ANYTHING], OPENAI, "fast", "openai", "gpt-4o-mini", id='a listed name comes before "*"'),
        pytest.param([ANYTHING], OPENAI, "*", "local", "*", id='"*" as a name is a name like any other'),
        pytest.param([FAST], OPENAI, "*", None, None, id='"*" as a name without an entry "*"'),
        pytest.param([FAST], OPENAI, "", None, None, id="no name"),
    ],
)
def test_which_model_a_client_means_by_a_name(listed, default, name, upstream, upstream_model):
    """A `models` section is a closed list; clients, quotas and records call a model by its alias."""
    models = None if listed is None else {model.name: model for model in listed}
    found = Catalog({}, models, default).model(name)
    if upstream is None:
        assert found is None
    else:
        assert (found.name, found.upstream.name, found.upstream_model) == (name, upstream, upstream_model)


def test_nothing_is_known_about_a_model_that_is_not_listed():
    """`"*"` names only an upstream: what is true of one unknown model need not be true of the next."""
    found = Catalog({}, {"*": ANYTHING}).model("qwen")
    assert found == Model("qwen", LOCAL, "qwen")


def test_the_names_of_a_catalog_are_those_of_its_listed_models():
    """In the order of the file. "*" is not a name, and without a list there are none."""
    assert Catalog({}, {"*": ANYTHING, "fast": FAST, "b": FAST, "a": FAST}).names == ("fast", "b", "a")
    assert Catalog({}, None, OPENAI).names == ()


@pytest.mark.parametrize(
    ("listed", "default", "names"),
    [
        pytest.param(None, OPENAI, ["openai"], id="no section: the default upstream"),
        pytest.param(None, None, [], id="no section and no default upstream"),
        pytest.param({}, OPENAI, [], id="a closed list"),
        pytest.param({"fast": FAST}, OPENAI, [], id="a closed list of aliases"),
        pytest.param({"fast": FAST, "*": ANYTHING}, OPENAI, ["local"], id='that of "*"'),
        pytest.param({"*": replace(ANYTHING, others=(FAST,))}, None, ["local", "openai"], id='all of "*"'),
    ],
)
def test_unlisted_names_go_to_the_upstreams_of_an_open_list(listed, default, names):
    """A closed list has none."""
    assert [upstream.name for upstream in Catalog({}, listed, default).open_upstreams] == names


def test_a_model_is_served_at_all_its_upstreams():
    """In the order of the file. An open list sends each name to the same upstreams under that name."""
    spare = Model("*", OPENAI, "*", weight=0)
    anything = replace(ANYTHING, others=(spare,))
    found = Catalog({}, {"*": anything}).model("qwen")
    assert found is not None
    assert found.targets == (found, Model("qwen", OPENAI, "qwen", weight=0))
    assert (found.upstream, found.upstream_model) == (LOCAL, "qwen")
    assert FAST.targets == (FAST,)


def test_a_listed_model_keeps_its_maximum_and_context():
    """They bound what calls hold."""
    assert Catalog({}, {"fast": FAST}).model("fast") is FAST


def test_allow_of_a_model_replaces_that_of_its_upstream() -> None:
    """As a whole: an empty list forbids what the upstream allows."""
    upstream = Upstream("up", "http://upstream.example/v1", None, allow=Allow(store=True))
    assert Model("m", upstream, "m").allows == Allow(store=True)
    assert Model("m", upstream, "m", allow=Allow()).allows == Allow()


def test_a_secret_is_hidden_in_its_text():
    """Also in the text of lists, upstreams, models and catalogs that contain it."""
    secret = Secret("sk-upstream")
    assert secret.reveal() == "sk-upstream"
    shown = f"{secret} {secret!r} {[secret]} {OPENAI} {FAST} {Catalog({OPENAI.name: OPENAI}, {'fast': FAST}, OPENAI)}"
    assert "sk-upstream" not in shown
    assert not hasattr(secret, "__dict__")


def test_secrets_are_compared_by_their_values():
    """A reload can then see whether a key has changed."""
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
