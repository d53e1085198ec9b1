"""CSV that a spreadsheet may open, at once or part by part."""

import io

from proxy.administration.csv import write_csv


def test_a_text_is_no_formula():
    """It gets a quote in front; numbers stay."""
    file = io.StringIO()
    write_csv(file, ("user", "tokens"), [("=1+1", -5), ("ann, bob", None)])
    assert file.getvalue() == 'user,tokens\n\'=1+1,-5\n"ann, bob",\n'


def test_rows_can_follow_rows():
    """Without heads nothing comes between them."""
    file = io.StringIO()
    write_csv(file, ("user",), [("ann",)])
    write_csv(file, (), [("bob",)])
    assert file.getvalue() == "user\nann\nbob\n"
