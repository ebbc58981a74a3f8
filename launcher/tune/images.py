"""Peak memory over images of several sizes: M = M0 + c per_device height width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from launcher.sinks.text import size
from launcher.throughput import Estimate, MemoryModel, fit_memory

__all__ = ["ImageMemory", "Peak"]

_LEAST_PROBES = 3


class Peak(NamedTuple):
    """What a worker's memory came to, in bytes, with micro-batches of `per_device` images of height x width pixels."""

    height: int
    width: int
    per_device: int
    memory_bytes: int

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.height * self.width


@dataclass(frozen=True)
class ImageMemory:
    """A worker's bytes at its peak: fixed + c per_device height width, by least squares of the parts they are off by.

    `within`: the largest difference from what was measured, as a part of that. `sizes`: (height, width) of the images.
    """

    model: MemoryModel
    within: float
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, peaks: Sequence[Peak]) -> ImageMemory | None:
        """None where images of one number of pixels were measured alone, as c height width is then one unknown.

        None also below three different products of per_device and pixels: two lie on a line whatever they are.
        """
        probes = [(float(peak.per_device * peak.pixels), float(peak.memory_bytes)) for peak in peaks]
        if len({peak.pixels for peak in peaks}) < 2 or len({product for product, _ in probes}) < _LEAST_PROBES:
            return None
        model = fit_memory(probes)
        within = max(abs(model.at(product).value - measured) / measured for product, measured in probes)
        sizes = sorted({(peak.height, peak.width) for peak in peaks}, key=lambda one: (one[0] * one[1], one))
        return cls(model, within, tuple(sizes))

    @property
    def fixed_bytes(self) -> Estimate:
        return self.model.line.intercepts

    @property
    def pixel_bytes(self) -> Estimate:
        """What each pixel of each image takes."""
        return self.model.line.slopes

    def sentence(self) -> str:
        """The formula and how far it is off. No size that was not measured is put into it: that is the reader's."""
        fixed, each = self.fixed_bytes.value, self.pixel_bytes.value
        named = ",".join(str(h) if h == w else f"[{h},{w}]" for h, w in self.sizes)
        far = f"within {max(1, math.ceil(100 * self.within))} % of what was measured at recipe.image_size={named}"
        if not each:
            return f"A worker's memory is about {size(fixed)} whatever per_device and the size of images, {far}."
        return f"A worker's memory is about {size(fixed)} + {size(each)} x per_device x height x width, {far}."

    def to_facts(self) -> dict[str, Any]:
        """For JSON: both parts with their intervals of 95 %, null where there is none."""
        return {
            "fixed_bytes": _bounds(self.fixed_bytes),
            "pixel_bytes": _bounds(self.pixel_bytes),
            "within": self.within,
            "sizes": [list(one) for one in self.sizes],
        }


def _bounds(found: Estimate) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}
