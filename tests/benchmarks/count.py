"""How long parameters and cache bytes of all published models take: goal under 50 ms together.

python tests/benchmarks/count.py
"""

from __future__ import annotations

import time

import workbench
from workbench.model.count import cache_bytes, parameters
from workbench.model.published import config_names

REPEATS = 20


def main() -> None:
    names = config_names()
    began = time.perf_counter()
    configs = [workbench.config(name) for name in names]
    reading_ms = 1e3 * (time.perf_counter() - began)
    taken_ms = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for config in configs:
            parameters(config)
            cache_bytes(config, 131_072, "float8")
        taken_ms.append(1e3 * (time.perf_counter() - began))
    print(
        f"parameters and cache bytes of {len(names)} published models: {min(taken_ms):.1f} ms at best,"
        f" {max(taken_ms):.1f} ms at worst of {REPEATS} (goal: under 50 ms); reading their files {reading_ms:.0f} ms"
    )


if __name__ == "__main__":
    main()
