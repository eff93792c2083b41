"""`python -m deploy.deputy PIPELINE`: drives a rollout on where who drove it was killed.

A challenger that nobody watches would keep its share of the traffic whatever it answers. The deputy waits for the lock of the
rollout, which the kernel gives it when its holder dies; a driver that ends in order stops it before.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deploy.process import spawn, stop
from pipelines.home import Home, open_home
from pipelines.manifest import lock, write_atomic
from pipelines.spec import Spec


@contextmanager
def deputy(home: Home, spec: Spec) -> Iterator[None]:
    """Has a deputy at hand for as long as its caller, who holds the lock of the rollout, lives."""
    name = f"{spec.pipeline}.deputy"
    write_atomic(home.services(name) / "spec.json", spec.model_dump_json(by_alias=True))
    waiting = spawn(home, name, ["deploy.deputy", spec.pipeline], 0, {})
    try:
        yield
    finally:
        stop(waiting)


def main(pipeline: str) -> None:
    """Waits until nobody drives the rollout, then does so."""
    home = open_home()
    spec = Spec.model_validate_json((home.services(f"{pipeline}.deputy") / "spec.json").read_text())
    with lock(home.lock(f"rollout-{pipeline}"), what=f"a rollout of {pipeline}", wait=True):
        pass
    from deploy.canary import roll_out  # only now: it may have to wait for long, and then weighs little
    from deploy.tracking import mirror

    print(roll_out(home, spec, tell=lambda line: print(line, flush=True), replaced=True).line, flush=True)
    mirror(home, pipeline, spec.tracking)


if __name__ == "__main__":
    main(*sys.argv[1:])
