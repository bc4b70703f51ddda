import torch

from snn_compile.passes.unwrap_steps import unwrap_steps
from tests.passes.capture import capture, x


def test_what_is_wrapped_is_itself():
    def f(a):
        b = a[0] * 2.0
        pair = torch.stack([b, b + 1.0], dim=0)
        return b.unsqueeze(0)[0] - 1.0, b[None][-1] - 1.0, torch.unsqueeze(b, 0).unbind(0)[0] - 1.0, pair[1] - 1.0, pair[-2] - 1.0

    captured = capture(f, x())
    assert captured.check(unwrap_steps) == 5
    assert torch.stack not in captured.targets() and "unsqueeze" not in captured.targets()


def test_near_misses():
    """Another dim, another index than a number, a stack that is written into, or one of what is written into later."""

    def f(a):
        b, c = a[0] * 2.0, a[1] * 2.0
        written, kept = torch.stack([b]), torch.stack([c])
        written[0].mul_(3.0)
        c.add_(1.0)
        other = b.unsqueeze(1)[0], torch.stack([b, b + 1.0], 1)[1], b.unsqueeze(0)[0:1]
        return (written[0] - 1.0, kept[0] - 1.0, *(o - 1.0 for o in other))

    captured = capture(f, x().detach())
    captured.check(unwrap_steps)
    assert captured.targets().count(torch.stack) == 3
