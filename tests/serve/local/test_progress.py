"""Progress on a terminal and elsewhere, on a virtual clock."""

import io

from pcae_serve.local.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_every_ten_seconds() -> None:
    stream, now_s = io.StringIO(), 0.0
    progress = Progress(4000, stream, lambda: now_s)
    for i in range(800):
        now_s += 1 / 32
        progress.add(failed=i == 3, note="tier fast")
    progress.clear()
    assert stream.getvalue().splitlines() == [
        "320 of 4,000 images, 32.0/s, about 2 min left, 1 failed, tier fast",
        "640 of 4,000 images, 32.0/s, about 2 min left, 1 failed, tier fast",
    ]


def test_one_line_on_a_terminal() -> None:
    stream, now_s = Terminal(), 0.0
    progress = Progress(4, stream, lambda: now_s)
    for seconds in (0.1, 0.25, 1000.0):
        now_s = seconds
        progress.add()
    first, second = stream.getvalue().split("\r")[1:]
    assert first == "2 of 4 images, 8.0/s, about 0 s left"
    assert second.rstrip() == "3 of 4 images, 0.0/s, about 6 min left"
    assert len(second) >= len(first)
    progress.clear()
    assert stream.getvalue().endswith("\r")


def test_durations() -> None:
    assert [duration(s) for s in (4, 99, 720, 12600)] == ["4 s", "99 s", "12 min", "3.5 h"]
