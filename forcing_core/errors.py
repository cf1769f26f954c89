"""The one error type of the core: a sentence that says what is wrong, and one that says the fix."""


class ForcingError(ValueError):
    """A problem the person with the graph open can fix; the text says how."""
