"""Reads a server's metrics on stdin and prints, by model, how much padding was avoided."""

from __future__ import annotations

import re
import sys


def counters(text: str) -> dict[str, dict[str, float]]:
    """Model -> counter -> value, for this package's counters."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = re.match(r'(ft_\w+_total)\{.*?ModelName="([^"]+)".*?\} ([-\d.eE+]+)', line)
        if match:
            own = found.setdefault(match[2], {})
            own[match[1]] = own.get(match[1], 0) + float(match[3])
    return found


def share(avoided: float, tokens: float) -> str:
    """`avoided` of what would have been computed."""
    return f"{avoided / (avoided + tokens):.0%}" if avoided + tokens else "0%"


def main() -> None:
    found = counters(sys.stdin.read())
    if not found:
        raise SystemExit("error: the server exposes no ft_* metrics (metrics_config)")
    for model, values in sorted(found.items()):
        tokens = values.get("ft_tokens_total", 0)
        longest = values.get("ft_padding_avoided_total", 0)
        fixed = values.get("ft_padding_avoided_fixed_total", 0)
        print(
            f"{model}: {values.get('ft_requests_total', 0):.0f} requests, {tokens:.0f} tokens "
            f"computed; padding to the longest of a batch would have added {longest:.0f} "
            f"({share(longest, tokens)} of the work), padding to the limit {fixed:.0f} "
            f"({share(fixed, tokens)})"
        )


if __name__ == "__main__":
    main()
