"""Web pages that are one file: their own script and style, and nothing from elsewhere."""

import base64
import hashlib
import re


def content_policy(page: str, *more: str) -> str:
    """The Content-Security-Policy under which a page runs its inline script and style and no other.

    They are named by their hashes, and scripts may not turn strings into HTML, so a text that
    somebody else wrote stays text.

    Args:
        page: the HTML; a script or style that counts has a tag without attributes.
        more: further directives, such as `connect-src 'self'`.
    """
    allowed = [
        f"{tag}-src {' '.join(hashes)}"
        for tag in ("script", "style")
        if (hashes := [_hash(t) for t in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)])
    ]
    fixed = ["img-src data:", "base-uri 'none'", "form-action 'none'"]
    types = ["require-trusted-types-for 'script'", "trusted-types 'none'"]
    return "; ".join(["default-src 'none'", *allowed, *fixed, *types, *more])


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
