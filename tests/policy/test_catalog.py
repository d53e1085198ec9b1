"""Which upstreams and models there are, and which model a client means by a name."""

from dataclasses import replace

import pytest

from proxy.policy.catalog import Allow, Catalog, KeyCommand, Model, Naming, Secret, Upstream

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


AZURE = Upstream("azure", "https://x.example", None, kind="azure", naming=Naming(any_case=True))
OLLAMA = Upstream(
    "ollama",
    "http://box:11434/v1",
    None,
    kind="ollama",
    naming=Naming(any_case=True, default_tag=":latest", default_namespace="library/", default_host="hub.example/"),
)
LLAMA = ("llama3", "llama3:latest", "library/llama3", "library/llama3:latest")


@pytest.mark.parametrize(
    ("upstream", "name", "spellings"),
    [
        (OPENAI, "GPT-4O", ()),
        (AZURE, "GPT-4O", ("gpt-4o",)),
        (AZURE, "gpt-4o:latest", ("gpt-4o:latest",)),
        *(
            (OLLAMA, name, (*LLAMA, "hub.example/library/llama3", "hub.example/library/llama3:latest"))
            for name in (*LLAMA, "LLAMA3", "Llama3:Latest", "hub.example/library/Llama3")
        ),
        (
            OLLAMA,
            "Llama3:70B",
            ("llama3:70b", "library/llama3:70b", "hub.example/library/llama3:70b"),
        ),
        (OLLAMA, "me/x", ("me/x", "me/x:latest", "hub.example/me/x", "hub.example/me/x:latest")),
        (
            OLLAMA,
            "host:50/me/x",
            ("host:50/me/x", "host:50/me/x:latest", "hub.example/host:50/me/x", "hub.example/host:50/me/x:latest"),
        ),
    ],
)
def test_all_spellings_of_a_name_are_one_model(upstream: Upstream, name: str, spellings: tuple[str, ...]) -> None:
    """Quotas match any of them, records have the shortest, and the upstream gets what the client wrote."""
    for catalog in (Catalog({}, None, upstream), Catalog({}, {"*": Model("*", upstream, "*")})):
        found = catalog.model(name)
        assert found is not None
        assert found.spellings == spellings
        assert found.matched_name == (spellings or name)
        assert found.name == (spellings[0] if spellings else name)
        assert found.upstream_model == name


def test_a_listed_model_is_found_by_its_other_spellings_if_the_list_is_open() -> None:
    """With the upstream to which the unlisted name would go. A closed list has its names as they are written."""
    listed = Model("gpt-4o", AZURE, "GPT-4o", max_output_tokens=5)
    open_list = {"gpt-4o": listed, "*": Model("*", AZURE, "*")}
    assert Catalog({}, open_list).model("GPT-4O") is listed
    assert Catalog({}, {"gpt-4o": listed}).model("GPT-4O") is None
    elsewhere = replace(listed, upstream=OPENAI)
    alias = replace(listed, upstream_model="o3")
    for other in (elsewhere, alias):
        found = Catalog({}, {**open_list, "gpt-4o": other}).model("GPT-4O")
        assert (found.name, found.spellings, found.upstream) == ("gpt-4o", ("gpt-4o",), AZURE)


def test_an_unlisted_name_has_the_same_spellings_at_all_its_upstreams() -> None:
    """A call may go to any of them."""
    anything = replace(Model("*", OPENAI, "*"), others=(Model("*", AZURE, "*", weight=0),))
    found = Catalog({}, {"*": anything}).model("GPT-4O")
    assert found is not None
    assert [(each.name, each.upstream_model, each.spellings, each.weight) for each in found.targets] == [
        ("gpt-4o", "GPT-4O", ("gpt-4o",), 1),
        ("gpt-4o", "GPT-4O", ("gpt-4o",), 0),
    ]


def test_which_names_are_listed() -> None:
    """ "*" is no name."""
    catalog = Catalog({}, {"fast": FAST, "*": ANYTHING})
    assert [catalog.lists(name) for name in ("fast", "FAST", "*", "qwen")] == [True, False, False, False]
    assert not Catalog({}, None, OPENAI).lists("fast")


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


def test_the_arguments_of_a_command_are_not_shown() -> None:
    """One of them may be a secret. The program is named in the log."""
    command = KeyCommand(("issue-token", "--secret", "s3cret"), every_s=60)
    assert command.program == "issue-token"
    assert "s3cret" not in repr(command)
