"""What this process holds in memory, by the kernel's account."""

from pathlib import Path

FIELDS = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon", "file": "RssFile"}


def resident() -> dict[str, int]:
    """Bytes: resident now and at most, and of what is resident now the anonymous part and that of mapped files.

    `file` counts mapped pages, of a bundle's weights for example, which the kernel may drop and read again; `anonymous`
    does not shrink.
    """
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: int(lines[field].split()[0]) * 1024 for name, field in FIELDS.items()}
