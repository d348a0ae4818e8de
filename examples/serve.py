"""Serve a gallery: whom does this crop show?

    RUN=log/shop GALLERY=galleries/shop API_KEY=... uvicorn examples.serve:app
    curl -H "X-API-Key: ..." --data-binary @lost.jpg "localhost:8000/search?top=5&at_least=0.62"

The first line starts it, the second asks it. It finds people: give the key to those who may do that, put TLS and a
record of who asked before it, and read SECURITY.md.
"""

import os
import secrets
from typing import Annotated, Any

from fastapi import FastAPI, Header, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool

from fusionreid import Embedder
from fusionreid.dataloading.image_files import open_image
from fusionreid.engine.galleries import find
from fusionreid.engine.galleries.table import Gallery

MOST_BYTES = 2**20  # of a crop
KEY = os.environ["API_KEY"].encode()
embedder = Embedder(os.environ["RUN"])
gallery = Gallery.open(os.environ["GALLERY"], embedder.model_digest)
app = FastAPI()


@app.post("/search")
async def search(
    request: Request,
    x_api_key: Annotated[str, Header()] = "",
    top: Annotated[int, Query(ge=1, le=100)] = 10,
    at_least: Annotated[float, Query(ge=-1, le=1)] = 0.5,
) -> list[dict[str, Any]]:
    """The images most like the crop that is the body; an empty list if nobody is."""
    if not secrets.compare_digest(x_api_key.encode(), KEY):
        raise HTTPException(401, "the header X-API-Key is not the key")
    crop = bytearray()
    async for piece in request.stream():
        crop += piece
        if len(crop) > MOST_BYTES:
            raise HTTPException(413, f"a crop may have {MOST_BYTES:,} bytes")
    return await run_in_threadpool(answer, bytes(crop), top, at_least)


def answer(crop: bytes, top: int, at_least: float) -> list[dict[str, Any]]:
    """Search for one crop; the gallery may have grown since the last one."""
    try:
        image = open_image(crop).convert("RGB")
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise HTTPException(400, f"the body is not an image that can be read: {error}") from error
    gallery.table.checkout_latest()
    return find.matches(find.exact(gallery, embedder(image), top), at_least)[0]
