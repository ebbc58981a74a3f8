"""Model of peak memory for several image sizes: M = M0 + c per_device height width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from launcher.goodput.throughput_model import Estimate, MemoryModel, fit_memory
from launcher.system.formatting import format_bytes

__all__ = ["ImageMemoryModel", "PeakMemory"]

_MIN_PROBES = 3


class PeakMemory(NamedTuple):
    """A worker's peak memory in bytes, with micro-batches of `per_device` images of height x width pixels."""

    height: int
    width: int
    per_device: int
    memory_bytes: int

    @property
    def pixels(self) -> int:
        """Pixels per image."""
        return self.height * self.width


@dataclass(frozen=True)
class ImageMemoryModel:
    """A worker's peak bytes, fixed + c per_device height width, fitted by least squares of the relative errors.

    `within`: the largest relative difference from a measured value. `sizes`: (height, width) of the images.
    """

    model: MemoryModel
    within: float
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def from_peaks(cls, peaks: Sequence[PeakMemory]) -> ImageMemoryModel | None:
        """Fit the model. None if all images have the same number of pixels, as c height width is then one unknown.

        Also None with fewer than three different products of per_device and pixels, as any two lie on a line.
        """
        probes = [(float(peak.per_device * peak.pixels), float(peak.memory_bytes)) for peak in peaks]
        if len({peak.pixels for peak in peaks}) < 2 or len({product for product, _ in probes}) < _MIN_PROBES:
            return None
        model = fit_memory(probes)
        within = max(abs(model.predict_bytes(product).value - measured) / measured for product, measured in probes)
        sizes = sorted({(peak.height, peak.width) for peak in peaks}, key=lambda size: (size[0] * size[1], size))
        return cls(model, within, tuple(sizes))

    @property
    def fixed_bytes(self) -> Estimate:
        return self.model.line.intercept_estimate

    @property
    def pixel_bytes(self) -> Estimate:
        """Bytes per pixel of each image."""
        return self.model.line.slope_estimate

    def describe(self) -> str:
        """The formula and its error. It is not evaluated at unmeasured sizes; that is left to the reader."""
        fixed, per_pixel = self.fixed_bytes.value, self.pixel_bytes.value
        sizes = ",".join(str(h) if h == w else f"[{h},{w}]" for h, w in self.sizes)
        error = f"within {max(1, math.ceil(100 * self.within))} % of what was measured at recipe.image_size={sizes}"
        if not per_pixel:
            return f"A worker's memory is about {format_bytes(fixed)} regardless of per_device and image size, {error}."
        memory = f"{format_bytes(fixed)} + {format_bytes(per_pixel)} x per_device x height x width"
        return f"A worker's memory is about {memory}, {error}."

    def to_facts(self) -> dict[str, Any]:
        """Both coefficients for JSON, with their 95 % intervals (null where there is none)."""
        return {
            "fixed_bytes": self.fixed_bytes.to_facts(),
            "pixel_bytes": self.pixel_bytes.to_facts(),
            "within": self.within,
            "sizes": [list(size) for size in self.sizes],
        }
