"""The sites of a simulation: the agents' own compute commands, on images that are in memory already.

Legend: N images, H x W pixels, C channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedagent.compute import AgentCompute
from fedagent.image_distance import Tick
from fedagent.impression_check import SitePictures
from fedagent.resident import ResidentImages
from fedagent.site_images import SiteImages
from fedcore.compute_worker import Job
from fedcore.data import LabelledImages, SiteData
from fedcore.data.benchmark_sets import Federation, SiteSplit
from fedcore.data.images import convert_array
from fedcore.data.labels import labels_from_numbers
from fedcore.device import ComputeDevice
from fedcore.errors import DataError
from fedcore.plan import Plan


class MemoryImages(SiteImages):
    """Images of all sites, as `SiteImages` would have read them; the training split on the device."""

    def __init__(self, federation: Federation, plan: Plan) -> None:
        """Raises DataError if a site has no training image, or some that the plan does not take."""
        super().__init__()
        names = federation.class_names
        self._sites = {name: site_data(split, plan, names, name) for name, split in federation.sites.items()}
        self._resident: dict[str, ResidentImages] = {}
        self._pictures: dict[str, SitePictures] = {}

    def get(
        self, data: Mapping[str, Any], plan: Plan, device: ComputeDevice
    ) -> tuple[SiteData, ResidentImages]:
        """All splits of the site `data["site"]`, and its training split on the device."""
        name = str(data["site"])
        site = self._sites[name]
        if name not in self._resident:
            self._resident[name] = ResidentImages.of(site.train, device)
        return site, self._resident[name]

    def pictures(
        self, data: Mapping[str, Any], plan: Plan, device: ComputeDevice, tick: Tick
    ) -> SitePictures:
        """What impressions are compared with at the site `data["site"]`, made once."""
        name = str(data["site"])
        if name not in self._pictures:
            site, train = self.get(data, plan, device)
            self._pictures[name] = SitePictures.of(train, (site.validation, site.test), tick)
        return self._pictures[name]

    def __getitem__(self, site: str) -> SiteData:
        """All splits of a site."""
        return self._sites[site]


class SimulatedSites(AgentCompute):
    """The compute commands `train`, `recalibrate` and `evaluate` of every site."""

    def __init__(self, images: MemoryImages) -> None:
        super().__init__()
        self._images = images


class QuietJob(Job):
    """A command that nobody watches or withdraws."""

    def __init__(self) -> None:
        super().__init__(0, lambda message: None)


def site_data(split: SiteSplit, plan: Plan, class_names: tuple[str, ...], site: str) -> SiteData:
    """A site's splits as a reader gives them: uint8 [N, H, W, C], the plan's size and class order.

    Raises DataError, PlanError.
    """
    train, validation, test = (
        plan_images(part, plan, class_names, f"{site}: {name}")
        for name, part in (("train", split.train), ("validation", split.validation), ("test", split.test))
    )
    if not len(train):
        raise DataError(f"{site}: no training images", hint="ask for fewer sites, or a larger alpha")
    return SiteData(train, validation, test, plan.class_names)


def joined(parts: Sequence[LabelledImages]) -> LabelledImages:
    """Several sites' images as one set."""
    return LabelledImages(
        np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])
    )


def plan_images(images: LabelledImages, plan: Plan, class_names: tuple[str, ...], who: str) -> LabelledImages:
    """Images and labels as the plan wants them; the same object where nothing differs.

    Labels go by class name where the plan names its classes, else by number. Raises DataError.
    """
    pixels, _ = convert_array(images.images, plan.model.input, who=who)
    names = None if plan.data.class_names in (None, class_names) else class_names
    labels = labels_from_numbers(images.labels, names, plan, who)
    return LabelledImages(pixels, labels)
