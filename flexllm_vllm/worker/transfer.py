"""From the host to the device and back, without either waiting for the other."""

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host's on the device; the same where that is the host.

    Copied from pinned memory: the host does not wait for what the device has yet to do.
    """
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


class DeviceWork:
    """What this thread has given a device to do until now.

    A thread has a stream of its own: what one has computed another may read when it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> None:
        """Blocks until it is done."""
        if self._done is not None:
            self._done.synchronize()


class HostCopy:
    """Numbers of the device's, on their way to the host.

    Args:
        values: ``[n]`` of any dtype; its value now, whatever becomes of it.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
        self._copied = DeviceWork(values.device)

    def wait(self) -> list[float]:
        """The numbers; waits until they are there."""
        self._copied.wait()
        found: list[float] = self._values.tolist()
        return found
