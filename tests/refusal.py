"""What the command line says of bad input."""


def refused(result, *words):
    """Exit code 2, one message that holds these words, no traceback, and nothing about where Python was."""
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
