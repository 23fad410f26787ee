"""Requests to a table model: text, numbers, and the different forms of rows."""

import numpy as np
import pytest

from common import serving, table_requests

pytestmark = pytest.mark.quick

FACTS = {
    "num_columns": 3,
    "column_names": ["color", "size(m)", "level"],
    "categories": {"color": ["blue", "red"], "level": ["1", "2.5", "TRUE"]},
}
NAN = np.nan


def rows(content, kind=None, facts=FACTS):
    if kind:
        content = serving.decode(content, kind)
    return table_requests.to_rows(content, facts).tolist()


FORMS = {
    "a list of rows": [["red", 1.5, "1"]],
    "one row": ["red", 1.5, 1],
    "names": [{"level": "1", "color": "red", "size(m)": 1.5}],
    "names of the files": [{"level": 1.0, "color": " red ", "size[m]": "1,5", "name": "not used"}],
}


@pytest.mark.parametrize("name", FORMS)
def test_the_forms_of_a_row(name):
    assert rows(FORMS[name]) == [[1, 1.5, 0]]


@pytest.mark.parametrize(
    "text",
    [
        "red,1.5,1",
        "\ufeffred;1,5;1\r\n",
        "color,size[m],level\nred,1.5,1",
        "id\tlevel\tsize(m)\tcolor\n7\t1\t1.5\tred\n",
        '"level","label","color","size[m]"\n"1",,"red","1.5"\n\n',
    ],
)
def test_csv_may_have_a_header_with_other_columns(text):
    assert rows(text, "text/csv") == [[1, 1.5, 0]]


def test_missing_and_unknown_values_are_not_a_category(capsys):
    found = rows([["pink", "NA", None], ["", 2, "?"], ["blue", None, 2.5], [None, "nan", True]])
    np.testing.assert_array_equal(found, [[NAN, NAN, NAN], [NAN, 2, NAN], [0, NAN, 1], [NAN, NAN, 2]])
    line = (
        "warning: 1 values of the column color, such as 'pink', count as missing: no training row has them\n"
    )
    assert capsys.readouterr().err == line


def test_numbers_alone_are_used_unchanged():
    np.testing.assert_array_equal(rows(np.array([1, 2, 0])), [[1, 2, 0]])
    plain = {"num_columns": 2, "column_names": None}
    assert rows([[1, 2], [3, 4]], facts=plain) == [[1, 2], [3, 4]]
    assert rows("1,2\n3,4\n", "text/csv", plain) == [[1, 2], [3, 4]]
    assert rows([True, False], facts=plain) == [[1, 0]]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([], "shape (0, 3): expected 3 columns (color, size(m), level)"),
        ([["red", 1.5]], "a row of 2"),
        ([["red", 1.5, "1", 2]], "a row of 4"),
        ([["red", "large", "1"]], "the column size(m) contains 'large'"),
        ([["red", 1e39, "1"]], "infinite or too large"),
        ([["red", "inf", "1"]], "infinite or too large"),
        ([{"color": "red"}], "no column size(m), level"),
        ([{"color": "red", "size(m)": 1, "level": 1}, ["red", 1, 1]], "rows with and without names"),
        ([["red", [1], "1"]], "the column size(m) contains [1]"),
        ([[1, 2, 3], 4], "a row of int"),
        (np.zeros((2, 4)), "shape (2, 4)"),
        (np.array(["red"]), "no numbers"),
    ],
)
def test_a_bad_request_is_rejected_with_the_expected_form(content, part):
    with pytest.raises(serving.RequestError) as caught:
        rows(content)
    assert part in str(caught.value)
    assert caught.value.status_code == 400
