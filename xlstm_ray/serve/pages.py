"""The web page: files of this package that load nothing from elsewhere. Whoever has no key sees them, and no more."""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
AT = {"/": "index.html", "/docs": "reference.html"} | {
    f"/page/{path.name}": path.name for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES
}
HEADERS = {
    # Scripts, styles, pictures and calls of this service alone; no other page may show this one in a frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # else a newer version would meet an older one's scripts
}


def add_pages(app: FastAPI) -> None:
    """Add them to the app, each at its address in AT."""
    for address, name in AT.items():
        app.add_api_route(address, _page(FOLDER / name), methods=["GET", "HEAD"], include_in_schema=False)


def _page(path: Path) -> Callable[[], Response]:
    """What sends this file. It has no parameters: to FastAPI they are fields in the address, which callers may set."""

    def page() -> Response:
        return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)

    return page
