"""FastAPI and ONNX Runtime, as most people write it: a `def` route, which runs in a thread pool.

uvicorn plain:app --port PORT --no-access-log
"""

from typing import Annotated, Any

from fastapi import Body, FastAPI
from handler import Model

app = FastAPI()
model = Model()


@app.get("/ready")
def ready() -> dict[str, bool]:
    return {"ready": True}


@app.post("/classify")
def classify(
    image: Annotated[bytes, Body(media_type="application/octet-stream")],
) -> dict[str, Any]:
    (index,) = model.classify(model.pixels(image)[None])
    return model.answer(index)
