"""Progress.

* without a terminal: one line for a task that took long, with its last note; none for a short one; no control codes
* on a terminal: bars, also for a task inside a task
"""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gmn import progress


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=request.param, width=120)
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(progress, "WORTH_A_LINE", 0.0)
    return stream


def test_a_task_inside_a_task(output: io.StringIO) -> None:
    with progress.track("outer", 2) as outer:
        for number in range(2):
            with progress.track(f"inner {number}", 1) as inner:
                inner("loss 0.5")
            outer(f"step {number}")
    lines = [line for line in output.getvalue().splitlines() if "\x1b" not in line]
    if not progress.console.is_terminal:
        assert [line.split(": ")[0] for line in lines] == ["outer"]  # what happens inside it is its own business
        assert lines[0].endswith("step 1")
    else:
        assert "outer" in output.getvalue()
        assert "━" in output.getvalue()
    assert progress._active == []


def test_a_failing_task_leaves_no_bar(output: io.StringIO) -> None:
    with pytest.raises(ZeroDivisionError), progress.track("task", 1):
        raise ZeroDivisionError
    assert progress._active == []


def test_a_long_task_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, width=120))
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    with progress.track("task", 3) as advance:
        advance("loss 2")
    assert "task: 1/3, " in stream.getvalue()
    assert "s left, loss 2" in stream.getvalue()


def test_short_tasks_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream))
    with progress.track("task", 1) as advance:
        advance("")
    assert stream.getvalue() == ""


def test_several_steps_at_once(output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes did of a shared task counts, and so in the time that is left."""
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    with progress.track("shared", 4) as advance:
        advance("mine", 3)
    if not progress.console.is_terminal:
        assert output.getvalue().startswith("shared: 3/4, ")


def test_what_was_done_before_does_not_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, times = io.StringIO(), iter([0.0, 0.0, 10.0, 10.0])
    monkeypatch.setattr(progress, "console", Console(file=stream, width=120))
    monkeypatch.setattr(progress, "LINE_EVERY", 1.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    with progress.track("task", 1000, done=900) as advance:
        advance("loss 2", 10)
    assert stream.getvalue().startswith("task: 910/1000, 90 s left, loss 2\n")
