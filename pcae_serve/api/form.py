"""Read the body of an image request: an image file, or a form with image files and parameters."""

from dataclasses import dataclass

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from pcae_serve.api.body import limited, read_body
from pcae_serve.api.parameters import ImageParameters, unknown
from pcae_serve.errors import (
    InvalidParameter,
    TooLarge,
    UnreadableImage,
    UnsupportedType,
    one_line,
    shown,
)
from pcae_serve.runtime.uploads import Upload

#: Name of the file fields that hold images.
IMAGE = "image"
#: Maximum text fields of a form; more than there are parameters, as one may be repeated.
MAX_FIELDS = 32
#: Encodings of text in a form.
CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1"})


@dataclass(frozen=True)
class Form:
    """The images of a body, and the text fields of its form; a body that is an image has none."""

    images: list[bytes]
    fields: list[tuple[str, str]]


def is_form(request: Request) -> bool:
    """Return whether the body is a multipart form."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "multipart/form-data"


def require_plain_body(request: Request) -> None:
    """Raise UnsupportedType if the body is compressed."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedType(
            f"content encoding {shown(encoding)} is not supported; send the body uncompressed"
        )


async def read_image(
    request: Request, limit: int, kind: type[ImageParameters], upload: Upload
) -> Form:
    """Return the image in the body: the body itself, or the field `image` of a form.

    limit: maximum bytes of the body. kind: the parameters that a form may have. Raises TooLarge,
    UnreadableImage, or InvalidParameter if the form has other fields or several images.
    """
    if not is_form(request):
        return Form([await read_body(request, limit, upload)], [])
    form = await read_images(request, limit, MAX_FIELDS, kind, upload)
    if len(form.images) > 1:
        raise InvalidParameter(
            f"the form has {len(form.images)} fields {IMAGE!r}; send several images to"
            " /classify/batch"
        )
    return form


async def read_images(
    request: Request, limit: int, max_images: int, kind: type[ImageParameters], upload: Upload
) -> Form:
    """Return the images in the fields `image` of a form, in order. Raises like `read_image`."""
    if not is_form(request):
        raise UnsupportedType(f"send multipart/form-data with each image in a file field {IMAGE!r}")
    _require_plain_text(request.headers["content-type"])
    chunks = limited(request, limit, upload)
    parser = MultiPartParser(request.headers, chunks, max_files=max_images, max_fields=MAX_FIELDS)
    parser.spool_max_size = limit + 1  # keep files in memory, which `limit` bounds
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        if "Too many files" in str(error):
            raise TooLarge(f"the body has more than {max_images} files; send fewer") from None
        raise UnreadableImage(f"the multipart body cannot be parsed: {one_line(error)}") from None
    try:
        return await _sort(form, kind)
    finally:
        await form.close()


def _require_plain_text(content_type: str) -> None:
    """Raise UnsupportedType if a form's text is in another encoding than UTF-8 and the like.

    Python's decoders include some that take minutes for a megabyte, such as punycode.
    """
    given = parse_options_header(content_type)[1].get(b"charset", b"utf-8").decode("latin-1")
    if given.lower() not in CHARSETS:
        raise UnsupportedType(
            f"charset {shown(given)} of the form is not supported; send its text in UTF-8"
        )


async def _sort(form: FormData, kind: type[ImageParameters]) -> Form:
    """Return the images and the text fields of a form. Raises InvalidParameter for others."""
    images, fields = list[bytes](), list[tuple[str, str]]()
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != IMAGE:
                raise InvalidParameter(
                    f"unknown file field {shown(name)} in the form; the only file field is"
                    f" {IMAGE!r}"
                )
            images.append(await value.read())
            await value.close()  # its memory is free
        elif name == IMAGE:
            raise InvalidParameter(
                f"the field {IMAGE!r} is text; send the file, as curl -F image=@photo.jpg does"
            )
        elif name not in kind.model_fields:
            known = [IMAGE, *kind.model_fields]
            raise unknown(f"field {shown(name)} in the form", name, known)
        else:
            fields.append((name, value))
    if not images:
        raise UnreadableImage(f"the form has no file field {IMAGE!r}")
    return Form(images, fields)
