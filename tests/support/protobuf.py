"""ONNX graphs with external data, encoded by hand."""


def field(number: int, content: bytes) -> bytes:
    """Encode a string or message of any length in protobuf."""
    head, length = number << 3 | 2, len(content)
    digits = []
    for value in (head, length):
        while value > 0x7F:
            digits.append(value & 0x7F | 0x80)
            value >>= 7
        digits.append(value)
    return bytes(digits) + content


def tensor(location: str, key: str = "location") -> bytes:
    """Return the content of a TensorProto with one entry of external data."""
    return field(13, field(1, key.encode()) + field(2, location.encode()))
