"""Where the threads and tasks of this process stand: names of functions and lines, never values."""

import asyncio
import faulthandler
import tempfile


def thread_dump() -> str:
    """The stacks of all threads. Any thread may ask."""
    with tempfile.TemporaryFile() as file:  # faulthandler writes to a descriptor
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def task_dump() -> str:
    """The stacks of all tasks of the running event loop. grpc's own tasks have frames without line numbers."""
    lines = []
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        lines.append(f"\nTask {task.get_name()}:")
        lines += [
            f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}'
            for frame in task.get_stack()
        ]
    return "\n".join(lines) + "\n"
