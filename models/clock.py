"""Where the seconds of a training loop go."""

import time

PARTS = ("data", "forward", "backward", "optimizer", "other")


class Clock:
    """Seconds of one rank's loop: what each part of a step takes, and what checkpoints cost it.

    The first step, which also compiles and allocates, is told by itself and counts nowhere else.
    On a CPU a part's seconds are those of its work. On a GPU, which works behind the loop, they are those of giving it out.
    """

    def __init__(self) -> None:
        self.began = self.last = self.mark = self.first_s = 0.0
        self.wrote = False
        self.stall_s, self.checkpoints = 0.0, 0
        self.steps = {False: [0, 0.0], True: [0, 0.0]}  # while a checkpoint is written: number and seconds
        self.parts = dict.fromkeys(PARTS, 0.0)

    def start(self) -> None:
        """The loop begins."""
        self.skip()
        self.began = self.last

    def skip(self) -> None:
        """The time since the last step is none of its parts'."""
        self.last = self.mark = time.perf_counter()

    def end_of(self, part: str) -> None:
        """The time since the last mark was that of a part."""
        now = time.perf_counter()
        self.parts[part] += now - self.mark
        self.mark = now

    def step(self, *, writing: bool) -> None:
        """A step has ended; the time since the last end is its."""
        self.end_of("other")
        if not self.first_s:
            self.first_s, self.parts = self.mark - self.last, dict.fromkeys(PARTS, 0.0)
        else:
            kind = self.steps[writing or self.wrote]
            kind[0], kind[1] = kind[0] + 1, kind[1] + self.mark - self.last
        self.last, self.wrote = self.mark, writing

    def stalled(self, seconds: float) -> None:
        """The loop has waited for a checkpoint."""
        self.stall_s, self.checkpoints = self.stall_s + seconds, self.checkpoints + 1
        self.skip()

    def figures(self) -> dict[str, float]:
        """For `timing.json`; `step_writing_s` is the mean time of a step during which a checkpoint was written, `NAME_s` the
        seconds of a part."""
        mean = {k: total / max(1, count) for k, (count, total) in self.steps.items()}
        parts = {f"{name}_s": seconds for name, seconds in self.parts.items()}
        return {"loop_s": time.perf_counter() - self.began, "steps": self.steps[False][0] + self.steps[True][0],
                "checkpoints": self.checkpoints, "stall_s": self.stall_s, "step_quiet_s": mean[False],
                "step_writing_s": mean[True], "first_step_s": self.first_s, **parts}  # fmt: skip

    def table(self) -> str:
        """Share of each part in the loop's time, and milliseconds of a step."""
        count, whole = sum(count for count, _ in self.steps.values()), sum(self.parts.values())
        lines = [f"{name:<10} {s / max(whole, 1e-9):>7.1%} {s / max(1, count) * 1e3:>9.3f} ms" for name, s in self.parts.items()]
        return "\n".join([f"{count} steps of rank 0", *lines])
