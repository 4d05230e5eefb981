"""What must be equal for interrupted work to go on, also where one side is older than a setting."""

from itda.provenance import differing, identity, said_of

STREAM = {"context_length": 64, "prefix": [1], "hash": "x", "files": 3}


def test_what_differs_is_named():
    was = identity({"model": {"id": "a", "fingerprint": "f"}, "stream": STREAM, "batch_rows": 32})
    assert differing(was, dict(was)) is None
    assert differing(was, was | {"stream.context_length": 32, "model.fingerprint": "g"}) == "stream.context_length"
    assert differing(was, was | {"model.fingerprint": "g"}) == "model.fingerprint"
    assert "stream.hash" not in was and "stream.files" not in was
    assert "64, and now it is 32" in said_of("stream.context_length", 64, 32)


def test_a_setting_that_one_side_does_not_know_was_at_its_default():
    was = identity({"stream": STREAM, "batch_rows": 32}) | {"k": 40}
    for name, default, other in (
        ("nonneg", False, True),
        ("stream.pack", False, True),
    ):
        assert differing(was, was | {name: default}) is None and differing(was | {name: default}, was) is None
        assert differing(was, was | {name: other}) == name
    assert differing(was, was | {"stream.prefix": [2]}) == "stream.prefix"
    # How rows opened is said by their prefix, where there was no choice.
    assert differing(was, was | {"stream.bos": "never"}) is None
    assert differing(was | {"stream.bos": "auto"}, was | {"stream.bos": "never"}) == "stream.bos"
    assert "rows that open with [1], and now they open with []: give `bos='always'` (`--bos always`)" in said_of(
        "stream.prefix", [1], []
    )
    assert differing(was, was | {"stream.chat_template": "c"}) == "stream.chat_template"
