"""Callers: the terms of a key, and what stands for an address."""

import pytest

from pcae_serve.callers import Caller, of_address, of_key_lines
from pcae_serve.keys_file import KeyLine

KEY = "3f9a-0123456789abcdef"


def line(number: int, **options: str) -> KeyLine:
    return KeyLine(number, f"{KEY}-{number}", options)


def test_a_key_has_a_name_a_weight_and_a_rate() -> None:
    lines = [line(1), line(3, name="ingest", weight="2", rate="0.5"), line(4, weight="0.1")]
    assert of_key_lines(lines) == [
        Caller("key-1"),
        Caller("ingest", 2.0, 0.5),
        Caller("key-4", 0.1),
    ]
    assert of_key_lines([line(7)], "admin-key") == [Caller("admin-key-7")]


def test_keys_of_one_name_are_one_caller() -> None:
    old, new = of_key_lines([line(1, name="web", weight="2"), line(2, weight="2", name="web")])
    assert old == new
    with pytest.raises(ValueError, match=r"^line 2: keys of one name .* same weight= and rate="):
        of_key_lines([line(1, name="web", weight="2"), line(2, name="web")])


def test_a_key_is_there_once_and_is_no_name() -> None:
    with pytest.raises(ValueError, match=r"^line 9: the key of line 2 again$"):
        of_key_lines([line(2, name="web"), KeyLine(9, line(2).key, {"name": "other"})])
    for other in (line(1, name=line(2).key), line(1, name=line(1).key)):
        with pytest.raises(ValueError, match=r"^line 1: name= is a key") as raised:
            of_key_lines([other, line(2)])
        assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("weight", value) for value in ("0", "-1", "x", "nan", "inf", "1e7", "1e-9", "")),
        *(("rate", value) for value in ("0", "-1", "x", "nan", "inf", "1,5")),
        *(("name", value) for value in ("a b", "ünïcode", "x" * 65, "key-1", "admin-key-2", '"')),
    ],
)
def test_another_value_is_refused_with_its_line(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^line 5: (name= takes|{option}= must be)") as raised:
        of_key_lines([line(2), line(5, **{option: value})])
    assert KEY not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("host", "caller"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", ""),
        ("", ""),
    ],
)
def test_an_address_is_a_caller_and_so_is_an_ipv6_network(host: str, caller: str) -> None:
    assert of_address(host) == caller
