"""The page that a server shows: one file, which nothing from outside may add to."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from starlette.responses import HTMLResponse


def page() -> HTMLResponse:
    """The page, with a policy under which a browser runs its own script alone and asks its own server alone."""
    text = (importlib.resources.files("jax_ccm.serving") / "page.html").read_text()

    def digest(part):
        return base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()

    # Digests of what stands between the tags, byte for byte: a browser runs nothing else.
    def allowed(tag):
        return " ".join(f"'sha256-{digest(part)}'" for part in re.findall(f"(?s)<{tag}>(.*?)</{tag}>", text))

    policy = {
        "default-src": "'none'", "script-src": allowed("script"), "style-src": allowed("style"),
        "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'",
    }  # fmt: skip
    return HTMLResponse(
        text,
        headers={
            "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )
