"""JSON pointers (RFC 6901)."""


def pointer(*parts: str | int) -> str:
    """Return the pointer to the member at `parts`; no part at all is the whole document."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
